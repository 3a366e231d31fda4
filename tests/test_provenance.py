"""Provenance: hashes of code and tables, and the runs that other code has trained."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from projects import TINY_MODEL, copy_project, edit, reduce, write_pictures

from convergence import layout
from convergence.analysis.verdict import read_verdict
from convergence.errors import with_remedy
from convergence.provenance import check_images, tables_hash, trained_on
from convergence.study_file import load_experiment
from diffusion import config, sources
from diffusion import section as section_module
from diffusion.errors import FileError

# The command that trains a study again.
COMMAND = "snakemake --cores all reports/fid_curves.png --config experiments=openmoji --forcerun initialise train"


def test_every_hashed_module_exists():
    for module in sources.MODULES:
        assert list(sources.PACKAGE.glob(f"{module}.py")), module


def test_every_module_that_training_imports_is_hashed():
    """Or it is listed here, because training computes nothing with it apart from the parts in `PARTS`."""
    code = "import sys, diffusion.training.segment; print(*(m for m in sys.modules if m.startswith('diffusion.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=layout.ROOT, capture_output=True, text=True, check=True)
    hashed = {path for module in sources.MODULES for path in sources.PACKAGE.glob(f"{module}.py")}
    paths = {name: sources.PACKAGE.parent / f"{name.replace('.', '/')}.py" for name in done.stdout.split()}
    others = {name.removeprefix("diffusion.") for name, path in paths.items() if path.exists() and path not in hashed}
    unhashed = {"checkpoints", "config", "errors", "files", "prefetch", "progress", "sampling", "section", "sources"}
    assert others == unhashed


def test_every_property_of_the_settings_that_training_reads_is_hashed():
    read = {
        f"{section.__name__}.{name}"
        for module in (config, section_module)
        for section in vars(module).values()
        if isinstance(section, type) and section.__module__ == module.__name__
        for name, value in vars(section).items()
        if isinstance(value, property) and not name.startswith("_")
    }
    parts = {name for names in sources.PARTS.values() for name in names}
    assert read - {"Section.hash8", "RunConfig.initial", "Sample.calls"} == parts - {"GROUP_NORM_GROUPS"}


def hash_after(destination, monkeypatch, file="", old="", new=""):
    """The source hash of a copy of the package in which one file has changed."""
    package = destination / file.replace("/", "_") / str(len(new))
    shutil.copytree(sources.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if file:
        text = (package / file).read_text()
        assert text.count(old) == 1
        (package / file).write_text(text.replace(old, new))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "PACKAGE", package)
        return sources.source_hash.__wrapped__()


EDITS = [
    ("config.py", "GROUP_NORM_GROUPS = 32", "GROUP_NORM_GROUPS = 16"),
    ("config.py", "return self.timesteps.learned if", "return not self.timesteps.learned if"),
    ("config.py", "return self.loss_second_moment is not None", "return self.p2 is not None"),
    ("section.py", "getattr(self, name).model_dump()", "{}"),
    ("training/segment.py", "split(len(images), run.dataset.held_out)", "split(len(images), 0)"),
    ("build.py", "(diffusion.timesteps)", "(diffusion.timesteps + 1)"),
]


@pytest.mark.parametrize(("file", "old", "new"), EDITS, ids=[f"{file} {new}" for file, _, new in EDITS])
def test_an_edit_of_what_training_computes_changes_the_hash(tmp_path, monkeypatch, file, old, new):
    assert hash_after(tmp_path, monkeypatch, file, old, new) != sources.source_hash()


def test_a_new_key_or_message_of_the_settings_does_not_change_the_hash(tmp_path, monkeypatch):
    key = '    """Decay per step of the exponential'
    for old, new in (
        (key, '    """Text."""\n    another: int = 0\n' + key),
        ("does not divide batch_size", "is no divisor of batch_size"),
        ("TRAIN_VERSION = 2", "TRAIN_VERSION = 3"),
    ):
        assert hash_after(tmp_path, monkeypatch, "config.py", old, new) == sources.source_hash()


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
        from convergence.provenance import changed_tables, newest_provenances, stale_runs
        from convergence.study_file import load_experiment
        experiment = load_experiment(Path("experiments/openmoji.yaml"))
        newest = newest_provenances(experiment)
        stale = stale_runs("openmoji", newest)
        assert "torch" not in sys.modules
        runs = {arm: experiment.run(arm) for arm in experiment.arms}
        print(json.dumps([stale, changed_tables("openmoji", newest, runs)]))
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
    # One sentence for all arms, with one command.
    (stale,), (tables,) = stale, tables
    date = r"\d{4}-\d\d-\d\dT[^,]+"
    assert re.fullmatch(
        rf"results/openmoji: the code that training uses has changed since the training of "
        rf"uni05 \((commit .*, )?{date}\), under05 \((commit .*, )?{date}\): to train the study again, run {COMMAND}",
        stale,
    )
    assert re.fullmatch(
        rf"results/openmoji: the density or the loss weights have changed since the training of "
        rf"under05 \((commit .*, )?{date}\): to train the study again, run {COMMAND}",
        tables,
    )
    # The commit that trained is named, also by runs that were trained outside git.
    path = project / provenance(project, "under05", 8)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": "a" * 40, "git_dirty": True}))
    assert f"under05 (commit {'a' * 12} with uncommitted changes, 20" in reports(project)[0][0]


