"""What the Snakefile needs: environment, signals, file times, GPUs, SLURM jobs of a killed Snakemake, study files."""

import atexit
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger as snakemake_logger

from convergence import layout
from convergence.schema import Experiment
from diffusion.files import atomic_write

LEFT_JOBS_SECONDS = 120  # until cancelled SLURM jobs must have ended


def set_environment(root: str) -> None:
    """Set the environment of the processes of all jobs: where this project's packages are, and how memory is kept.

    Args:
        root: directory of the Snakefile.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Packages of the working directory do not hide those of this project.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Keep freed memory: page faults cost a third of the time of small convolutions. glibc reads these at start only.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))


def stop_on_hangup() -> None:
    """Stop as after Ctrl-C when the terminal is closed, unless `nohup` makes this process ignore that."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def date_back() -> None:
    """Set modification times in the future to the present: Snakemake fails jobs whose inputs are from the future.

    Such times come from a clock that was ahead. No file becomes newer, so no job runs again because of this.
    """
    now = time.time()
    for path in chain(layout.RESULTS.rglob("*"), layout.REPORTS.rglob("*")):
        with suppress(OSError):  # the file was removed meanwhile, or belongs to another user
            if path.stat().st_mtime > now:
                os.utime(path, (now, now))


def gpus(experiment: Experiment, elsewhere: bool) -> int:
    """Returns the number of GPUs that a process of a job needs, 0 or 1.

    With `device: auto` it is 1 if this machine has a GPU, or if jobs run elsewhere, because the machine that submits
    jobs to a cluster often has no GPU itself.

    Args:
        experiment: the study of the job.
        elsewhere: whether jobs run on other machines.
    """
    return int(experiment.device == "cuda" or (experiment.device == "auto" and (elsewhere or _has_gpu())))


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def cancel_left_jobs(jobs: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Cancel the SLURM jobs of a killed Snakemake that this call is about to submit again.

    Two jobs would write the same outputs. A training job saves its state before it ends, so nothing is lost. Snakemake
    locks the directory, so no other Snakemake waits for these jobs.

    Args:
        jobs: rule and wildcards of each job that this call will run.

    Raises:
        WorkflowError: The jobs do not end within two minutes, or squeue fails.
    """
    # The plugin stores the rule and the wildcards in the comment of a job.
    comments = {f"rule_{rule}_wildcards_{'_'.join(wildcards)}" for rule, wildcards in jobs}

    def left_jobs() -> list[str]:
        command = ["squeue", "--me", "--noheader", "--format=%i|%Z|%k"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise WorkflowError(
                f"squeue fails ({error}): start this on a login node of the cluster, or without --workflow-profile"
            ) from None
        queue = [line.split("|", 2) for line in output.splitlines()]
        return [number for number, place, comment in queue if place == os.getcwd() and comment in comments]

    left = left_jobs()
    if not left:
        return
    print(f"Cancelling the SLURM jobs of a killed Snakemake first: {' '.join(left)}", file=sys.stderr)
    subprocess.run(["scancel", *left], check=True)
    deadline = time.monotonic() + LEFT_JOBS_SECONDS
    while left := left_jobs():
        if time.monotonic() > deadline:
            raise WorkflowError(
                f"SLURM jobs {' '.join(left)} of a killed Snakemake do not end within 2 minutes: cancel them with "
                "scancel, or ask the administrators of the cluster, then start again"
            )
        time.sleep(2)


def check_all_ran(left: Iterable[Any]) -> None:
    """Check that Snakemake has run all jobs: it can lose one that waits for its next attempt while others are added.

    Args:
        left: the jobs that have not run.

    Raises:
        WorkflowError: There are some.
    """
    if number := len(list(left)):
        raise WorkflowError(f"{number} jobs have not run: run the same command again")


def save_study_files(experiments: Mapping[str, Experiment]) -> None:
    """Write the study files as they were read: other processes of this study must use the same settings."""
    layout.STUDIES.mkdir(parents=True, exist_ok=True)
    for name, experiment in experiments.items():
        with atomic_write(layout.STUDIES / f"{name}.yaml") as file:
            file.write(experiment.text.encode())


def call_at_exit_if_no_job_runs(action: Callable[[], None]) -> None:
    """Call a function at the end of this process if Snakemake finds no job to run, and so calls no `onsuccess`."""

    def keep(record: logging.LogRecord) -> bool:
        if record.msg == NOTHING_TO_BE_DONE_MSG:
            atexit.register(_call_in, Path.cwd(), action)  # Snakemake leaves --directory before
        return True

    snakemake_logger.addFilter(keep)


def _call_in(directory: Path, action: Callable[[], None]) -> None:
    with chdir(directory):
        action()
