"""What the terminal shows of Snakemake's messages."""

import logging

import pytest
from snakemake.logging import logger as snakemake_logger
from snakemake_interface_logger_plugins.common import LogEvent

from convergence import terminal


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
        ("Error in rule train, jobid: 1", {"event": LogEvent.JOB_ERROR, "rule_msg": None}),
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
        ([("Error in rule train", {"event": LogEvent.JOB_ERROR, "rule_msg": "see the log"})], ["see the log"]),
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
    message = ("Job stats", {"event": LogEvent.RUN_INFO})
    assert shown(message, message)[1] == ["plan"]
