"""Faults at any moment of a reduced study: nothing is lost, and no incomplete file is used."""

import errno
import fcntl
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from projects import REPORT, assert_equal_results, assert_tracked_once, copy_project, edit, jobs, reduce, snakemake

from convergence import terminal
from diffusion.errors import InputError
from diffusion.files import atomic_write, exclusive_lock

COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--", "reports/fid_curves.png"]
PHASES = {"dataset", "reference", "initialise", "train", "evaluate", "probe", "figures"}
KILLS = 20
SNAKEMAKE = "snakemake"
METRICS = {"target": str(REPORT / "metrics.csv")}  # without figures


def jobs_of(project):
    """Process -> rule of the running jobs of a project, whichever Snakemake started them."""
    found = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["cwd"] == str(project) and "/.snakemake/scripts/" in command:
            found[process] = command.split(".")[-2]  # .snakemake/scripts/tmp1a2b.train.py
    return found


def wait_for_jobs(project):
    """Wait until the jobs that a killed Snakemake left running have ended."""
    psutil.wait_procs(jobs_of(project), timeout=120)


def kill(process):
    """Kill a process; returns whether it was still running."""
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
            if not rare or kills[rare[0][1]] == 2:
                continue
            time.sleep(rng.uniform(0, 4) * (kills[rare[0][1]] > 0))  # a rule of which no job was killed yet: at once
            if kill(rare[0][0]):
                kills[rare[0][1]] += 1
                victims += 1
            if victims == 3:  # and Snakemake itself, whose jobs continue without it
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
    """The newest states are equal in every tensor; times and provenance may differ."""
    for path in theirs.glob("results/openmoji/*/seed*/step8/state.pt"):
        found, expected = (torch.load(root / path.relative_to(theirs), weights_only=True) for root in (ours, theirs))
        for key in ("model", "ema", "optimizer", "step"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)


def start(project, target=METRICS["target"], **environment):
    """Start Snakemake in the background."""
    command = [*COMMAND[:-1], target]
    return subprocess.Popen(command, cwd=project, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def begin(finished, destination, *parts):
    """The reduced study with parts of its results, as if it had stopped after them."""
    project = copy_project(destination)
    edit(project, reduce)
    for part in parts:
        shutil.copytree(finished / "results" / part, project / "results" / part)
    return project


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_resumes_and_reaches_mlflow_later(finished, tmp_path, how):
    project = begin(finished, tmp_path / "study", "datasets", "references")
    run = start(project, MLFLOW_TRACKING_URI="http://127.0.0.1:9")  # nobody listens there
    finished_steps = []
    while len(finished_steps) < 3:
        assert run.poll() is None
        time.sleep(0.05)
        finished_steps = list(project.glob("results/openmoji/*/seed*/step4/provenance.json"))
    # With two jobs at a time, Snakemake has recorded that the first one is complete.
    first = min(finished_steps, key=lambda path: path.stat().st_mtime_ns)
    trained = first.stat().st_mtime_ns
    shutil.rmtree(project / "results/datasets")
    # Ctrl-C and a closed terminal reach all processes.
    for process in [*jobs_of(project), run] if how != signal.SIGTERM else [run]:
        process.send_signal(how)
    _, output = run.communicate(timeout=180)
    assert run.returncode != 0
    assert "Traceback" not in output and "WorkflowError" not in output, output
    assert output.rstrip().splitlines()[-1] == terminal.STOPPED
    wait_for_jobs(project)
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert trained == first.stat().st_mtime_ns
    assert_equal_results(project, finished)
    assert_tracked_once(project)


@pytest.mark.slow
def test_a_failed_job_is_reported_once(finished, tmp_path):
    project = begin(finished, tmp_path / "study", "datasets", "references")
    run = next(finished.glob("results/openmoji/uni05-*")).name
    seed = project / f"results/openmoji/{run}/seed0"
    with exclusive_lock(seed):
        done = snakemake(project, "--config", "tracking=off", target=str(seed.relative_to(project) / "step4/state.pt"))
    assert done.returncode == 1 and done.stderr.count("seed0: another process is training this run (process ") == 1
    for word in ("Traceback", "CalledProcessError", "WorkflowError", "Error in rule"):
        assert word not in done.stderr


@pytest.mark.slow
def test_damaged_files_are_named_never_used_and_made_again(finished, tmp_path):
    project = tmp_path / "study"
    shutil.copytree(finished, project, symlinks=True)
    edit(project, lambda study: study["checkpoints"].update(until=12))

    def step(arm, seed, step=8):
        return next(project.glob(f"results/openmoji/{arm}-*/seed{seed}")) / f"step{step}"

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    damaged = {
        step("uni05", 0) / "weights.safetensors": truncate,
        step("uni05", 1) / "weights.safetensors": flip,
        step("under05", 0) / "provenance.json": truncate,
        step("under05", 1) / "state.pt": truncate,
    }
    for path, damage in damaged.items():
        damage(path)
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    assert_named(done, damaged)
    for path in damaged:
        path.unlink()
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(project, finished)
    before = pd.read_csv(finished / "reports/openmoji/metrics.csv").drop(columns="contended_seconds")
    after = pd.read_csv(project / "reports/openmoji/metrics.csv").drop(columns="contended_seconds")
    pd.testing.assert_frame_equal(after[after["step"] < 12].reset_index(drop=True), before)

    # The files that all runs share: the reference and the images.
    reference = next(project.glob("results/references/*.npz"))
    flip(reference)
    assert_named(snakemake(project, "--config", "tracking=off", **METRICS), [reference])
    reference.unlink()
    images = next(project.glob("results/datasets/*/images.npy"))
    flip(images)
    needs_images = str(reference.relative_to(project))
    assert_named(snakemake(project, "--config", "tracking=off", target=needs_images), [images])
    images.unlink()
    for target in (needs_images, METRICS["target"]):
        done = snakemake(project, "--config", "tracking=off", target=target)
        assert done.returncode == 0 and not re.search(r"^Job \d+: (Train|Probe)", done.stderr, re.M), done.stderr


def assert_named(done, paths):
    """The call failed, with a sentence for each path that says what to do."""
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output, output
    for path in paths:
        place = str(Path(*path.parts[path.parts.index("results") :]))
        assert [line for line in output.splitlines() if place in line and "delete it and" in line], (place, output)


def assert_same_weights(ours, theirs):
    """Weights that were deleted are either still missing, because no job needs them, or equal."""
    for path in theirs.glob("results/openmoji/*/seed*/step*/weights.safetensors"):
        found = ours / path.relative_to(theirs)
        assert not found.exists() or found.read_bytes() == path.read_bytes(), path


@pytest.fixture
def small_disk(tmp_path):
    """A directory on its own small file system, and a function that mounts it again with other options."""
    place = tmp_path / "study/results"
    place.mkdir(parents=True)

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True, capture_output=True)

    try:
        mount("size=9m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a file system ({error})")
    yield mount
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_are_reported_and_nothing_is_lost(finished, tmp_path, small_disk):
    project = copy_project(tmp_path / "study")
    edit(project, reduce)
    for part in ("datasets", "references"):
        shutil.copytree(finished / "results" / part, project / "results" / part)
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output, output
    assert re.search(r"No space left on device: free space .* run the same command again", output)
    small_disk("remount,size=400m,ro")
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Read-only file system: correct" in output and "Traceback" not in output, output
    small_disk("remount,rw")
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_results(project, finished)


