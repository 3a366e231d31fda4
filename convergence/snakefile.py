"""Functions that the Snakefile calls: environment, signals, file times, GPUs, SLURM jobs and study files."""

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
from snakemake.shell import shell

from convergence import layout
from convergence.gpus import visible_gpus
from convergence.schema import Experiment
from diffusion.files import atomic_write

LEFT_JOBS_SECONDS = 120  # until cancelled SLURM jobs must have ended


def set_environment(root: str) -> None:
    """Sets environment variables for all jobs: where Python finds this project, and how glibc manages memory.

    Args:
        root: directory of the Snakefile.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Packages of the working directory do not hide those of this project.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Keep freed memory: page faults cost a third of the time of small convolutions. glibc reads these at start only.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))


def hold_interrupts() -> None:
    """Makes Ctrl-C wait in each new job until the job imports `convergence.jobs`, which hides Python's traceback.

    Without GNU env 8.31 or newer, Ctrl-C does not wait.
    """
    command = "env --block-signal=INT"
    if not subprocess.run([*command.split(), "true"], capture_output=True).returncode:
        shell.prefix(command)


def stop_on_hangup() -> None:
    """Makes Snakemake stop as after Ctrl-C when the terminal is closed, unless `nohup` started Snakemake."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def date_back() -> None:
    """Sets the modification times of results and reports that are in the future to the present.

    Such times come from a clock that was ahead, and a job of Snakemake fails if its inputs have such times. No file
    becomes newer, so no job runs again because of this change.
    """
    now = time.time()
    for path in chain(layout.RESULTS.rglob("*"), layout.REPORTS.rglob("*")):
        with suppress(OSError):  # the file was removed meanwhile, or belongs to another user
            if path.stat().st_mtime > now:
                os.utime(path, (now, now))


def gpus(experiment: Experiment, elsewhere: bool) -> int:
    """Returns the number of GPUs that each process of a job needs, 0 or 1.

    With `device: auto`, this is 1 if this machine has a GPU that CUDA_VISIBLE_DEVICES does not hide, or if jobs run on
    other machines. The machine that submits jobs to a cluster often has no GPU.

    Args:
        experiment: the study of the job.
        elsewhere: whether jobs run on other machines.

    Raises:
        StudyError: CUDA_VISIBLE_DEVICES names a GPU that this machine does not have.
    """
    return int(experiment.device == "cuda" or (experiment.device == "auto" and (elsewhere or bool(visible_gpus()))))


def cancel_left_jobs(jobs: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Cancels SLURM jobs that a killed Snakemake left, if this call is about to submit the same jobs again.

    Otherwise two jobs would write the same outputs. A training job saves its state before it ends, so no training is
    lost. Snakemake locks the directory, so no other Snakemake waits for the cancelled jobs.

    Args:
        jobs: rule and wildcards of each job that this call will run.

    Raises:
        WorkflowError: the jobs do not end within two minutes, or squeue fails.
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
    """Checks that Snakemake has run all jobs.

    Snakemake can lose a job that waits for its next attempt while other jobs are added.

    Args:
        left: the jobs that have not run.

    Raises:
        WorkflowError: there are jobs that have not run.
    """
    if number := len(list(left)):
        raise WorkflowError(f"{number} jobs have not run: run the same command again")


def save_study_files(experiments: Mapping[str, Experiment]) -> None:
    """Writes the text of the study files, as it was read, to `results/studies/`.

    Other processes of a study read these copies, so that all processes use the same settings.
    """
    layout.STUDIES.mkdir(parents=True, exist_ok=True)
    for name, experiment in experiments.items():
        with atomic_write(layout.STUDIES / f"{name}.yaml") as file:
            file.write(experiment.text.encode())


def call_at_exit_if_no_job_runs(action: Callable[[], None]) -> None:
    """Calls a function at the end of this process if Snakemake finds no job to run.

    In this case, Snakemake does not call `onsuccess`.
    """

    def keep(record: logging.LogRecord) -> bool:
        if record.msg == NOTHING_TO_BE_DONE_MSG:
            atexit.register(_call_in, Path.cwd(), action)  # Snakemake leaves --directory before
        return True

    snakemake_logger.addFilter(keep)


def _call_in(directory: Path, action: Callable[[], None]) -> None:
    with chdir(directory):
        action()
