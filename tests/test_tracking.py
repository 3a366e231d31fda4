"""Tracking against a real SQLite store, files as training leaves them, and processes killed for real."""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from convergence import answers, layout, study_file
from convergence.tracking import content, follow

ROOT = Path(__file__).parents[1]
STUDY = """
name: toy
dataset: {source: openmoji, image_size: 16}
model: {channels: 32, channel_mult: [1, 2], attention_resolutions: [8], head_channels: 32}
train: {batch_size: 10}
checkpoints: [0, 100, 200]
seeds: [0]
arms:
  uniform: {}
  uni05: {mse_weight: {p2: {gamma: 0.5, k: 1}}}
  matched05: {timesteps: {p2: {gamma: 0.5, k: 1}}, match: uni05}
"""
LOG_COLUMNS = ["step", "images", "seconds", "loss", "mse", "vb", "loss_q0", "grad_norm", "images_per_second"]
METRIC_COLUMNS = [
    *("study", "arm", "seed", "step", "images", "seconds"),
    *("features", "metric", "value", "stderr", "n", "reason"),
]


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(STUDY)
    return study_file.load_experiment(Path("toy.yaml"))


@pytest.fixture
def processes():
    """Whatever a test starts is killed at its end."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def directory(study, step, arm="uniform"):
    path = layout.step_directory("toy", arm, study.run(arm), 0, step)
    path.mkdir(parents=True, exist_ok=True)
    return path


def log_row(step, **cells):
    row = dict.fromkeys(LOG_COLUMNS, 1 / step) | {
        "step": step,
        "images": 10 * step,
        "images_per_second": 50.0,
    }
    return ",".join(str(value) for value in (row | cells).values()) + "\n"


def write_log(path, steps):
    (path / "log.csv").write_text(",".join(LOG_COLUMNS) + "\n" + "".join(log_row(step) for step in steps))


def write_checkpoint(path, step, fd, diverged=None):
    row = ["toy", "uniform", 0, step, 10 * step, 1.5, "efficientnet-lite0", "fd", fd, "", 500, ""]
    with (path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([METRIC_COLUMNS, row])
    Image.fromarray(np.full((8, 16, 3), step % 256, np.uint8)).save(path / "preview.png")
    facts = {"step": step, "diverged": diverged, "git_commit": "abc", "git_dirty": True, "host": "here"}
    (path / "provenance.json").write_text(json.dumps(facts | {"versions": {"torch": "2.9"}}))


def start(command, uri=None):
    """`python -m workflow.tracking` as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    arguments = [sys.executable, "-m", "convergence.tracking.follow", command, "--uri", uri or store(), "toy.yaml"]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def sync(study):
    follow.follow(store(), {Path("toy.yaml"): study}, stopped=lambda: True)


def store():
    """Absolute, for mlflow keeps one engine per address in a process."""
    return f"sqlite:///{Path.cwd()}/mlflow.db"


def client():
    from mlflow import MlflowClient

    return MlflowClient(store())


def runs():
    """Name -> run, as the store has them."""
    experiment = client().get_experiment_by_name("toy")
    return {run.info.run_name: run for run in client().search_runs([experiment.experiment_id])}


def statuses():
    """Name -> status, by a look into the database that cannot disturb its making."""
    with contextlib.closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as database:
        return dict(database.execute("select name, status from runs"))


def count(metric):
    with contextlib.closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as database:
        return database.execute("select count(*) from metrics where key = ?", [metric]).fetchone()[0]


def steps_of(run, metric="train/loss"):
    return [point.step for point in client().get_metric_history(run.info.run_id, metric)]


