"""Tracking with a real SQLite store, files as training writes them, and processes that are really killed."""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from metric_tables import PLAN
from PIL import Image

from convergence import layout, study_file
from convergence.analysis.verdict import StudyVerdict, judge, write_verdict
from convergence.rows import COLUMNS, PROBE_COLUMNS
from convergence.tracking import content, follow, problem
from diffusion.evaluation.weights import LITE0

ROOT = Path(__file__).parents[1]
FILE = layout.study_file("toy")
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
ARMS = {"baseline": "uni05", "candidates": ("matched05",), "candidate": "matched05", "features": LITE0}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FILE.parent.mkdir()
    FILE.write_text(STUDY)
    return study_file.load_experiment(FILE)


@pytest.fixture
def processes():
    """Processes that a test starts; they are killed at its end."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def run_directory(study, arm="uniform"):
    path = layout.run_directory("toy", arm, study.run(arm), 0)
    path.mkdir(parents=True, exist_ok=True)
    return path


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


def write_checkpoint(path, step, fd, reason=""):
    row = ["toy", "uniform", 0, step, 10 * step, 1.5, "efficientnet-lite0", "fd", fd, "", 500, reason]
    with (path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, row])
    Image.fromarray(np.full((8, 16, 3), step % 256, np.uint8)).save(path / "preview.png")
    facts = {"step": step, "git_commit": "abc", "git_dirty": True, "host": "here"}
    (path / "provenance.json").write_text(json.dumps(facts | {"versions": {"torch": "2.9"}}))


COMMANDS = {"follow": ["sync", "--follow", str(os.getpid())], "sync": ["sync"]}


def start(command, uri=None, name="toy", **options):
    """Starts a process that forwards a study, as the Snakefile (`follow`) or `convergence sync` (`sync`) does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    environment |= options.pop("env", {})
    arguments = [sys.executable, "-m", "convergence", *COMMANDS[command], "--uri", uri or store(), name]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True, **options)


def sync():
    assert follow.sync(store(), [FILE])


def store():
    """The address of the store. It is absolute, because MLflow keeps one engine per address in a process."""
    return f"sqlite:///{Path.cwd()}/mlflow.db"


def client():
    from mlflow import MlflowClient

    return MlflowClient(store())


def runs():
    """Name -> run in the store."""
    experiment = client().get_experiment_by_name("toy")
    return {run.info.run_name: run for run in client().search_runs([experiment.experiment_id])}


def statuses():
    """Name -> status, read from the database without creating or locking it."""
    with contextlib.closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as database:
        return dict(database.execute("select name, status from runs"))


def count(metric):
    with contextlib.closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as database:
        return database.execute("select count(*) from metrics where key = ?", [metric]).fetchone()[0]


def steps_of(run, metric="train/loss"):
    return [point.step for point in client().get_metric_history(run.info.run_id, metric)]


