"""Controls what the terminal shows: Snakemake's messages while jobs run, and the results at the end."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from snakemake.logging import logger as snakemake_logger
from snakemake_interface_logger_plugins.common import LogEvent

from convergence import layout
from convergence.time_left import Job, in_words, seconds_left

# First words of Snakemake's messages about its own scheduling, which are not shown.
HIDDEN_MESSAGES = (
    "Select jobs to execute", "Execute ", "Removing temporary output", "Would remove temporary output",
    "DAG of jobs will be updated", "Updating checkpoint dependencies", "The run involves checkpoint jobs",
    "Provided resources",
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
    """Hides Snakemake's messages about scheduling, and about an error that the job itself has printed.

    In addition, the estimated remaining time is printed.

    Args:
        print_plan: function to call once when Snakemake has decided which jobs to run, also in a dry run.
    """
    counts: dict[str, int] = {}
    jobs: dict[int, Job] = {}
    ends: dict[int, str] = {}  # thread -> how its job failed: the next message of the thread is JOB_ERROR
    stopped, plans = False, iter([print_plan])  # a dry run sends RUN_INFO twice

    def keep(record: logging.LogRecord) -> bool:
        nonlocal stopped
        fields, text, thread = vars(record), str(record.msg), threading.get_ident()
        event, error = fields.get("event"), fields.get("exception")
        stopped = stopped or text.startswith(STOP_MESSAGES)
        if event == LogEvent.PROGRESS and 0 < fields["done"] < fields["total"]:
            print(f"{in_words(seconds_left(counts, jobs.values(), time.monotonic()))} left", file=sys.stderr)
        elif event == LogEvent.JOB_INFO:
            jobs[fields["jobid"]] = Job(fields["rule_name"], time.monotonic())
        elif event == LogEvent.JOB_FINISHED:
            jobs[fields["job_id"]] = jobs[fields["job_id"]]._replace(end=time.monotonic())
        elif event == LogEvent.RUN_INFO:
            counts.update(fields["stats"])
            del counts["total"]
            next(plans, lambda: None)()
        elif error == "RuleException" and "CalledProcessError" in text:
            ends[thread] = text.rpartition("' ")[2]
            return False
        elif event == LogEvent.JOB_ERROR:
            jobs.pop(fields["jobid"], None)
            if thread in ends:
                fields["rule_msg"] = ends.pop(thread)
                return not fields["rule_msg"].startswith(REPORTED)
        elif error and "At least one job did not complete" in text:
            # If the study was not stopped, the failed job has already been reported.
            record.msg = STOPPED
            return stopped
        elif error == "KeyboardInterrupt":
            record.msg = STOPPED
        return not text.startswith(HIDDEN_MESSAGES)

    snakemake_logger.addFilter(keep)


def print_results(experiments: Iterable[str], outputs: Collection[Path], tracked: list[str]) -> None:
    """Prints the last lines of a Snakemake call: warnings and answer of each study, paths, and further commands.

    Args:
        experiments: names of the selected studies.
        outputs: files of all jobs of this call, including jobs whose files were up to date. Other files are not named,
            because they may be from another call.
        tracked: lines that `stop_tracking` returned.
    """
    from convergence.analysis.verdict import read_verdict  # slow to import, and not needed before the end

    lines = []
    for name in experiments:
        verdict = layout.report_directory(name) / "verdict.json"
        if verdict in outputs:
            result = read_verdict(verdict)
            answer = result.answer or "compares nothing, because the study has no section `compare`."
            lines += [f"Warning: {warning}" for warning in result.warnings]
            lines += [f"{name}: {answer}", *(f"  {run.arm} seed {run.seed} {run.reason}" for run in result.failed)]
            lines.append(f"  The verdict: {verdict.with_suffix('.md').resolve()}")
    if layout.FIGURE in outputs:
        lines += ["", f"The figure: {layout.FIGURE.resolve()}"]
    if lines:
        lines += ["", f"All results in one page: `{report_command(experiments)}`"]
    if tracked:
        lines += [f"In MLflow: {_mlflow_command()}open", *(f"  {line}" for line in tracked)]
    if lines:
        print("\n" + "\n".join(lines) + "\n", file=sys.stderr)


def report_command(experiments: Iterable[str]) -> str:
    """Returns the shell command that writes `reports/report.html` for these studies.

    In the clone, the command uses make, otherwise Snakemake.
    """
    studies = ",".join(experiments)
    if Path.cwd() == layout.ROOT:
        return f"make report EXPERIMENTS={studies}"
    config = ["--config", f"experiments={studies}"]
    stylesheet = str(layout.ROOT / "workflow/report/report.css")
    run = layout.snakemake_command("--cores", "all", *config)
    report = layout.snakemake_command("--report", str(layout.HTML_REPORT), "--report-stylesheet", stylesheet, *config)
    return f"{run} && {report}"


def _mlflow_command() -> str:
    """Returns the hint on how to start MLflow's UI; "" if MLFLOW_TRACKING_URI is set."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    if Path.cwd() == layout.ROOT:
        return "`make ui`, then "
    return f"`mlflow server --backend-store-uri sqlite:///{Path.cwd()}/mlflow.db`, then "
