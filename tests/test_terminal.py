"""What the terminal shows of Snakemake's messages."""

import csv
import logging
from collections import Counter
from pathlib import Path

import pytest
from snakemake.logging import logger as snakemake_logger
from snakemake_interface_logger_plugins.common import LogEvent

from convergence import terminal
from convergence.time_left import Job, in_words, seconds_left


@pytest.fixture
def shown(caplog):
    """A function that sends messages to Snakemake's logger and returns those that are shown."""
    before = list(snakemake_logger.filters)
    plans = []
    terminal.shorten_output(lambda: plans.append("plan"))
    snakemake_logger.setLevel(logging.INFO)

    def send(*messages):
        caplog.clear()
        for text, fields in messages:
            snakemake_logger.error(text, extra=fields)
        return [getattr(record, "rule_msg", record.msg) for record in caplog.records], plans

    yield send
    snakemake_logger.filters[:] = before


def failure(end):
    """Snakemake's messages about a failed job on this machine."""
    text = f"CalledProcessError in file \"train.smk\", line 58:\nCommand 'python a.py' {end}"
    return [
        (text, {"event": LogEvent.ERROR, "exception": "RuleException"}),
        ("Error in rule train, jobid: 1", {"event": LogEvent.JOB_ERROR, "jobid": 1, "rule_msg": None}),
    ]


# Ends of a job that has printed its error itself, or that was stopped by Ctrl-C or with its terminal.
REPORTED = [*(f"returned non-zero exit status {code}." for code in (1, 129, 130)), "died with <Signals.SIGINT: 2>."]
REPORTED += ["died with <Signals.SIGHUP: 1>."]
LAST = ("WorkflowError:\nAt least one job did not complete successfully.", {"exception": "WorkflowError"})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        *(([*failure(end), LAST], []) for end in REPORTED),
        # It was killed: only Snakemake can report that.
        ([*failure("died with <Signals.SIGKILL: 9>."), LAST], ["died with <Signals.SIGKILL: 9>."]),
        ([*failure("returned non-zero exit status 137.")], ["returned non-zero exit status 137."]),
        # A job on another machine: its error is in its log, which Snakemake shows.
        (
            [("Error in rule train", {"event": LogEvent.JOB_ERROR, "jobid": 1, "rule_msg": "see the log"})],
            ["see the log"],
        ),
        (
            [("Terminating processes on user request, this might take some time.", {}),
             *failure("died with <Signals.SIGINT: 2>."), LAST],
            ["Terminating processes on user request, this might take some time.", terminal.STOPPED],
        ),
        (
            [("Will exit after finishing currently running jobs (scheduler).", {}), LAST],
            ["Will exit after finishing currently running jobs (scheduler).", terminal.STOPPED],
        ),
        ([("Cancelling snakemake on user request.", {"exception": "KeyboardInterrupt"})], [terminal.STOPPED]),
        ([("Select jobs to execute...", {}), ("Building DAG of jobs...", {})], ["Building DAG of jobs..."]),
    ],
)  # fmt: skip
def test_a_failed_or_stopped_job_is_reported_once(shown, messages, expected):
    assert shown(*messages)[0] == expected


def test_the_plan_is_printed_once_although_a_dry_run_sends_it_twice(shown):
    message = ("Job stats", {"event": LogEvent.RUN_INFO, "stats": {"train": 1, "total": 1}})
    assert shown(message, message)[1] == ["plan"]


def test_the_time_left_follows_from_the_kinds_of_jobs():
    # A study of 60 jobs on two cores: job_times.csv has the starts and ends of its jobs.
    rows = list(csv.DictReader((Path(__file__).parent / "data/job_times.csv").open()))
    counts, end = Counter(row["rule"] for row in rows if row["event"] == "end"), int(rows[-1]["second"])
    jobs, estimates = {}, []
    for row in rows:
        now, job = int(row["second"]), row["job"]
        if row["event"] == "start":
            jobs[job] = Job(row["rule"], now)
        else:
            jobs[job] = jobs[job]._replace(end=now)
            estimates.append((end - now, seconds_left(counts, jobs.values(), now)))
    for left, estimate in estimates[len(rows) // 2 * 15 // 100 :]:
        # The estimate is printed in minutes.
        assert left / 1.5 < estimate < left * 1.5 if left > 30 else estimate < 60, (left, estimate)
    assert estimates[-1] == (0, 0)


@pytest.mark.parametrize(
    ("counts", "jobs", "expected"),
    [
        # Two at once; three of ten seconds are left.
        ({"train": 5}, [("train", 0, 10), ("train", 0, 10)], 15),
        # One runs since 5 seconds.
        ({"train": 2}, [("train", 0, 5), ("train", 5, None)], 0),
        # Nothing is known about a figure but the mean of all jobs; a single job runs alone.
        ({"train": 2, "figures": 1}, [("train", 0, 10), ("train", 0, 10)], 10),
        # A rule that appeared later.
        ({"train": 1}, [("train", 0, 10), ("evaluate", 0, 10)], 0),
    ],
)
def test_examples_of_the_time_left(counts, jobs, expected):
    assert seconds_left(counts, [Job(*job) for job in jobs], 10) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(20, "less than a minute"), (40, "about 1 min"), (170, "about 3 min"), (7780, "about 2 h 10 min")],
)
def test_a_duration_in_words(seconds, expected):
    assert in_words(seconds) == expected


def test_the_time_left_is_printed_when_a_job_has_ended(shown, capsys):
    shown(
        ("Job stats", {"event": LogEvent.RUN_INFO, "stats": {"train": 3, "total": 3}}),
        ("", {"event": LogEvent.JOB_INFO, "jobid": 4, "rule_name": "train"}),
        ("", {"event": LogEvent.JOB_INFO, "jobid": 5, "rule_name": "train"}),
        ("", {"event": LogEvent.JOB_ERROR, "jobid": 5, "rule_msg": "failed"}),
        ("", {"event": LogEvent.JOB_FINISHED, "job_id": 4}),
        ("", {"event": LogEvent.PROGRESS, "done": 1, "total": 3}),
    )
    assert capsys.readouterr().err == "less than a minute left\n"