def test_changed_tables_are_reported_though_the_hashed_code_is_the_same(trained, tmp_path):
    """For instance after an update of torch."""
    project = changed(trained, tmp_path, "diffusion/sources.py", r"return hashlib.*?\[:16\]", "return 'same'")
    for arm in ("uni05", "under05"):
        path = project / provenance(project, arm, 8)
        content = json.loads(path.read_text()) | {"source_hash": "same"}
        path.write_text(json.dumps(content | ({"tables_hash": "0"} if arm == "uni05" else {})))
    stale, (tables,) = reports(project)
    assert stale == [] and "have changed since the training of uni05 (" in tables and "under05" not in tables


def test_an_edited_net_changes_no_tables_and_a_mixture_of_code_stays_reported(trained, tmp_path):
    old, new = r"step \+ 1\) / warmup", "step + 1) / (warmup + 1)"
    project = changed(trained, tmp_path, "diffusion/training/state.py", old, new)
    stale, tables = reports(project)
    assert len(stale) == 1 and "has changed since the training of uni05 (" in stale[0] and tables == []
    # The new code trains on: its provenance is the newest of the run.
    edit(project, lambda study: study["checkpoints"].update(until=12))
    train(project, 12)
    content = json.loads((project / provenance(project, "uni05", 12)).read_text())
    assert content["source_hash"] != sources.source_hash()
    assert content["earlier_source_hashes"] == [sources.source_hash()]
    stale, tables = reports(project)
    assert len(stale) == 1 and tables == []
    assert re.search(r"code .* changed during the training of uni05 \([^)]*\), under05 \([^)]*\): to train", stale[0])
    # The two problems are in one sentence.
    path = project / provenance(project, "under05", 12)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source_hash": "0"}))
    (sentence,) = reports(project)[0]
    assert re.search(r"during the training of uni05 \([^)]*\); .* since the training of under05 \(", sentence)


def test_a_damaged_provenance_is_left_to_the_job_that_reads_it(trained, tmp_path):
    project = changed(trained, tmp_path, "diffusion/timesteps.py", r"\*\* -gamma\n", "** -(gamma + 0.01)\n")
    path = project / provenance(project, "uni05", 8)
    path.write_text(path.read_text()[:-20])
    (sentence,) = reports(project)[0]
    assert "under05 (" in sentence and "uni05" not in sentence