def wait_for(condition, seconds=180):
    """Until the condition holds; a store that is not there yet is no answer."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(sqlite3.OperationalError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def wait_for_follower():
    """Only files written after it began are of a run in training."""
    wait_for(lambda: Path("results/.tracking.lock").exists())
    time.sleep(0.5)


# Pure parts


def test_incomplete_last_line_waits(tmp_path):
    (tmp_path / "log.csv").write_text("step,images\n1,10\n2,2")
    assert content.read_rows(tmp_path / "log.csv") == [{"step": "1", "images": "10"}]
    (tmp_path / "log.csv").write_text("step,im")
    assert content.read_rows(tmp_path / "log.csv") == []


def test_train_metrics_skip_what_cannot_be_plotted():
    row = {
        "step": "5",
        "images": "50",
        "seconds": "2",
        "loss": "nan",
        "mse": "",
        "vb": "inf",
        "grad_norm": "3.5",
    }
    assert content.train_metrics(row, 50, 200) == {"train/grad_norm": 3.5, "progress": 0.25}
    rate = {"images_per_second": "30"}
    assert content.train_metrics(rate, 50, 200)["time_left_s"] == 5.0
    assert content.train_metrics({"loss": None}, 50, 200) == {"progress": 0.25}


def test_only_inception_gives_fid_and_kid():
    def row(features, metric, value="2.5"):
        return {"features": features, "metric": metric, "value": value, "images": "100"}

    rows = [row(f, m) for f in ("inception-v3-compat", "efficientnet-lite0") for m in ("fd", "kid", "recall")]
    names = [name for name, _ in content.eval_metrics(rows)]
    assert names == [
        *("eval/fid inception-v3-compat", "eval/kid inception-v3-compat", "eval/recall inception-v3-compat"),
        *("eval/fd efficientnet-lite0", "eval/kd efficientnet-lite0", "eval/recall efficientnet-lite0"),
    ]
    assert content.eval_metrics([row("efficientnet-lite0", "fd", "")]) == {}


def test_batches_cut_no_row():
    rows = [[(row, column) for column in range(1 + row % 7)] for row in range(100)]
    joined = list(content.batches(rows, limit=20))
    assert [cell for batch in joined for cell in batch] == [cell for row in rows for cell in row]
    assert max(map(len, joined)) <= 20
    assert all(
        len([c for batch in joined if row[0] in batch for c in batch if c[0] == row[0][0]]) == len(row) for row in rows
    )


def test_standings_compare_at_a_checkpoint_that_all_runs_have():
    ahead = {("eval/fd x", 0): 90.0, ("eval/fd x", 900): 40.0, ("eval/fd x", 1000): 20.0}
    behind = {("eval/fd x", 0): 90.0, ("eval/fd x", 900): 50.0}
    table = content.standings({"a": [ahead, behind], "b": [behind]}).splitlines()
    assert table == ["| mean over seeds | fd x, 900 images |", "| --- | --- |", "| a | 45 |", "| b | 50 |"]
    assert content.standings({"a": [ahead], "b": [{}]}) == ""


VERDICT = """# Verdict

## other

**Answer.** a is slower.

## toy

**Question.** Does b?

**Answer.** b is faster.

### Against a

A table.

## How this was computed

