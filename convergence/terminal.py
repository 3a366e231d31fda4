"""What the terminal shows of Snakemake's messages: each failed job once, and none about scheduling."""

import logging
import sys
import threading
import time
from collections.abc import Callable

from snakemake.logging import logger as snakemake_logger
from snakemake_interface_logger_plugins.common import LogEvent

# First words of Snakemake's messages about its own scheduling, which are not shown.
HIDDEN_MESSAGES = (
    "Select jobs to execute", "Execute ", "Removing temporary output", "Would remove temporary output",
    "DAG of jobs will be updated", "Updating checkpoint dependencies", "The run involves checkpoint jobs",
)  # fmt: skip
# First words of Snakemake's messages after Ctrl-C or SIGTERM.
STOP_MESSAGES = ("Terminating processes on user request", "Will exit after finishing", "Cancelling snakemake")
STOPPED = "Stopped: the same command continues from here"
# How a script ends that has printed its error itself, or that Ctrl-C (130) or a closed terminal (129) has stopped.
REPORTED = (
    "returned non-zero exit status 1.", "returned non-zero exit status 130.", "returned non-zero exit status 129.",
    "died with <Signals.SIGINT", "died with <Signals.SIGHUP",
)  # fmt: skip


def shorten_output(print_plan: Callable[[], None]) -> None:
    """Hide Snakemake's messages about scheduling and errors that a job has printed, and estimate the remaining time.

    Args:
        print_plan: called when Snakemake has decided which jobs to run, also in a dry run.
    """
    start = time.monotonic()
    ends: dict[int, str] = {}  # thread -> how its job failed: the next message of the thread is JOB_ERROR
    stopped, plans = False, iter([print_plan])  # a dry run sends RUN_INFO twice

    def keep(record: logging.LogRecord) -> bool:
        nonlocal stopped
        fields, text, thread = vars(record), str(record.msg), threading.get_ident()
        event, error = fields.get("event"), fields.get("exception")
        stopped = stopped or text.startswith(STOP_MESSAGES)
        if event == LogEvent.PROGRESS and 0 < fields["done"] < fields["total"]:
            seconds = (time.monotonic() - start) / fields["done"] * (fields["total"] - fields["done"])
            print(f"about {seconds // 60:.0f} min {seconds % 60:.0f} s left", file=sys.stderr)
        elif event == LogEvent.RUN_INFO:
            next(plans, lambda: None)()
        elif error == "RuleException" and "CalledProcessError" in text:
            ends[thread] = text.rpartition("' ")[2]
            return False
        elif event == LogEvent.JOB_ERROR and thread in ends:
            fields["rule_msg"] = ends.pop(thread)
            return not fields["rule_msg"].startswith(REPORTED)
        elif error and "At least one job did not complete" in text:
            # Without a stop, an earlier line says so.
            record.msg = STOPPED
            return stopped
        elif error == "KeyboardInterrupt":
            record.msg = STOPPED
        return not text.startswith(HIDDEN_MESSAGES)

    snakemake_logger.addFilter(keep)