def git(repository, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", repository, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(path, message="one"):
    """A new repository with one commit of all files in a directory; returns the commit."""
    git(path, "init", "--quiet")
    git(path, "add", "--all")
    git(path, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(path, "rev-parse", "HEAD")


def state_of(project, **environment):
    """The commit that a job in this project records, and whether files differ from it."""
    code = "import json; from convergence.provenance import environment; print(json.dumps(environment()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    return facts["git_commit"], facts["git_dirty"]


def test_the_commit_is_that_of_the_repository_that_contains_the_code(tmp_path):
    """Not that of a repository in which the project was only unpacked."""
    outer = tmp_path / "outer"
    project = outer / "project"
    project.mkdir(parents=True)
    for part in ("convergence", "diffusion"):
        shutil.copytree(layout.ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    assert state_of(project) == (None, None)
    (outer / ".gitignore").write_text("project\n__pycache__\n")
    other = repository(outer)
    assert state_of(project) == (None, None)

    (outer / ".gitignore").write_text("__pycache__\n")
    git(outer, "add", "--all")
    assert state_of(project) == (None, None)  # the commit does not contain it yet
    git(outer, "commit", "--quiet", "--message", "two")
    (outer / ".gitignore").write_text("")  # outside the project
    assert state_of(project) == (git(outer, "rev-parse", "HEAD"), False) != (other, False)

    own = repository(project)
    assert state_of(project) == state_of(project, GIT_DIR=str(outer / ".git")) == (own, False)
    (project / "results").mkdir()
    (project / "results/new.py").write_text("new\n")
    assert state_of(project) == (own, False)
    with (project / "diffusion/config.py").open("a") as file:
        file.write("# edited\n")
    assert state_of(project) == (own, True)


@pytest.mark.slow
def test_what_changes_while_a_study_runs_is_not_used(tmp_path, monkeypatch):
    """Neither a commit, nor an edit of the code or of the study file. Nor does `--cores` change a result."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to other tests
    project = copy_project(tmp_path / "project")
    write_pictures(project)
    content = {
        "name": "tiny",
        "dataset": {"source": "folder", "path": "pictures", "image_size": 16},
        "model": TINY_MODEL,
        "train": {"batch_size": 8, "log_every": 1, "threads": 2},
        "checkpoints": [20],
        "seeds": [0],
        "arms": {"a": {}},
        "sample": {"images": 8, "steps": 2},
        "evaluate": {"features": ["efficientnet-lite0"], "metrics": ["fd", "kid"]},
        "probe": {"images": 8, "batch_size": 4, "bins": 2},
    }
    study = project / "experiments/tiny.yaml"
    study.write_text(text := "# As it ran\n" + yaml.safe_dump(content, sort_keys=False))
    commit = repository(project)
    configuration = ["--config", "experiments=tiny"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *configuration, "--", "all"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while run.poll() is None and not list(project.glob("results/tiny/a-*/seed0/log.csv")):
            time.sleep(0.01)
        trainers = psutil.Process(run.pid).children(recursive=True)
        for trainer in trainers:
            trainer.suspend()
        study.write_text("edited: [\n")
        with (project / "diffusion/timesteps.py").open("a") as file:
            file.write("\n\ndef unused():\n    return 1\n")
        git(project, "commit", "--quiet", "--all", "--message", "two")
        directory = next(project.glob("results/tiny/a-*/seed0/step20"))
        assert not (directory / "provenance.json").exists()
        for trainer in trainers:
            trainer.resume()
        output = run.communicate()[0]
    assert run.returncode == 0, output

    facts = json.loads((directory / "provenance.json").read_text())
    assert (facts["git_commit"], facts["git_dirty"], facts["source_hash"]) == (commit, False, sources.source_hash())
    warnings = read_verdict(project / "reports/tiny/verdict.json").warnings
    (warning,) = [warning for warning in warnings if "has changed since" in warning]
    assert f"has changed since the training of a (commit {commit[:12]}, 20" in warning
    assert output.count(f"Warning: {warning}") == 1  # there were no results at the start
    (artifact,) = project.glob("mlartifacts/tiny/**/tiny.yaml")
    assert artifact.read_text() == (project / "results/studies/tiny.yaml").read_text() == text
    assert text in (project / "reports/tiny/pages/provenance.html").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "convergence", "sync", "tiny"], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    study.write_text(text)
    tables = [directory / name for name in ("metrics.csv", "probe.csv")]
    before = [table.read_bytes() for table in tables]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *configuration, "tracking=off",
         "--forcerun", "reference", "evaluate", "probe", "--", *(path.relative_to(project) for path in tables)],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [table.read_bytes() for table in tables] == before


@pytest.mark.parametrize(
    ("provenance", "manifest", "expected"),
    [
        ({"dataset_sha256": "a"}, {"sha256": "a", "versions": {}}, True),
        ({"dataset_sha256": "a"}, {"sha256": "b"}, False),
        ({}, {"sha256": "b"}, None),  # trained before this was recorded
        ({"dataset_sha256": "a"}, {}, None),
        (None, {"sha256": "a"}, None),
        ({"dataset_sha256": "a"}, None, None),
    ],
)
def test_a_checkpoint_is_not_used_with_other_images(tmp_path, monkeypatch, provenance, manifest, expected):
    monkeypatch.chdir(tmp_path)
    checkpoint, dataset = layout.RESULTS / "mine/a/seed0/step4", layout.DATASETS / "folder"
    for path, content in ((checkpoint / "provenance.json", provenance), (dataset / "manifest.json", manifest)):
        path.parent.mkdir(parents=True)
        if content is not None:
            path.write_text(json.dumps(content))
    assert trained_on(checkpoint / "provenance.json", dataset / "manifest.json") is expected
    with nullcontext() if expected is not False else pytest.raises(FileError) as error:
        check_images(checkpoint, dataset / "manifest.json")
    assert error is None or with_remedy(error.value) == (
        "results/mine/a/seed0: has checkpoints that were trained on other images than those in "
        "results/datasets/folder: delete it and run the same command again"
    )