So.
"""


def test_the_answer_on_a_study_is_found_in_the_verdict():
    assert answers.sections(VERDICT) == {
        "toy": "**Question.** Does b?\n\n**Answer.** b is faster.",
        "other": "**Answer.** a is slower.",
    }
    assert answers.sections("") == {}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ((True, True, True), "FAILED"),
        ((True, True), "FINISHED"),
        ((False, True), "RUNNING"),
        ((False, False), "KILLED"),
    ],
)
def test_run_status(facts, expected):
    assert content.run_status(*facts) == expected


# The store


def test_a_finished_run_is_told_whole(study):
    facts = {"source": "drawn", "count": 7, "image_size": 16, "sha256": "f" * 64, "licence": "CC"}
    layout.dataset_directory(study.dataset).mkdir(parents=True)
    (layout.dataset_directory(study.dataset) / "manifest.json").write_text(json.dumps(facts))
    for step, fd in ((0, 90.0), (100, 50.0), (200, 40.0)):
        write_log(directory(study, step), range(step - 99, step + 1)) if step else None
        write_checkpoint(directory(study, step), step, fd)
    write_log(directory(study, 100, "matched05"), range(1, 51))
    Path("reports").mkdir()
    Path("reports/fid_curves.png").write_bytes(b"figure of another study")
    Path("reports/metrics.csv").write_text("study,value\nother,1\n")
    sync(study)

    found = runs()
    assert set(found) == {"toy", "uniform seed 0", "matched05 seed 0"}
    run, parent = found["uniform seed 0"], found["toy"]
    assert steps_of(run) == list(range(10, 2001, 10))
    history = client().get_metric_history(run.info.run_id, "eval/fd efficientnet-lite0")
    assert [(point.step, point.value) for point in history] == [(0, 90.0), (1000, 50.0), (2000, 40.0)]
    assert run.data.metrics["progress"] == 1.0 and run.data.metrics["time_left_s"] == 0.0
    assert run.info.status == "FINISHED"
    assert found["matched05 seed 0"].info.status == parent.info.status == "KILLED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and parent.data.tags["role"] == "study"
    assert run.data.tags["git_dirty"] == "true" and "diverged" not in run.data.tags
    assert run.data.tags["versions"] == "torch 2.9"
    assert run.data.tags["checkpoint"] == (directory(study, 200) / "weights.safetensors").as_posix()
    expected = {"arm": "uniform", "seed": "0", "timesteps": "uniform", "model.channel_mult": "[1, 2]"}
    assert expected.items() <= run.data.params.items()
    matched = found["matched05 seed 0"].data.params
    assert matched["timesteps"] == "p2 (gamma 0.5, k 1)" and matched["mse_weight"] == "matched to uni05"
    assert (matched["stratified"], matched["importance_corrected"], matched["correct_vb"]) == ("false", "false", "true")
    dataset = run.inputs.dataset_inputs[0].dataset
    assert dataset.digest == "f" * 16 and dataset.name == layout.dataset_directory(study.dataset).name
    pictures = [file.path for file in client().list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(name.replace("%", "+").split("+")[2]) for name in pictures) == [0, 1000, 2000]
    assert [file.path for file in client().list_artifacts(parent.info.run_id)] == ["toy.yaml"]

    # Uni05 has not begun, and matched05 has no checkpoint of its own yet: all runs have the untrained net alone.
    row = "| uniform | 90 |\n| matched05 | 90 |"
    assert parent.data.tags["mlflow.note.content"].endswith(row)

    # A second pass by another process repeats nothing, and takes the figures now that they are about this study.
    Path("reports/metrics.csv").write_text("study,value\ntoy,1\n")
    Path("reports/speedup.csv").write_text("study\ntoy\n")
    Path("reports/verdict.md").write_text(VERDICT)
    os.utime(directory(study, 100) / "metrics.csv")
    sync(study)
    assert steps_of(runs()["uniform seed 0"]) == list(range(10, 2001, 10))
    assert len(client().get_metric_history(run.info.run_id, "eval/fd efficientnet-lite0")) == 3
    assert len(client().list_artifacts(run.info.run_id, "images")) == 6
    artifacts = {file.path for file in client().list_artifacts(parent.info.run_id)}
    assert artifacts == {"toy.yaml", "metrics.csv", "speedup.csv", "verdict.md", "fid_curves.png"}
    note = runs()["toy"].data.tags["mlflow.note.content"]
    assert note.startswith("**Question.**") and note.endswith(row) and "slower" not in note
    assert len(runs()) == 3


def test_a_diverged_run_failed(study):
    write_log(directory(study, 100), range(1, 50))
    with (directory(study, 100) / "log.csv").open("a") as log:
        log.write(log_row(50, loss=math.nan))
    for step in (0, 100, 200):
        write_checkpoint(directory(study, step), step, "" if step else 90.0, diverged=50 if step else None)
    sync(study)
    run = runs()["uniform seed 0"]
    assert run.info.status == "FAILED" and run.data.tags["diverged"] == "50"
    assert steps_of(run) == list(range(10, 500, 10))
    assert max(steps_of(run, "progress")) == 500


def test_an_edited_arm_gets_a_new_run(study):
    write_log(directory(study, 100, "uni05"), range(1, 11))
    write_log(directory(study, 100), range(1, 11))
    sync(study)
    before = runs()
    client().update_run(before["uni05 seed 0"].info.run_id, "RUNNING")
    Path("toy.yaml").write_text(
        STUDY.replace("uni05: {mse_weight: {p2: {gamma: 0.5, k: 1}}}", "uni05: {mse_weight: {p2: {gamma: 1, k: 1}}}")
    )
    study = study_file.load_experiment(Path("toy.yaml"))
    write_log(directory(study, 100, "uni05"), range(1, 6))
    sync(study)
    experiment = client().get_experiment_by_name("toy").experiment_id
    named = [run for run in client().search_runs([experiment]) if run.info.run_name == "uni05 seed 0"]
    assert sorted(len(steps_of(run)) for run in named) == [5, 10]
    assert {run.info.status for run in named} == {"KILLED"}
    assert runs()["toy"].info.run_id == before["toy"].info.run_id


# The process


def test_follow_until_told_to_stop(study, processes):
    process = start("follow")
    processes.append(process)
    wait_for_follower()
    path = directory(study, 100)
    write_log(path, range(1, 21))
    wait_for(lambda: set(statuses()) == {"toy", "uniform seed 0"} and count("progress") == 20)
    wait_for(lambda: set(statuses().values()) == {"RUNNING"})
    with (path / "log.csv").open("a") as log:
        log.write(log_row(21) + log_row(22) + "23,2")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    found = runs()
    assert steps_of(found["uniform seed 0"]) == list(range(10, 221, 10))
    assert found["uniform seed 0"].info.status == found["toy"].info.status == "KILLED"


@pytest.mark.slow
def test_a_killed_follower_repeats_nothing(study, processes):
    path = directory(study, 100)
    write_log(path, range(1, 2001))
    write_checkpoint(directory(study, 0), 0, 90.0)
    processes.append(start("follow"))
    wait_for(lambda: count("progress") > 0)
    processes[0].kill()
    processes[0].wait()
    # The segment is restarted meanwhile, from an earlier row.
    write_log(path, range(1, 1501))
    processes.append(start("follow"))
    wait_for(lambda: count("progress") >= 1500)
    write_log(path, range(1, 2011))
    processes[1].send_signal(signal.SIGTERM)
    assert processes[1].wait(timeout=60) == 0
    assert steps_of(runs()["uniform seed 0"]) == list(range(10, 20101, 10))
    assert steps_of(runs()["uniform seed 0"], "eval/fd efficientnet-lite0") == [0]
    assert runs()["uniform seed 0"].info.status == "KILLED"


@pytest.mark.slow
def test_a_follower_whose_parent_dies_closes_the_runs(study, processes):
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(99)"
    command = [sys.executable, "-c", code, sys.executable, "-m", "convergence.tracking.follow", "follow", "toy.yaml"]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    processes.append(parent)
    wait_for_follower()
    write_log(directory(study, 100), range(1, 11))
    wait_for(lambda: statuses().get("uniform seed 0") == "RUNNING")
    parent.kill()
    wait_for(lambda: set(statuses().values()) == {"KILLED"})
    with FileLock("results/.tracking.lock", timeout=30):
        assert steps_of(runs()["uniform seed 0"]) == list(range(10, 101, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "advice"),
    [("follow", 0, "this one leaves it to that"), ("sync", 1, "once it has ended, make track forwards what is left")],
)
def test_a_second_process_leaves_it_to_the_first(study, processes, command, code, advice):
    Path("results").mkdir()
    with FileLock("results/.tracking.lock"):
        processes.append(start(command))
        assert processes[0].wait(timeout=60) == code
    told = processes[0].stderr.read()
    assert told.count("\n") == 1 and advice in told
    assert not Path("mlflow.db").exists()


@pytest.mark.slow
def test_an_unreachable_store_fails_nothing(study, processes):
    write_log(directory(study, 100), range(1, 11))
    processes.append(start("follow", "http://127.0.0.1:1"))
    time.sleep(6)
    processes[0].send_signal(signal.SIGTERM)
    assert processes[0].wait(timeout=60) == 0
    told = processes[0].stderr.read()
    assert told.count("\n") == 1 and "127.0.0.1:1" in told and "next start" in told


def test_what_a_sync_cannot_forward_is_a_failure(study):
    write_log(directory(study, 100), range(1, 11))
    process = start("sync", "http://127.0.0.1:1")
    assert process.wait(timeout=60) == 1
    told = process.stderr.read()
    assert told.count("\n") == 1 and "toy.yaml is not tracked in http://127.0.0.1:1 (" in told
    assert "): start that server, or mend MLFLOW_TRACKING_URI, then make track again" in told
    process = start("sync")
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""


def test_a_mistake_in_the_experiment_is_one_sentence(study):
    Path("toy.yaml").write_text(STUDY + "colour: red\n")
    process = start("sync")
    assert process.wait(timeout=60) == 1
    assert process.stderr.read().count("\n") == 1


# A database server, shared


@pytest.fixture
def postgresql(tmp_path):
    """The address of an empty database on a PostgreSQL server of its own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or os.geteuid() != 0:
        pytest.skip("needs Debian's postgresql, and root to start it as its own user")
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    place = Path(tempfile.mkdtemp(prefix="pg"))  # short: the path of a socket has 107 characters at most
    shutil.chown(place, "postgres")

    def run(program, *arguments):
        command = ["runuser", "-u", "postgres", "--", str(found[-1] / program), *arguments]
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)

    run("initdb", "--auth=trust", "-D", f"{place}/data")
    run(
        "pg_ctl", "-D", f"{place}/data", "-o", f"-k {place} -c listen_addresses=''", "-l", f"{place}/log", "-w", "start"
    )
    try:
        run("createdb", "-h", str(place), "mlflow")
        yield f"postgresql://postgres@/mlflow?host={place}"
    finally:
        run("pg_ctl", "-D", f"{place}/data", "-m", "immediate", "stop")
        shutil.rmtree(place)