def path_without(program, place):
    """PATH without a program: its folder is replaced by one with links to the other programs."""
    folders = []
    for index, folder in enumerate(os.environ["PATH"].split(os.pathsep)):
        if (Path(folder) / program).exists():
            links = place / f"bin{index}"
            links.mkdir()
            for other in Path(folder).iterdir():
                if other.name != program:
                    (links / other.name).symlink_to(other)
            folder = str(links)
        folders.append(folder)
    return os.pathsep.join(folders)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs the package faketime")
def test_a_clock_that_jumps_back_a_day_changes_nothing(finished, tmp_path):
    project = begin(finished, tmp_path / "study", "datasets", "references")
    tomorrow = ["faketime", "-f", "+1d", *COMMAND[:-1], METRICS["target"]]
    # Python cannot sleep under faketime, and Snakemake's plugin for SLURM may have to, while it asks scontrol.
    environment = os.environ | {"DONT_FAKE_MONOTONIC": "1", "PATH": path_without("scontrol", tmp_path)}
    run = subprocess.Popen(tomorrow, cwd=project, env=environment)
    while not list(project.glob("results/openmoji/uni05-*/seed*/step4/weights.safetensors")):
        assert run.poll() is None
        time.sleep(0.05)
    psutil.Process(run.pid).children()[0].terminate()  # Snakemake, and not faketime; running jobs end
    assert run.wait(timeout=180) != 0
    ahead = [path for path in project.glob("results/openmoji/*/seed*/step*/*") if path.stat().st_mtime > time.time()]
    assert {"weights.safetensors", "state.pt"} <= {path.name for path in ahead}
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_results(project, finished)
    assert_tracked_once(project)
    assert not jobs(project, "reports/fid_curves.png")


@pytest.mark.slow
def test_two_at_once_do_the_work_once(finished, tmp_path):
    project = begin(finished, tmp_path / "study", "datasets")
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


def test_a_file_is_on_the_disk_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    calls = []

    def recorded(name, function, describe):
        def call(*arguments):
            calls.append((name, describe(arguments[0])))
            return function(*arguments)

        monkeypatch.setattr(os, name, call)

    recorded("fsync", os.fsync, lambda descriptor: Path(f"/proc/self/fd/{descriptor}").resolve())
    recorded("replace", os.replace, Path)
    with atomic_write(tmp_path / "table.csv") as file:
        file.write(b"a\n")
    temporary = tmp_path / f".table.csv.{os.getpid()}"
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", tmp_path)]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from diffusion.files import atomic_write
with atomic_write(Path({str(tmp_path / "a[1].npy")!r})) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root)
    (tmp_path / ".a[1].npy").write_bytes(b"another file")
    assert len(list(tmp_path.iterdir())) == 2 and not (tmp_path / "a[1].npy").exists()
    with atomic_write(tmp_path / "a[1].npy") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a[1].npy", "a[1].npy"]
    assert (tmp_path / "a[1].npy").read_bytes() == b"whole"


def test_a_second_trainer_of_a_run_names_the_first(tmp_path):
    holder = rf"process {os.getpid()} on {re.escape(platform.node())}"
    for _ in range(2):  # the file remains
        with (
            exclusive_lock(tmp_path),
            pytest.raises(InputError, match=rf"another process is training this run \({holder}\): .* delete .*\.lock$"),
            exclusive_lock(tmp_path),
        ):
            pass


@pytest.mark.parametrize("content", ["", "process 1 on another machine\n"])
def test_the_lock_file_of_a_killed_trainer_does_not_block(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with exclusive_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_file_system_that_cannot_lock_is_reported_in_a_sentence(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        pytest.raises(InputError, match=rf"\.lock: the file system cannot lock files \({os.strerror(code)}\): move"),
        exclusive_lock(tmp_path),
    ):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    with exclusive_lock(tmp_path):
        assert "has no locks" in caplog.text