def wait_for(condition, seconds=180):
    """Waits until the condition holds. A store that does not exist yet counts as false."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(sqlite3.OperationalError):
            if condition():
                return
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.2)


def wait_for_follower():
    """Waits until it runs, because only files that are written after its start mark a run as running."""
    wait_for(lambda: Path("results/.tracking.lock").exists())
    time.sleep(0.5)


# Pure functions


def test_an_incomplete_last_line_is_left_out(tmp_path):
    (tmp_path / "log.csv").write_text("step,images\n1,10\n2,2")
    assert content.read_rows(tmp_path / "log.csv") == [{"step": "1", "images": "10"}]
    (tmp_path / "log.csv").write_text("step,im")
    assert content.read_rows(tmp_path / "log.csv") == []


def test_train_metrics_leave_out_missing_and_infinite_values():
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


def test_fid_and_kid_are_reserved_for_inception_features():
    def row(features, metric, value="2.5"):
        return {"features": features, "metric": metric, "value": value, "images": "100"}

    rows = [row(f, m) for f in ("inception-v3-compat", "efficientnet-lite0") for m in ("fd", "kid", "recall")]
    names = [name for name, _ in content.eval_metrics(rows)]
    assert names == [
        *("eval/fid inception-v3-compat", "eval/kid inception-v3-compat", "eval/recall inception-v3-compat"),
        *("eval/fd efficientnet-lite0", "eval/kd efficientnet-lite0", "eval/recall efficientnet-lite0"),
    ]
    assert content.eval_metrics([row("efficientnet-lite0", "fd", "")]) == {}


def test_batches_split_no_row():
    rows = [[(row, column) for column in range(1 + row % 7)] for row in range(100)]
    joined = list(content.batches(rows, limit=20))
    assert [cell for batch in joined for cell in batch] == [cell for row in rows for cell in row]
    assert max(map(len, joined)) <= 20
    assert all(
        len([c for batch in joined if row[0] in batch for c in batch if c[0] == row[0][0]]) == len(row) for row in rows
    )


def test_means_are_those_of_the_newest_checkpoint_that_all_runs_have():
    ahead = {("eval/fd x", 0): 90.0, ("eval/fd x", 900): 40.0, ("eval/fd x", 1000): 20.0}
    behind = {("eval/fd x", 0): 90.0, ("eval/fd x", 900): 50.0}
    table = content.means_table({"a": [ahead, behind], "b": [behind]}).splitlines()
    assert table == ["| mean over seeds | fd x, 900 images |", "| --- | --- |", "| a | 45 |", "| b | 50 |"]
    assert content.means_table({"a": [ahead], "b": [{}]}) == ""


def verdict(**changes):
    fields = {"study": "toy", "question": "Does b?", "answer": "b is faster.", "warnings": ("The code has changed.",)}
    return StudyVerdict(**fields | changes)


def test_the_note_has_warnings_question_answer_and_means():
    parts = ["**Warning.** The code has changed.", "**Question.** Does b?", "**Answer.** b is faster.", "| a |"]
    assert content.note(verdict(), "| a |").split("\n\n") == parts
    assert content.note(verdict(question=None, answer=None, warnings=()), "") == ""
    assert content.note(None, "| a |") == "| a |"


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


def test_a_finished_run_is_forwarded_completely(study):
    facts = {"source": "drawn", "count": 7, "image_size": 16, "sha256": "f" * 64, "licence": "CC"}
    layout.dataset_directory(study.dataset).mkdir(parents=True)
    (layout.dataset_directory(study.dataset) / "manifest.json").write_text(json.dumps(facts))
    for step, fd in ((0, 90.0), (100, 50.0), (200, 40.0)):
        write_checkpoint(directory(study, step), step, fd)
    write_log(run_directory(study), range(1, 201))
    write_log(run_directory(study, "matched05"), range(1, 51))
    Path("reports/other").mkdir(parents=True)
    Path("reports/fid_curves.png").write_bytes(b"figure of several studies")
    Path("reports/other/metrics.csv").write_text("study,value\nother,1\n")
    sync()

    stored = runs()
    assert set(stored) == {"toy", "uniform seed 0", "matched05 seed 0"}
    run, parent = stored["uniform seed 0"], stored["toy"]
    assert steps_of(run) == list(range(10, 2001, 10))
    history = client().get_metric_history(run.info.run_id, "eval/fd efficientnet-lite0")
    assert [(point.step, point.value) for point in history] == [(0, 90.0), (1000, 50.0), (2000, 40.0)]
    assert run.data.metrics["progress"] == 1.0 and run.data.metrics["time_left_s"] == 0.0
    assert run.info.status == "FINISHED"
    assert stored["matched05 seed 0"].info.status == parent.info.status == "KILLED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and parent.data.tags["role"] == "study"
    assert run.data.tags["git_dirty"] == "true" and "failed" not in run.data.tags
    assert run.data.tags["versions"] == "torch 2.9"
    assert run.data.tags["checkpoint"] == (directory(study, 200) / "weights.safetensors").as_posix()
    expected = {"arm": "uniform", "seed": "0", "timesteps": "uniform", "model.channel_mult": "[1, 2]"}
    assert expected.items() <= run.data.params.items()
    matched = stored["matched05 seed 0"].data.params
    assert matched["timesteps"] == "p2 (gamma 0.5, k 1)" and matched["mse_weight"] == "matched to uni05"
    assert (matched["stratified"], matched["importance_corrected"], matched["correct_vb"]) == ("false", "false", "true")
    dataset = run.inputs.dataset_inputs[0].dataset
    assert dataset.digest == "f" * 16 and dataset.name == layout.dataset_directory(study.dataset).name
    samples = [file.path for file in client().list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(name.replace("%", "+").split("+")[2]) for name in samples) == [0, 1000, 2000]
    assert [file.path for file in client().list_artifacts(parent.info.run_id)] == ["toy.yaml"]

    # uni05 has not started, and matched05 has no checkpoint of its own: the runs share only the untrained net.
    row = "| uniform | 90 |\n| matched05 | 90 |"
    assert parent.data.tags["mlflow.note.content"].endswith(row)

    # A second pass by another process repeats nothing, and forwards the reports of this study.
    reports = layout.report_directory("toy")
    reports.mkdir()
    (reports / "metrics.csv").write_text("study,value\ntoy,1\n")
    (reports / "cost.csv").write_text("study,arm\ntoy,uniform\n")
    (reports / "fid_curves.png").write_bytes(b"figure of this study")
    table = pd.DataFrame(columns=COLUMNS)
    plan, warnings = PLAN.model_copy(update=ARMS), ["The code has changed."]
    written = judge(table, pd.DataFrame(columns=PROBE_COLUMNS), "toy", plan, warnings=warnings)
    write_verdict(written, reports)
    os.utime(directory(study, 100) / "metrics.csv")
    sync()
    assert steps_of(runs()["uniform seed 0"]) == list(range(10, 2001, 10))
    assert len(client().get_metric_history(run.info.run_id, "eval/fd efficientnet-lite0")) == 3
    assert len(client().list_artifacts(run.info.run_id, "images")) == 6
    artifacts = {file.path for file in client().list_artifacts(parent.info.run_id)}
    tables = {"metrics.csv", "cost.csv", "effects.csv"}
    assert artifacts == {"toy.yaml", *tables, "verdict.json", "verdict.md", "fid_curves.png"}
    note = runs()["toy"].data.tags["mlflow.note.content"]
    assert note.startswith("**Warning.** The code has changed.") and note.endswith(row)
    assert f"**Question.** {written.question}\n\n**Answer.** {written.answer}\n\n" in note
    assert client().get_experiment_by_name("toy").tags["mlflow.note.content"].startswith(written.answer)
    assert len(runs()) == 3


def test_a_diverged_run_failed(study):
    write_log(run_directory(study), range(1, 50))
    with (run_directory(study) / "log.csv").open("a") as log:
        log.write(log_row(50, loss=math.nan))
    for step in (0, 100, 200):
        write_checkpoint(directory(study, step), step, "" if step else 90.0, "diverged at step 50" if step else "")
    sync()
    run = runs()["uniform seed 0"]
    assert run.info.status == "FAILED" and run.data.tags["failed"] == "diverged at step 50"
    assert steps_of(run) == list(range(10, 500, 10))
    assert max(steps_of(run, "progress")) == 500


def test_a_run_that_collapsed_at_its_last_checkpoint_failed_and_has_no_value_there(study):
    fd = "eval/fd efficientnet-lite0"
    for step, value, reason in ((0, 90.0, ""), (100, 2.0, "collapsed at step 100 (mse 9)")):
        write_checkpoint(directory(study, step), step, value, reason)
    write_log(run_directory(study), [100])
    sync()
    run = runs()["uniform seed 0"]
    assert run.info.status == "KILLED" and "failed" not in run.data.tags and steps_of(run, fd) == [0]
    write_checkpoint(directory(study, 200), 200, 1.0, "collapsed at step 200 (mse 8)")
    sync()
    run = runs()["uniform seed 0"]
    assert run.info.status == "FAILED" and run.data.tags["failed"] == "collapsed at step 200 (mse 8)"
    assert steps_of(run, fd) == [0]
    write_checkpoint(directory(study, 200), 200, 50.0)
    sync()
    run = runs()["uniform seed 0"]
    assert run.info.status == "FINISHED" and "failed" not in run.data.tags
    assert sorted(steps_of(run, fd)) == [0, 1000, 2000]


def test_an_edited_arm_gets_a_new_run(study):
    write_log(run_directory(study, "uni05"), range(1, 11))
    write_log(run_directory(study), range(1, 11))
    sync()
    before = runs()
    client().update_run(before["uni05 seed 0"].info.run_id, "RUNNING")
    FILE.write_text(
        STUDY.replace("uni05: {mse_weight: {p2: {gamma: 0.5, k: 1}}}", "uni05: {mse_weight: {p2: {gamma: 1, k: 1}}}")
    )
    study = study_file.load_experiment(FILE)
    write_log(run_directory(study, "uni05"), range(1, 6))
    sync()
    experiment = client().get_experiment_by_name("toy").experiment_id
    named = [run for run in client().search_runs([experiment]) if run.info.run_name == "uni05 seed 0"]
    assert sorted(len(steps_of(run)) for run in named) == [5, 10]
    assert {run.info.status for run in named} == {"KILLED"}
    assert runs()["toy"].info.run_id == before["toy"].info.run_id


def points_of(run, metric="train/loss"):
    return [(point.step, point.value) for point in client().get_metric_history(run.info.run_id, metric)]


def test_rows_after_the_last_checkpoint_are_ignored(study):
    write_log(run_directory(study), range(1, 251))
    sync()
    run = runs()["uniform seed 0"]
    assert steps_of(run) == list(range(10, 2001, 10)) and run.data.metrics["progress"] == 1.0


def test_a_run_that_is_trained_again_is_logged_again_and_has_a_tag(study):
    path = run_directory(study)
    write_log(path, range(1, 21))
    sync()
    sync()
    run = runs()["uniform seed 0"]
    first = points_of(run)
    assert len(first) == 20 and "trained_again" not in run.data.tags
    # The second training differs from the fifth row on, and its last row is not finite.
    rows = [log_row(step, **({"loss": 2.0} if step > 4 else {})) for step in range(1, 20)] + [log_row(20, loss="nan")]
    (path / "log.csv").write_text(",".join(LOG_COLUMNS) + "\n" + "".join(rows))
    for _ in range(2):  # another process repeats nothing
        sync()
        run = runs()["uniform seed 0"]
        assert sorted(points_of(run)) == sorted(first + [(10 * step, 2.0) for step in range(5, 20)])
        assert run.data.tags["trained_again"] == "true"
        assert run.data.metrics["train/loss"] == first[-1][1] and len(runs()) == 2


# The process


def test_follow_until_stopped(study, processes):
    process = start("follow")
    processes.append(process)
    wait_for_follower()
    path = run_directory(study)
    write_log(path, range(1, 21))
    wait_for(lambda: set(statuses()) == {"toy", "uniform seed 0"} and count("progress") == 20)
    wait_for(lambda: set(statuses().values()) == {"RUNNING"})
    with (path / "log.csv").open("a") as log:
        log.write(log_row(21) + log_row(22) + "23,2")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    stored = runs()
    assert steps_of(stored["uniform seed 0"]) == list(range(10, 221, 10))
    assert stored["uniform seed 0"].info.status == stored["toy"].info.status == "KILLED"


@pytest.mark.slow
def test_a_killed_follower_repeats_nothing(study, processes):
    FILE.write_text(STUDY.replace("200]", "2010]"))
    path = run_directory(study)
    write_log(path, range(1, 2001))
    write_checkpoint(directory(study, 0), 0, 90.0)
    processes.append(start("follow"))
    wait_for(lambda: count("progress") > 0)
    processes[0].kill()
    processes[0].wait()
    # The run resumes from an earlier row.
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
    code = "import os, subprocess, sys, time; subprocess.Popen([*sys.argv[1:], str(os.getpid())]); time.sleep(99)"
    command = [sys.executable, "-c", code, sys.executable, "-m", "convergence", "sync", "toy", "--follow"]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    processes.append(parent)
    wait_for_follower()
    write_log(run_directory(study), range(1, 11))
    wait_for(lambda: statuses().get("uniform seed 0") == "RUNNING")
    parent.kill()
    wait_for(lambda: set(statuses().values()) == {"KILLED"})
    with FileLock("results/.tracking.lock", timeout=30):
        assert steps_of(runs()["uniform seed 0"]) == list(range(10, 101, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "advice"),
    [("follow", 0, "this process ends"), ("sync", 1, "run `convergence sync toy` again after it has ended")],
)
def test_a_second_process_ends_with_a_message(study, processes, command, code, advice):
    Path("results").mkdir()
    with FileLock("results/.tracking.lock"):
        processes.append(start(command))
        assert processes[0].wait(timeout=60) == code
    message = processes[0].stderr.read()
    assert message.count("\n") == 1 and advice in message
    assert not Path("mlflow.db").exists()


@pytest.mark.slow
def test_an_unreachable_store_is_no_failure_of_follow(study, processes):
    write_log(run_directory(study), range(1, 11))
    processes.append(start("follow", "http://127.0.0.1:1"))
    time.sleep(6)
    processes[0].send_signal(signal.SIGTERM)
    assert processes[0].wait(timeout=60) == 0
    message = processes[0].stderr.read()
    assert message.count("\n") == 1 and "127.0.0.1:1" in message
    assert "the next run of the study, or `convergence sync toy`, forwards the rest" in message


def test_an_unreachable_store_is_a_failure_of_sync(study):
    write_log(run_directory(study), range(1, 11))
    process = start("sync", "http://127.0.0.1:1")
    assert process.wait(timeout=60) == 1
    message = process.stderr.read()
    assert message.count("\n") == 1 and "the study toy is not tracked in http://127.0.0.1:1 (" in message
    assert "MLFLOW_TRACKING_URI" in message and "convergence sync toy" in message
    process = start("sync")
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_study_file_is_one_sentence(study, command):
    FILE.write_text(STUDY + "colour: red\n")
    process = start(command)
    assert process.wait(timeout=60) == 1
    message = process.stderr.read()
    assert message.count("\n") == 1 and "colour" in message


# Stores that fail


@pytest.fixture
def stored(study):
    """A study that has been forwarded, with a run that a killed process left open."""
    path = run_directory(study)
    write_log(path, range(1, 11))
    sync()
    client().update_run(runs()["uniform seed 0"].info.run_id, "RUNNING")
    write_log(path, range(1, 21))
    return study


def change_database(statement):
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        database.execute(statement)
        database.commit()


@contextlib.contextmanager
def experiment_deleted():
    client().delete_experiment("1")
    yield
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = "mlflow experiments restore -x 1"
    subprocess.run(command, shell=True, check=True, env=environment | {"MLFLOW_TRACKING_URI": store()})


@contextlib.contextmanager
def database_corrupt():
    Path("mlflow.db").write_bytes(os.urandom(5000))
    yield
    Path("mlflow.db").rename("corrupt.db")


@contextlib.contextmanager
def database_locked():
    with contextlib.closing(sqlite3.connect("mlflow.db", isolation_level=None)) as database:
        database.execute("begin exclusive")
        yield


@contextlib.contextmanager
def database_of_another_version():
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        ((version,),) = database.execute("select version_num from alembic_version")
    change_database("update alembic_version set version_num = '1234'")
    yield
    change_database(f"update alembic_version set version_num = '{version}'")


FAULTS = {
    experiment_deleted: "mlflow experiments restore -x 1`, then run `convergence sync toy` again",
    database_corrupt: "move the database away",
    database_locked: "end the process that uses the database",
    database_of_another_version: "run `mlflow db upgrade sqlite:///",
}


def test_each_fault_of_the_store_has_its_advice_and_nothing_is_lost(stored, caplog):
    for fault, advice in FAULTS.items():
        with fault():
            assert not follow.sync(store(), [FILE])
            (message,) = caplog.messages
            assert f"the study toy is not tracked in {store()} (" in message and "SQL:" not in message
            assert advice in message and "start that server" not in message
            caplog.clear()
        sync()
        run = runs()["uniform seed 0"]
        assert steps_of(run) == list(range(10, 201, 10)) and run.info.status == "KILLED"


def test_a_run_without_results_does_not_stay_open(stored):
    client().update_run(runs()["toy"].info.run_id, "RUNNING")
    shutil.rmtree(run_directory(stored))
    sync()
    assert set(statuses().values()) == {"KILLED"}


def files_below(path):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def test_a_copied_project_leaves_the_artifacts_of_the_original_alone(tmp_path, monkeypatch, capsys):
    original, copy = tmp_path / "original", tmp_path / "copy"
    (original / FILE).parent.mkdir(parents=True)
    (original / FILE).write_text(STUDY)
    monkeypatch.chdir(original)
    study = study_file.load_experiment(FILE)
    write_log(run_directory(study), range(1, 11))
    write_checkpoint(directory(study, 0), 0, 90.0)
    assert follow.sync(f"sqlite:///{original}/mlflow.db", [FILE])
    shutil.copytree(original, copy)
    before = files_below(original)
    monkeypatch.chdir(copy)
    FILE.write_text(STUDY.replace("200]", "300]"))
    for remove in (False, True):
        if remove:
            shutil.rmtree(original)
        capsys.readouterr()
        sync()
        line = f"toy in {copy.as_uri()}/mlartifacts (the artifacts of the experiment toy are in {original.as_uri()}/"
        assert capsys.readouterr().out.startswith(line)
        assert (not original.exists()) if remove else (files_below(original) == before)
        assert len(list(copy.glob("mlartifacts/*/*/artifacts/toy.yaml"))) == 2  # of the original, and of the copy
        assert len(list(copy.glob("mlartifacts/*/*/artifacts/images/*.png"))) == 2
    names = {experiment.name: experiment.experiment_id for experiment in client().search_experiments()}
    assert set(names) == {"Default", "toy", f"toy in {copy.as_uri()}/mlartifacts"}
    assert len(client().search_runs([names[f"toy in {copy.as_uri()}/mlartifacts"]])) == 2


def test_a_path_may_contain_any_character(tmp_path, monkeypatch):
    place = tmp_path / """it's "here" :a%41#?"""
    (place / FILE).parent.mkdir(parents=True)
    (place / FILE).write_text(STUDY)
    monkeypatch.chdir(place)
    write_log(run_directory(study_file.load_experiment(FILE)), range(1, 11))
    # The address is relative, as by default. It is unique in this process, because MLflow keeps one engine per address.
    assert follow.sync("sqlite:///any_character.db", [FILE])
    assert len(list(place.glob("mlartifacts/toy/*/artifacts/toy.yaml"))) == 1


