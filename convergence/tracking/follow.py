"""Sends results to MLflow: once, or repeatedly in a process that runs at the same time as a study."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from convergence import layout
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from convergence.tracking.connection import check_answer, configure_mlflow
from convergence.tracking.content import logger
from convergence.tracking.problem import WARNING, problem
from convergence.tracking.store import Study

PASS_SECONDS = 10
LOCK_SECONDS = 10  # a tracking process whose parent was killed ends within this time
FOLLOW_ADVICE = "; the next run of the study, or `convergence sync {name}`, forwards the rest"
SYNC_ADVICE = ", then run `convergence sync {name}` again"


def follow(uri: str, paths: Iterable[Path], parent: int) -> None:
    """Sends results to MLflow repeatedly, until this process receives SIGTERM or SIGINT or its parent process ends.

    Errors of MLflow are logged and not raised: they must not stop a study.

    Args:
        uri: address of MLflow's tracking store or server.
        paths: study files.
        parent: process ID of the process that started this process.

    Raises:
        InputError: if a study file has a mistake.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))

    def stopped() -> bool:
        # The system gives an orphaned process another parent.
        return bool(received) or os.getppid() != parent

    os.nice(10)  # training has priority
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s tracking: %(message)s", force=True)
    experiments = {path: load_experiment(path) for path in paths}
    try:
        with _lock():
            problems = _forward(uri, experiments, stopped, FOLLOW_ADVICE)
    except Timeout:
        problems = [f"another process already forwards the studies of {Path.cwd()}: this process ends"]
        logger.warning("%s", problems[0])
    with suppress(BrokenPipeError):  # the parent process may have ended
        for line in problems:
            print(WARNING + line, flush=True)


def sync(uri: str, paths: Iterable[Path]) -> bool:
    """Sends the results of studies to MLflow once, and logs errors of MLflow.

    Args:
        uri: address of MLflow's tracking store or server.
        paths: study files.

    Returns:
        whether the results of all studies were sent.

    Raises:
        InputError: if a study file has a mistake.
    """
    experiments = {path: load_experiment(path) for path in paths}
    try:
        with _lock():
            return not _forward(uri, experiments, lambda: True, SYNC_ADVICE)
    except Timeout:
        logger.warning(
            "another process already forwards the studies of %s: run `convergence sync %s` again after it has ended",
            Path.cwd(), " ".join(experiment.name for experiment in experiments.values()),
        )  # fmt: skip
        return False


def _lock() -> FileLock:
    """Returns a lock that one tracking process at a time can hold in this directory; acquiring it raises `Timeout`."""
    layout.RESULTS.mkdir(exist_ok=True)
    return FileLock(layout.RESULTS / ".tracking.lock", timeout=LOCK_SECONDS)


def _forward(uri: str, experiments: dict[Path, Experiment], stopped: Callable[[], bool], advice: str) -> list[str]:
    """Sends results repeatedly until stopped, and once after that. Prints the address of each study in MLflow.

    An error ends only the present pass of its study, and is logged once. The next pass connects to MLflow again.

    Args:
        uri: address of MLflow's tracking store or server.
        experiments: study file -> study.
        stopped: function that returns whether to stop.
        advice: end of the message about an error; `{name}` is replaced by the name of the study.

    Returns:
        a message for each study whose results could not be sent in the last pass.
    """
    configure_mlflow()
    began = time.time()
    studies: dict[Path, Study] = {}
    problems: dict[Path, str] = {}
    while True:
        stopping = stopped()
        errors = _forward_once(uri, experiments, studies, None if stopping else began)
        reported = set(problems)
        problems = {
            path: problem(error, uri, experiments[path].name) + advice.format(name=experiments[path].name)
            for path, error in errors.items()
        }
        for path in problems.keys() - reported:
            logger.warning("%s", problems[path])
        if stopping:
            break
        next_pass = time.monotonic() + PASS_SECONDS
        while time.monotonic() < next_pass and not stopped():
            time.sleep(0.2)
    for study in studies.values():
        layout.untracked(study.experiment.name).unlink(missing_ok=True)
        with suppress(BrokenPipeError):  # the parent process may have ended
            print(f"{study.label}: {study.address}", flush=True)
    return list(problems.values())


def _forward_once(
    uri: str, experiments: dict[Path, Experiment], studies: dict[Path, Study], since: float | None
) -> dict[Path, Exception]:
    """Sends the results of each study once.

    A study that is not in `studies` is first connected to MLflow and added. A study with an error is removed.

    Returns:
        study file -> error.
    """
    errors: dict[Path, Exception] = {}
    try:
        check_answer(uri)
    except Exception as error:  # no error of the store may end this process
        studies.clear()
        return dict.fromkeys(experiments, error)
    for path, experiment in experiments.items():
        try:
            studies[path] = studies.get(path) or Study(uri, path, experiment)
            studies[path].forward(since)
        except Exception as error:
            studies.pop(path, None)
            errors[path] = error
    return errors
