"""The process that forwards the results of studies to MLflow while they run."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from convergence import layout
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from convergence.tracking.content import logger
from convergence.tracking.store import Study
from diffusion.errors import InputError

PASS_SECONDS = 10
LOCK_SECONDS = 10
ADVICE = {
    "follow": "the next start forwards the rest",
    "sync": "start that server, or mend MLFLOW_TRACKING_URI, then make track again",
}
BUSY = {
    "follow": "this one leaves it to that",
    "sync": "it forwards them; once it has ended, make track forwards what is left",
}


def follow(
    uri: str, experiments: dict[Path, Experiment], stopped: Callable[[], bool], advice: str = ADVICE["follow"]
) -> set[Path]:
    """Pass over the studies until stopped, and once more then: what was written before the stop is forwarded.

    An error ends the pass of its study alone and is told once, with an advice; the next pass asks the store anew.

    Returns:
        The files of the studies that the last pass could not forward.
    """
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
            except Exception as error:  # whatever becomes of the store, the study goes on
                studies.pop(path, None)
                if path not in failing:
                    reason = " ".join(str(error).split())[:200]
                    logger.warning("%s is not tracked in %s (%s): %s", path, uri, reason, advice)
                failing.add(path)
        if stopping:
            with suppress(BrokenPipeError):  # who started this may be gone
                for of in studies.values():
                    print(f"{of.experiment.name}: {of.address}", flush=True)
            return failing
        next_pass = time.monotonic() + PASS_SECONDS
        while time.monotonic() < next_pass and not stopped():
            time.sleep(1)


def main(arguments: list[str] | None = None) -> int:
    """What `python -m workflow.tracking` does; returns its exit code.

    That is 1 for a wrong experiment file, and where `sync` could not forward a study. What befalls the store is no
    failure of `follow`, which works beside a study.
    """
    parser = argparse.ArgumentParser(prog="python -m workflow.tracking", description="Forward studies to MLflow.")
    parser.add_argument("command", choices=["follow", "sync"], help="follow: until told to stop; sync: one pass")
    parser.add_argument("experiments", nargs="+", type=_file, help="studies, by name or file")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="the process that started this one")
    options = parser.parse_args(arguments)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))

    def stopped() -> bool:
        # The system gives an orphan another parent.
        return options.command == "sync" or bool(received) or os.getppid() != options.parent_pid

    _be_quiet_and_quick()
    try:
        experiments = {path: load_experiment(path) for path in options.experiments}
        layout.RESULTS.mkdir(exist_ok=True)
        # A follower whose parent was just killed needs a moment to let go.
        with FileLock(layout.RESULTS / ".tracking.lock", timeout=LOCK_SECONDS):
            failed = bool(follow(options.uri, experiments, stopped, ADVICE[options.command]))
    except InputError as error:
        logger.error("%s", error)
        return 1
    except Timeout:
        failed = True
        logger.warning("another process already tracks the studies of %s: %s", Path.cwd(), BUSY[options.command])
    return int(failed and options.command == "sync")


def _file(text: str) -> Path:
    """The experiment file of a study, from its name or path."""
    return Path(text) if text.endswith(".yaml") else Path("experiments", f"{text}.yaml")


def _be_quiet_and_quick() -> None:
    """Training has the cores, and a request that fails is made again at the next pass anyway."""
    os.nice(10)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s tracking: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