@pytest.mark.parametrize(
    ("uri", "text", "expected"),
    [
        ("http://ann:s3cret@host", "no http://ann:s3cret@host/api for ann", "no http://***@host/api for ***"),
        ("http://ann:p@ss/word@host", "ann:p@ss/word@host, p@ss/word", "***@host, ***"),
        ("postgresql://host/db?user=ann&password=x%40y", "?user=ann&password=x%40y", "?user=***&password=***"),
        ("postgresql://a@host/database", "user a of database", "user *** of database"),
        ("sqlite:////home/me@work/mlflow.db", "/home/me@work", "/home/me@work"),
        ("http://host:5000", "http://host:5000", "http://host:5000"),
    ],
)
def test_user_and_password_are_masked(uri, text, expected):
    assert problem.masked(text, uri) == expected


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("http", "Connection refused"), ("postgresql", "Connection refused"), ("http", "(read timeout=1.5)")],
)
def test_a_server_that_does_not_answer_is_given_up_at_once(study, caplog, scheme, reason):
    if scheme == "postgresql":
        pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts connections, and never answers
        port = server.getsockname()[1] if "timeout" in reason else 1
        assert not follow.sync(f"{scheme}://ann:s3cret@127.0.0.1:{port}", [FILE])
    (message,) = caplog.messages
    assert reason in message and f"is not tracked in {scheme}://***@127.0.0.1:{port} (" in message
    assert "ann" not in message and "s3cret" not in message
    assert "start that server or correct MLFLOW_TRACKING_URI, then run `convergence sync toy` again" in message


