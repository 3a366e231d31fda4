"""Runs the code of the documentation, and compares generated pages with the code."""

import importlib.util
import re
import subprocess
import sys

import pytest
import yaml
from projects import ROOT, copy_project, edit, snakemake, tiny_project


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def insert(path, before: str, text: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1, before
    path.write_text(content.replace(before, text + before))


def add_triangle(project):
    """The density that docs/extending.md adds."""
    function, schema, *_ = blocks("docs/extending.md", "python")
    parameters, field = schema.split("class Density(Choice):\n    ...\n")
    insert(project / "diffusion/timesteps.py", "DENSITIES: dict", function + "\n\n")
    insert(project / "diffusion/timesteps.py", '    "uniform": uniform,\n', '    "triangle": triangle,\n')
    insert(project / "diffusion/config.py", "class Density(Choice):\n", parameters)
    insert(project / "diffusion/config.py", "    loss_second_moment: LossSecondMoment | None = None\n", field)


def test_a_density_is_added_as_the_docs_say(tmp_path):
    project = copy_project(tmp_path)
    add_triangle(project)
    (arm,) = re.findall(r"`(\{timesteps: \{triangle.*?\}\})` is an arm", (ROOT / "docs/extending.md").read_text())
    code = f"""
import yaml
from convergence.schema import Arm
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.schemes import scheme_tables
p = scheme_tables(NoiseSchedule(linear_betas(1000)), Arm(**yaml.safe_load({arm!r}))).probabilities
print(abs(p.sum().item() - 1) < 1e-12, p.argmax().item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.stdout.split() in (["True", "699"], ["True", "700"]), done.stderr
    edit(project, lambda study: study["arms"].update(mine={"timesteps": {"triangle": {"peak": 0.7}}}))
    done = snakemake(project, "--dry-run", "--quiet", "all", "--config", "tracking=off")
    assert done.returncode == 0 and re.search(r"^train +27$", done.stdout + done.stderr, re.M), done.stderr
    edit(project, lambda study: study["arms"].update(mine={"timesteps": {"triangle": {"peek": 0.7}}}))
    done = snakemake(project, "--dry-run", "--config", "tracking=off")
    assert done.returncode == 1 and "did you mean peak?" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_net_is_added_as_the_docs_say(tmp_path):
    project = tiny_project(tmp_path / "study")
    *_, module, nets = blocks("docs/extending.md", "python")
    (project / "diffusion/nets/mine.py").write_text(module)
    build = project / "diffusion/build.py"
    insert(build, "from diffusion.nets.unet import UNet\n", "from diffusion.nets.mine import Mine\n")
    build.write_text(re.sub(r"^NETS: .*\n", nets, build.read_text(), count=1, flags=re.M))
    model = yaml.safe_load(re.search(r"`(model: \{mine.*?\}\})` trains", (ROOT / "docs/extending.md").read_text())[1])
    edit(project, lambda study: study.update(model, train=study["train"] | {"precision": "bf16"}))
    done = snakemake(project, "--dry-run", "--quiet", "all", "--config", "tracking=off")
    assert done.returncode == 0, done.stdout + done.stderr
    code = """
import numpy as np
from pathlib import Path
from convergence.study_file import load_experiment
from diffusion.checkpoints import load_checkpoint, sample_checkpoint
from diffusion.errors import InputError
from diffusion.training.segment import train_segment
study = load_experiment(Path("experiments/openmoji.yaml"))
state = train_segment(study.run("under05"), 0, np.zeros((8, 16, 16, 3), np.uint8), None, Path("end"), 3, "cpu")
net = load_checkpoint(Path("end/weights.safetensors"), "cpu")
print(type(net.model).__name__, state.step, sample_checkpoint(net, study.sample, "cpu").shape)
path = Path("experiments/openmoji.yaml")
path.write_text(path.read_text().replace("width:", "widht:"))
try:
    load_experiment(path)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    trained, mistake = done.stdout.splitlines()
    assert trained == "Mine 3 (8, 16, 16, 3)"
    assert "model and dataset.image_size: mine: Mine.__init__() got an unexpected keyword argument 'widht'" in mistake


def test_generated_pages_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    remedy = "run `python docs/generate.py`"
    assert (ROOT / "docs/study.md").read_text() == generate.study_page(), remedy
    assert (ROOT / "docs/schema.json").read_text() == generate.json_schema(), remedy
    assert (ROOT / "docs/imports.dot").read_text() == generate.import_graph(), remedy
    arrows = set(re.findall(r'"(\S+)" -> "(\S+)"', generate.import_graph()))
    drawn = re.findall(r"<title>(\S+)&#45;&gt;(\S+)</title>", (ROOT / "docs/imports.svg").read_text())
    assert arrows == set(drawn), remedy
    assert ("diffusion.build", "diffusion.schemes") in arrows and ("workflow.rules", "workflow.scripts") in arrows


def test_every_key_of_an_experiment_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs/study.md").read_text(), re.M)
    assert len(rows) > 100 and not [key for key, text in rows if not text and key != "source"]


def test_links_of_pages_exist():
    for page in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("reports/*/*/*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", re.sub(r"(?ms)^```.*?^```", "", page.read_text())):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
