"""The wheel: what it contains, and that it works without Snakemake, MLflow and the analysis packages."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from projects import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PARTS = ["pyproject.toml", "README.md", "LICENSE", "diffusion", "convergence", "workflow", "tests", "benchmarks"]
REFUSE = """
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec


class Refuse(Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            return ModuleSpec(name, self, origin="refused")

    def exec_module(self, module):
        raise ModuleNotFoundError(f"No module named '{{module.__name__}}'", name=module.__name__)


sys.meta_path.insert(0, Refuse())
"""


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def modules_of(distributions):
    """Top-level modules of these distributions."""
    owners = packages_distributions().items()
    return {module for module, found in owners if distributions & set(map(canonicalize_name, found))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files next to the sources, which later builds would include."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installation(wheel, tmp_path_factory):
    """The wheel alone in a folder."""
    target = tmp_path_factory.mktemp("installation")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def library(installation, tmp_path):
    """Runs a command in an empty folder, where only what `pip install .` installs can be imported."""
    refused = modules_of(names(EXTRAS["study"])) - modules_of(names(PROJECT["dependencies"]))
    assert {"snakemake", "mlflow", "pandas", "matplotlib", "scipy", "yaml"} <= refused
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(REFUSE.format(names=refused))
    (tmp_path / "empty").mkdir()
    path = os.pathsep.join([str(tmp_path / "hook"), str(installation)])

    def run(*command):
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path / "empty", env=os.environ | {"PYTHONPATH": path},
            capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_the_wheel_contains_the_two_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in files if name.endswith("METADATA"))
    assert {name.partition("/")[0] for name in files} == {
        "convergence", "diffusion", f"convergence-{PROJECT['version']}.dist-info"
    }  # fmt: skip
    assert {"convergence/py.typed", "diffusion/py.typed"} <= set(files)
    sources = {
        str(path.relative_to(ROOT)) for part in ("convergence", "diffusion") for path in (ROOT / part).rglob("*.py")
    }
    assert {name for name in files if name.endswith(".py")} == sources
    assert "Provides-Extra: study" in metadata and "License-Expression: MIT" in metadata


def test_the_notebook_lines_of_the_readme_run_without_the_study_packages(library):
    (lines,) = re.findall(r"^## (?:\d+\. )?In a notebook\n(?:(?!^#)[\s\S])*?```python\n([\s\S]*?)```", readme(), re.M)
    assert "pip" not in lines and 8 <= len(lines.strip().splitlines()) <= 20
    check = "\nimport diffusion\nprint(diffusion.__file__, tuple(images.shape), images.isfinite().all().item())"
    done = library(sys.executable, "-c", lines + check)
    assert done.returncode == 0, done.stderr
    file, rest = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert Path(file).parents[1].name.startswith("installation") and re.fullmatch(r"\(\d+, 3, \d+, \d+\) True", rest)


def readme():
    return (ROOT / "README.md").read_text()


def test_the_study_packages_are_refused_there(library):
    done = library(sys.executable, "-c", "import convergence.tables")
    assert done.returncode == 1 and "No module named 'pandas'" in done.stderr


def test_the_command_is_installed(library, installation):
    done = library(installation / "bin/convergence", "--help")
    assert done.returncode == 0 and "budget" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [["budget", "openmoji"], ["plan", "metrics.csv"], ["judge", "a.csv"], ["orphans"], ["carry", "pack", "openmoji"],
     ["sync", "openmoji"]],
    ids=" ".join,
)  # fmt: skip
def test_a_subcommand_of_studies_names_the_pip_line(library, installation, arguments):
    done = library(installation / "bin/convergence", *arguments)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "pip install '.[study]'" in done.stderr


def test_evaluate_names_the_package_that_it_needs(library, installation, tmp_path):
    np.save(tmp_path / "empty/a.npy", np.zeros((4, 8, 8, 3), np.uint8))
    done = library(installation / "bin/convergence", "evaluate", "a.npy", "a.npy")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "pip install" in done.stderr


def test_sample_and_export_need_the_library_alone(library, installation, tmp_path):
    code = """if True:
        from pathlib import Path
        from diffusion.build import build
        from diffusion.checkpoints import save_weights
        from diffusion.config import Diffusion, Initial, Model, OpenMoji
        model = Model(channels=32, channel_mult=(1, 1), res_blocks=1, attention_resolutions=(), head_channels=32)
        dataset = OpenMoji(source="openmoji", image_size=16)
        config = Initial(dataset=dataset, model=model, diffusion=Diffusion(), train_version=1)
        weights = build(config)[0].state_dict()
        save_weights(Path("weights.safetensors"), weights, config, seed=0, step=0, diverged=False)
    """
    assert library(sys.executable, "-c", code).returncode == 0
    done = library(installation / "bin/convergence", "export", "weights.safetensors", "model.pt")
    assert done.returncode == 0, done.stderr
    for file, *options in (["weights.safetensors"], ["model.pt", "--image-size", "16", "--head-channels", "32"]):
        out = ["--out", file.partition(".")[0], "--images", "2", "--steps", "2", "--device", "cpu"]
        done = library(installation / "bin/convergence", "sample", file, *out, *options)
        assert done.returncode == 0, done.stderr
    ours, theirs = (np.load(tmp_path / f"empty/{name}/samples.npy") for name in ("weights", "model"))
    assert ours.shape == (2, 16, 16, 3) and ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)


def test_the_lists_of_requirements_agree():
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in pin for pin in pins)
    wanted = PROJECT["dependencies"] + EXTRAS["study"] + EXTRAS["dev"]
    assert names(wanted) == names(pins) and names(EXTRAS["huggingface"]) <= names(EXTRAS["dev"])
    pinned = {canonicalize_name(pin.split("==")[0]): Version(pin.split("==")[1]) for pin in pins}
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict)) == pins


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert re.search(rf"^## {re.escape(PROJECT['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