@pytest.mark.slow
def test_faults_of_tracking_are_shown_at_the_end_and_the_next_start_forwards_the_rest(
    study, processes, monkeypatch, capsys
):
    from convergence.tracking import process  # slow to import

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    path = run_directory(study)

    def track(rows):
        process.start_tracking(["toy"])
        processes.append(process._tracker)
        wait_for(lambda: time.sleep(1) or write_log(path, range(1, rows + 1)) or count("progress") == rows)
        return process._tracker

    track(10).kill()
    assert process.stop_tracking(["toy"]) == []
    advice = "the next run of the study, or `convergence sync toy`, forwards the rest\n"
    message = capsys.readouterr().err
    assert message.startswith("Warning: ") and message.endswith(advice) and message.count("\n") == 1
    assert set(statuses().values()) == {"RUNNING"}

    # Nothing is left to do: the dataset exists. Packages of the working directory have the names of ours.
    write_log(path, range(1, 21))
    FILE.write_text(STUDY + "evaluate: {features: [efficientnet-lite0]}\n")
    dataset = layout.dataset_directory(study.dataset)
    dataset.mkdir(parents=True)
    (dataset / "images.npy").touch()
    (dataset / "manifest.json").write_text(json.dumps({"source": "drawn", "count": 4000, "sha256": "f" * 64}))
    for name in ("convergence", "diffusion", "workflow"):
        Path(name).mkdir()
        Path(name, "__init__.py").write_text("raise ImportError('a package of the user')")
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "1"]
    command += ["--config", "experiments=toy", "--", dataset / "images.npy"]
    dry = subprocess.run([*command[:-2], "--dry-run", *command[-2:]], capture_output=True, text=True)
    assert "Nothing to be done" in dry.stdout + dry.stderr and set(statuses().values()) == {"RUNNING"}
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Nothing to be done" in done.stderr and "\ntoy: http://127.0.0.1:5000/#/experiments/1/" in done.stderr
    assert set(statuses().values()) == {"KILLED"} and count("progress") == 20
    assert "toy: " not in subprocess.run(command, capture_output=True, text=True).stderr  # MLflow has everything

    tracker = track(30)
    client().delete_experiment("1")
    write_log(path, range(1, 41))
    assert process.stop_tracking(["toy"]) == [] and tracker.returncode == 0
    message = capsys.readouterr().err
    assert message.startswith("Warning: the study toy is not tracked in sqlite:///mlflow.db (")
    assert "mlflow experiments restore -x 1`; " in message
    assert message.endswith(advice) and message.count("\n") == 1