@pytest.mark.slow
def test_studies_share_a_postgresql_store_and_an_artifact_directory(postgresql, tmp_path, processes):
    from mlflow import MlflowClient

    shared = tmp_path / "shared artifacts"
    for name in ("toy", "other"):
        project = tmp_path / name
        project.mkdir()
        text = STUDY.replace("name: toy", f"name: {name}")
        (project / f"{name}.yaml").write_text(text)
        experiment = study_file.load_experiment(project / f"{name}.yaml")
        path = project / layout.step_directory(name, "uniform", experiment.run("uniform"), 0, 100)
        path.mkdir(parents=True)
        write_log(path, range(1, 101))
        write_checkpoint(path, 100, 50.0)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_ARTIFACTS_DESTINATION": shared.as_uri()}
    command = [sys.executable, "-m", "convergence.tracking.follow", "sync", "--uri", postgresql]

    def sync_all(names):
        processes.extend(
            subprocess.Popen([*command, f"{name}.yaml"], cwd=tmp_path / name, env=environment, stderr=subprocess.PIPE)
            for name in names
        )
        for process in processes[-len(names) :]:
            assert process.communicate()[1] == b"" and process.returncode == 0

    sync_all(["toy"])  # one makes the tables
    sync_all(["toy", "other"])
    found = MlflowClient(postgresql)
    for name in ("toy", "other"):
        experiment = found.get_experiment_by_name(name)
        names = {run.info.run_name: run.info.run_id for run in found.search_runs([experiment.experiment_id])}
        assert set(names) == {name, "uniform seed 0"}
        history = found.get_metric_history(names["uniform seed 0"], "train/loss")
        assert [point.step for point in history] == list(range(10, 1001, 10))
        assert [file.path for file in found.list_artifacts(names[name])] == [f"{name}.yaml"]
    assert not list(tmp_path.glob("*/mlartifacts")) and len(list(shared.glob("*"))) == 2
