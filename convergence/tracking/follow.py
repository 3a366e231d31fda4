"""Forwarding of results to MLflow: once, or repeatedly in a process next to a running study."""

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
from convergence.tracking.content import logger
from convergence.tracking.store import Study

PASS_SECONDS = 10
LOCK_SECONDS = 10  # a tracking process whose parent was killed ends within this time
FOLLOW_ADVICE = "the next run of the study, or `convergence sync {name}`, forwards the rest"
SYNC_ADVICE = "start that server or correct MLFLOW_TRACKING_URI, then run `convergence sync {name}` again"


def follow(uri: str, paths: Iterable[Path], parent: int) -> None:
    """Forwards studies to MLflow until this process receives SIGTERM or its parent process ends.

    Errors of the store are only logged: a study must not fail because of them.

    Args:
        uri: address of MLflow's store or server.
        paths: study files.
        parent: number of the process that started this one.

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
            _forward(uri, experiments, stopped, FOLLOW_ADVICE)
    except Timeout:
        logger.warning("another process already forwards the studies of %s: this process ends", Path.cwd())


def sync(uri: str, paths: Iterable[Path]) -> bool:
    """Forwards the results of studies to MLflow once, and logs errors of the store.

    Args:
        uri: address of MLflow's store or server.
        paths: study files.

    Returns:
        Whether all studies were forwarded.

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


def _forward(uri: str, experiments: dict[Path, Experiment], stopped: Callable[[], bool], advice: str) -> set[Path]:
    """Forwards the studies repeatedly until stopped, with one last pass after that.

    An error ends only the present pass of its study. It is logged once; the next pass connects to the store again.

    Args:
        uri: address of MLflow's store or server.
        experiments: study file -> study.
        stopped: whether to stop.
        advice: what the user can do after an error; `{name}` is replaced by the name of the study.

    Returns:
        The files of the studies that the last pass could not forward.
    """
    _configure_mlflow()
    began = time.time()
    studies: dict[Path, Study] = {}
    failing: set[Path] = set()
    while True:
        stopping = stopped()
        for path, experiment in experiments.items():
            try:
                studies[path] = studies.get(path) or Study(uri, path, experiment)
                studies[path].forward(None if stopping else began)
                failing.discard(path)
            except Exception as error:  # no error of the store may end this process
                studies.pop(path, None)
                if path not in failing:
                    reason = " ".join(str(error).split())[:200]
                    logger.warning(
                        "%s is not tracked in %s (%s): %s", path, uri, reason, advice.format(name=experiment.name)
                    )
                failing.add(path)
        if stopping:
            with suppress(BrokenPipeError):  # the parent process may have ended
                for study in studies.values():
                    print(f"{study.experiment.name}: {study.address}", flush=True)
            return failing
        next_pass = time.monotonic() + PASS_SECONDS
        while time.monotonic() < next_pass and not stopped():
            time.sleep(1)


def _configure_mlflow() -> None:
    """Sets MLflow's environment variables: little output, and no long retries, because the next pass tries again."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("urllib3").setLevel(logging.ERROR)
