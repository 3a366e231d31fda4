"""Provenance: hashes of code and tables, and the runs that other code has trained."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from projects import copy_project, edit, reduce

from convergence import layout
from convergence.provenance import tables_hash
from convergence.study_file import load_experiment
from diffusion import sources

# The command that trains a study again.
COMMAND = "snakemake --cores all reports/fid_curves.png --config experiments=openmoji --forcerun initialise train"


def test_every_hashed_module_exists():
    for module in sources.MODULES:
        assert list(sources.PACKAGE.glob(f"{module}.py")), module


def test_comments_docstrings_and_whitespace_do_not_change_the_hash():
    plain = 'class A:\n    x = 1\n\n    def f(self, y):\n        return f"{y:.3f}" + "text"\n'
    edited = (
        '"""Module."""\n# Comment\nclass A:\n    """Class."""\n    x = (1)  # comment\n    """Attribute."""\n'
        "    def f(self,\n          y):\n        '''Method.'''\n        return (f'{y:.3f}'\n                + 'text')\n"
    )
    assert sources.normalized(edited) == sources.normalized(plain)
    for old, new in (("1", "2"), ("text", "texts"), (".3f", ".2f"), ("y)", "y=None)"), ("+", "*"), ("x", "z")):
        assert sources.normalized(plain.replace(old, new, 1)) != sources.normalized(plain)


def test_the_hashed_text_does_not_depend_on_the_version_of_python():
    """ast.dump and ast.unparse print this function differently in Python 3.11, 3.12 and 3.13."""
    assert sources.normalized("def f(x):\n    return f'{x}'\n") == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')]), "
        "body=[Return(value=JoinedStr(values=[FormattedValue(value=Name(id='x', ctx=Load()), conversion=-1)]))])])"
    )


def small(study):
    """One seed, twelve images, and no evaluation."""
    study["seeds"], study["evaluate"]["reference_images"] = [0], 12
    study["dataset"] = {"source": "folder", "path": "images", "image_size": study["dataset"]["image_size"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two arms of a reduced study, trained to step 8."""
    project = copy_project(tmp_path_factory.mktemp("trained"))
    (project / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(project / f"images/{index}.png")
    edit(project, reduce)
    edit(project, small)
    train(project, 8)
    return project


def provenance(project, arm, step):
    """The path of a provenance.json, relative to the project."""
    experiment = load_experiment(project / "experiments/openmoji.yaml")
    return layout.step_directory("openmoji", arm, experiment.run(arm), 0, step) / "provenance.json"


def train(project, step):
    targets = [provenance(project, arm, step) for arm in ("uni05", "under05")]
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "tracking=off", "--", *targets]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def reports(project):
    """What `stale_runs` and `changed_tables` return with the code of a project."""
    code = """if True:
        import json, sys
        from pathlib import Path
        from convergence.provenance import changed_tables, stale_runs
        from convergence.study_file import load_experiment
        experiment = load_experiment(Path("experiments/openmoji.yaml"))
        stale = stale_runs(experiment)
        assert "torch" not in sys.modules
        print(json.dumps([stale, changed_tables(experiment)]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def changed(trained, destination, file, old, new):
    """A copy of the trained project in which one file of the code has changed."""
    project = destination / "copy"
    shutil.copytree(trained, project, symlinks=True)
    path = project / file
    text, count = re.subn(old, new, path.read_text(), count=1, flags=re.S)
    assert count == 1
    path.write_text(text)
    return project


def test_runs_record_code_and_tables_and_fresh_ones_are_not_reported(trained):
    experiment = load_experiment(trained / "experiments/openmoji.yaml")
    facts = {arm: json.loads((trained / provenance(trained, arm, 8)).read_text()) for arm in ("uni05", "under05")}
    for arm, content in facts.items():
        assert content["source_hash"] == sources.source_hash() and content["earlier_source_hashes"] == []
        assert content["tables_hash"] == tables_hash(experiment.run(arm))
    assert facts["uni05"]["tables_hash"] != facts["under05"]["tables_hash"]
    assert reports(trained) == [[], []]


def test_an_edited_docstring_or_comment_is_not_reported(trained, tmp_path):
    project = changed(trained, tmp_path, "diffusion/timesteps.py", r'(def p2\(.*?""")', r"\1Edited. ")
    path = project / "diffusion/timesteps.py"
    path.write_text('"""New.\n\nText."""\n# Comment\n\n' + path.read_text().replace("    weight = ", "    weight  =  "))
    assert reports(project) == [[], []]


def test_an_edited_density_is_reported_for_the_arms_that_it_changes(trained, tmp_path):
    project = changed(trained, tmp_path, "diffusion/timesteps.py", r"\*\* -gamma\n", "** -(gamma + 0.01)\n")
    stale, tables = reports(project)
    assert [sentence.partition(":")[0].rpartition("-")[0] for sentence in stale] == [
        "results/openmoji/uni05",
        "results/openmoji/under05",
    ]
    assert all("the code that training uses has changed since" in sentence for sentence in stale)
    assert len(tables) == 1 and tables[0].startswith("results/openmoji/under05-")
    assert "its density or loss weights have changed since" in tables[0]
    assert all(sentence.endswith(f"to train it again, run {COMMAND}") for sentence in stale + tables)
    # The commit that trained is named, also by runs that were trained outside git.
    path = project / provenance(project, "under05", 8)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": "a" * 40, "git_dirty": True}))
    assert f"since commit {'a' * 12} with uncommitted changes (" in reports(project)[0][1]


def test_an_edited_net_changes_no_tables_and_a_mixture_of_code_stays_reported(trained, tmp_path):
    old, new = r"step \+ 1\) / warmup", "step + 1) / (warmup + 1)"
    project = changed(trained, tmp_path, "diffusion/training/state.py", old, new)
    stale, tables = reports(project)
    assert len(stale) == 2 and tables == []
    # The new code trains on: its provenance is the newest of the run.
    edit(project, lambda study: study["checkpoints"].update(until=12))
    train(project, 12)
    content = json.loads((project / provenance(project, "uni05", 12)).read_text())
    assert content["source_hash"] != sources.source_hash()
    assert content["earlier_source_hashes"] == [sources.source_hash()]
    stale, tables = reports(project)
    assert len(stale) == 2 and all("changed during training" in sentence for sentence in stale) and tables == []


def test_a_damaged_provenance_is_left_to_the_job_that_reads_it(trained, tmp_path):
    project = changed(trained, tmp_path, "diffusion/timesteps.py", r"\*\* -gamma\n", "** -(gamma + 0.01)\n")
    path = project / provenance(project, "uni05", 8)
    path.write_text(path.read_text()[:-20])
    assert [sentence.partition("-")[0] for sentence in reports(project)[0]] == ["results/openmoji/under05"]
