"""Faults at any moment of a small study: nothing is lost, and no incomplete file is used."""

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
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from projects import REPORT, assert_equal_results, assert_tracked_once, edit, jobs, snakemake, tiny_project

from convergence import terminal
from diffusion.errors import InputError
from diffusion.files import atomic_write, exclusive_lock

COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--", "reports/fid_curves.png"]
PHASES = {"dataset", "reference", "initialise", "train", "trial", "evaluate", "probe", "figures"}
REPEATED = {"train", "trial", "evaluate", "probe"}  # rules with several jobs
TRIALS = str(REPORT / "tuning.csv")
TUNE = {"learning_rate": [1e-3], "seeds": [100], "until": 4}
METRICS = {"target": str(REPORT / "metrics.csv")}  # without figures
MADE = ("results", "reports", ".snakemake", "mlflow.db", "mlartifacts")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smallest study, run from nothing to the figure."""
    project = tiny_project(tmp_path_factory.mktemp("faults") / "finished")
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def begin(finished, destination, *parts):
    """The study with parts of its results, as if it had stopped after them."""
    ignored = shutil.ignore_patterns(*MADE)
    project = Path(shutil.copytree(finished, destination, symlinks=True, ignore=ignored, dirs_exist_ok=True))
    for part in parts:
        shutil.copytree(finished / "results" / part, project / "results" / part)
    return project


def jobs_of(project):
    """Process -> rule of the running jobs of a project, whichever Snakemake started them."""
    found = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["cwd"] == str(project) and "/.snakemake/scripts/" in command:
            found[process] = command.split(".")[-2]  # .snakemake/scripts/tmp1a2b.train.py
    return found


def at_work(project):
    """Process -> rule of the jobs that have opened their log, which they do after their imports.

    The rule of a job that trains a trial is "trial".
    """
    found = {}
    for process, rule in jobs_of(project).items():
        with suppress(psutil.NoSuchProcess):
            if logs := [file.path for file in process.open_files() if file.path.endswith(".log")]:
                found[process] = "trial" if "/seed100/" in logs[0] and rule == "train" else rule
    return found


def wait_for(happened, run):
    """Wait until something happens while Snakemake runs."""
    while not happened():
        assert run.poll() is None
        time.sleep(0.02)


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
def test_kills_in_every_phase_change_nothing(finished, tmp_path):
    project, expected = begin(finished, tmp_path / "study"), tmp_path / "expected"
    shutil.copytree(finished, expected, symlinks=True)
    for study in (project, expected):
        edit(study, lambda content: content.update(tune=TUNE))
    done = snakemake(expected, target=TRIALS)
    assert done.returncode == 0, done.stdout + done.stderr
    rng, kills, starts = random.Random(0), Counter(), 0
    while not kills.keys() >= PHASES or kills["snakemake"] < 2:
        starts += 1
        assert starts <= 20, kills
        with (project / "run.txt").open("a") as log:
            run = subprocess.Popen([*COMMAND, TRIALS], cwd=project, stdout=log, stderr=log, start_new_session=True)
        victims = 0
        while run.poll() is None:
            time.sleep(0.02)
            working = at_work(project)
            started = jobs_of(project) | working
            left = [(process, rule) for process, rule in started.items() if rule in PHASES - kills.keys()]
            new = [(process, rule) for process, rule in left if process in working or rule not in REPEATED]
            for process, rule in new[:1]:
                # If a job of a repeated rule ends before, another one is killed.
                time.sleep(rng.uniform(0, 0.2) * (rule in REPEATED))
                if kill(process):
                    kills[rule] += 1
                    victims += 1
            if victims == 2 and kills["snakemake"] < 2:
                # First alone, so that its jobs continue; then with them, as when the power fails.
                (os.killpg if kills["snakemake"] else os.kill)(run.pid, signal.SIGKILL)
                kills["snakemake"] += 1
                run.wait()
        if run.returncode == -signal.SIGKILL:
            assert snakemake(project, "--unlock").returncode == 0
    wait_for_jobs(project)
    for target in (TRIALS, COMMAND[-1]):
        done = snakemake(project, target=target)
        assert done.returncode == 0, done.stdout + done.stderr
    print(f"{kills.total()} kills in {starts} starts: {dict(kills)}")
    assert_equal_results(project, expected)
    assert (project / TRIALS).read_bytes() == (expected / TRIALS).read_bytes()
    assert_same_states(project, expected)
    assert_tracked_once(project)


def assert_same_states(ours, theirs):
    """The newest states are equal in every tensor; times and provenance may differ."""
    for path in theirs.glob("results/openmoji/*/seed*/step8/state.pt"):
        found, expected = (torch.load(root / path.relative_to(theirs), weights_only=True) for root in (ours, theirs))
        for key in ("model", "ema", "optimizer", "step"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)


@pytest.mark.slow
def test_a_study_that_is_stopped_four_times_repeats_nothing_and_reaches_mlflow_later(finished, tmp_path):
    project = begin(finished, tmp_path / "study", "datasets", "references")
    command = [*COMMAND[:-1], METRICS["target"]]
    unreachable = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # nobody listens there

    def later_segments():  # when they train, Snakemake has recorded that the segments before are complete
        return list(project.glob("results/openmoji/*/seed0/step8/train.log"))

    def evaluates():
        return "evaluate" in at_work(project).values()

    def starts():  # before the first line of a script, which Snakemake writes
        return jobs_of(project)

    moments = [(signal.SIGHUP, later_segments), *((signal.SIGINT, moment) for moment in (starts, evaluates))]
    for how, moment in (*moments, (signal.SIGTERM, evaluates)):
        run = subprocess.Popen(command, cwd=project, env=unreachable, stderr=subprocess.PIPE, text=True)
        wait_for(moment, run)
        # Ctrl-C and a closed terminal reach all processes.
        for process in [*jobs_of(project), run] if how != signal.SIGTERM else [run]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        _, output = run.communicate(timeout=180)
        assert run.returncode != 0
        assert "Traceback" not in output and "WorkflowError" not in output, output
        assert output.rstrip().splitlines()[-1] == terminal.STOPPED
        wait_for_jobs(project)
        if how == signal.SIGHUP:
            first = later_segments()[0].parents[1] / "step4/provenance.json"
            trained = first.stat().st_mtime_ns
            shutil.rmtree(project / "results/datasets")

    # Of two calls at once, one does the work.
    with (project / "run.txt").open("w") as log:
        run = subprocess.Popen(COMMAND, cwd=project, stdout=log, stderr=log)
    wait_for(lambda: jobs_of(project), run)
    second = snakemake(project)
    assert second.returncode != 0 and "cannot be locked" in second.stdout + second.stderr
    assert "Traceback" not in second.stdout + second.stderr
    assert run.wait(timeout=600) == 0, (project / "run.txt").read_text()
    assert first.stat().st_mtime_ns == trained
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

    def step(arm, step):
        return next(project.glob(f"results/openmoji/{arm}-*/seed0")) / f"step{step}"

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    images = next(project.glob("results/datasets/*/images.npy"))
    damaged = {
        step("uni05", 4) / "weights.safetensors": truncate,
        step("uni05", 8) / "weights.safetensors": flip,
        step("under05", 4) / "provenance.json": truncate,
        step("under05", 8) / "state.pt": truncate,
        next(project.glob("results/references/*.npz")): flip,
    }
    for path, damage in damaged.items():
        damage(path)
    assert_named(snakemake(project, "--config", "tracking=off", **METRICS), damaged)
    for path in damaged:
        path.unlink()
    flip(images)
    assert_named(snakemake(project, "--config", "tracking=off", **METRICS), [images])
    images.unlink()
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(project, finished)
    before = pd.read_csv(finished / "reports/openmoji/metrics.csv").drop(columns="contended_seconds")
    after = pd.read_csv(project / "reports/openmoji/metrics.csv").drop(columns="contended_seconds")
    pd.testing.assert_frame_equal(after[after["step"] < 12].reset_index(drop=True), before)


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
    project = begin(finished, tmp_path / "study", "datasets", "references")
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output, output
    assert re.search(r"No space left on device: free space .* run the same command again", output)
    small_disk("remount,size=400m,ro")
    done = snakemake(project, "--config", "tracking=off", **METRICS)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Read-only file system: correct" in output and "Traceback" not in output, output
    assert not (project / "mlflow.db").exists()
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
    wait_for(lambda: list(project.glob("results/openmoji/*/seed0/step4/weights.safetensors")), run)
    psutil.Process(run.pid).children()[0].terminate()  # Snakemake, and not faketime; running jobs end
    assert run.wait(timeout=180) != 0
    ahead = [path for path in project.glob("results/openmoji/*/seed*/step*/*") if path.stat().st_mtime > time.time()]
    assert {"weights.safetensors", "state.pt"} <= {path.name for path in ahead}
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_results(project, finished)
    assert_tracked_once(project)
    assert not jobs(project, "reports/fid_curves.png")


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