# A database server, shared


@pytest.fixture
def postgresql(tmp_path):
    """The address of an empty database on a new PostgreSQL server."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not installed or os.geteuid() != 0:
        pytest.skip("needs Debian's postgresql, and root to start it as the user postgres")
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    place = Path(tempfile.mkdtemp(prefix="pg"))  # short: the path of a socket has 107 characters at most
    shutil.chown(place, "postgres")

    def run(program, *arguments):
        command = ["runuser", "-u", "postgres", "--", str(installed[-1] / program), *arguments]
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
        file = project / layout.study_file(name)
        file.parent.mkdir(parents=True)
        text = STUDY.replace("name: toy", f"name: {name}")
        file.write_text(text)
        experiment = study_file.load_experiment(file)
        path = project / layout.step_directory(name, "uniform", experiment.run("uniform"), 0, 100)
        path.mkdir(parents=True)
        write_log(path.parent, range(1, 101))
        write_checkpoint(path, 100, 50.0)
    environment = {"MLFLOW_ARTIFACTS_DESTINATION": shared.as_uri()}

    def sync_all(names):
        processes.extend(start("sync", postgresql, name, cwd=tmp_path / name, env=environment) for name in names)
        for process in processes[-len(names) :]:
            assert process.communicate()[1] == "" and process.returncode == 0

    sync_all(["toy"])  # the first process creates the tables of the database
    sync_all(["toy", "other"])
    server = MlflowClient(postgresql)
    for name in ("toy", "other"):
        experiment = server.get_experiment_by_name(name)
        names = {run.info.run_name: run.info.run_id for run in server.search_runs([experiment.experiment_id])}
        assert set(names) == {name, "uniform seed 0"}
        history = server.get_metric_history(names["uniform seed 0"], "train/loss")
        assert [point.step for point in history] == list(range(10, 1001, 10))
        assert [file.path for file in server.list_artifacts(names[name])] == [f"{name}.yaml"]
    assert not list(tmp_path.glob("*/mlartifacts")) and len(list(shared.glob("*"))) == 2
