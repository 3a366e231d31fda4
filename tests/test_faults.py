"""Faults at any moment, on a whole reduced study: nothing is lost, nothing is used that is not whole."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from projects import assert_equal_results, assert_tracked_once, copy_project, edit, reduce, snakemake

from diffusion.files import replacing

COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--", "reports/fid_curves.png"]
PHASES = {"dataset", "reference", "initialise", "train", "sample", "evaluate", "probe", "figures"}
KILLS = 20
SNAKEMAKE = "snakemake"


def jobs_of(project):
    """Process -> phase of the jobs at work in a project, whoever started them."""
    found = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["cwd"] == str(project) and "/.snakemake/scripts/" in command:
            found[process] = command.split(".")[-2]  # .snakemake/scripts/tmp1a2b.train.py
    return found


def wait_for_jobs(project):
    """Until what a killed Snakemake left at work has ended."""
    psutil.wait_procs(jobs_of(project), timeout=120)


def kill(process):
    """Whether the process was still there to be killed."""
    try:
        process.kill()
        process.wait()
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(finished, tmp_path):
    project = copy_project(tmp_path / "study")
    edit(project, reduce)
    rng, kills, starts = random.Random(0), Counter(), 0
    while kills.total() < KILLS or not set(kills) >= PHASES:
        starts += 1
        assert starts <= 30, kills
        with (project / "run.log").open("a") as log:
            run = subprocess.Popen(COMMAND, cwd=project, stdout=log, stderr=log, start_new_session=True)
        victims = 0
        while run.poll() is None:
            time.sleep(0.05)
            rare = sorted(jobs_of(project).items(), key=lambda item: kills[item[1]])
            if not rare or kills[rare[0][1]] >= 4:
                continue
            time.sleep(rng.uniform(0, 3) * (kills[rare[0][1]] > 0))  # a phase that was not killed yet: at once
            if kill(rare[0][0]):
                kills[rare[0][1]] += 1
                victims += 1
            if victims == 3:  # and Snakemake itself, whose jobs go on without it
                kills[SNAKEMAKE] += kill(psutil.Process(run.pid))
                break
        run.wait()
        assert snakemake(project, "--unlock").returncode == 0
    wait_for_jobs(project)
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{kills.total()} kills in {starts} starts: {dict(kills)}")
    assert_equal_results(project, finished)
    assert_same_states(project, finished)
    assert_tracked_once(project)


def assert_same_states(ours, theirs):
    """The newest states agree in every tensor; when and by whom they were written may differ."""
    for path in theirs.glob("results/openmoji/*/seed*/step8/state.pt"):
        found, expected = (torch.load(root / path.relative_to(theirs), weights_only=True) for root in (ours, theirs))
        for key in ("model", "ema", "optimizer", "step"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_goes_on_where_it_was(finished, tmp_path, how):
    project = copy_project(tmp_path / "study")
    edit(project, reduce)
    for part in ("datasets", "references"):
        shutil.copytree(finished / "results" / part, project / "results" / part)
    run = subprocess.Popen([*COMMAND[:-1], "reports/metrics.csv"], cwd=project, stderr=subprocess.PIPE, text=True)
    while "train" not in jobs_of(project).values():
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    for process in [run, *jobs_of(project)] if how == signal.SIGINT else [run]:  # a terminal sends Ctrl-C to all
        process.send_signal(how)
    _, said = run.communicate(timeout=180)
    assert run.returncode != 0 and "Traceback" not in said, said
    wait_for_jobs(project)
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_results(project, finished)
    assert_tracked_once(project)


@pytest.mark.slow
def test_two_at_once_do_the_work_once(finished, tmp_path):
    project = copy_project(tmp_path / "study")
    edit(project, reduce)
    shutil.copytree(finished / "results/datasets", project / "results/datasets")
    first = subprocess.Popen(COMMAND, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not jobs_of(project):
        assert first.poll() is None
        time.sleep(0.05)
    second = snakemake(project)
    assert second.returncode != 0 and "cannot be locked" in second.stdout + second.stderr
    assert "Traceback" not in second.stdout + second.stderr
    assert first.wait(timeout=600) == 0
    assert_equal_results(project, finished)
    assert_tracked_once(project)


def test_what_a_killed_writer_left_is_gone_after_the_next(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from diffusion.files import replacing
with replacing(Path({str(tmp_path / "a[1].npy")!r})) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root)
    (tmp_path / ".a[1].npy").write_bytes(b"another file")
    assert len(list(tmp_path.iterdir())) == 2 and not (tmp_path / "a[1].npy").exists()
    with replacing(tmp_path / "a[1].npy") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a[1].npy", "a[1].npy"]
    assert (tmp_path / "a[1].npy").read_bytes() == b"whole"
