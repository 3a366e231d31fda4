"""Starts and stops the process that sends results to MLflow while jobs run."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable

from convergence import layout
from convergence.tracking.problem import WARNING

LAST_PASS_SECONDS = 120  # until the process must have forwarded the rest
TRACKING_LOG = layout.RESULTS / "tracking.log"
_tracker: subprocess.Popen | None = None


def start_tracking(studies: Collection[str]) -> None:
    """Starts the process that sends the results of studies to MLflow.

    Args:
        studies: names of the studies. No process is started if there are none.
    """
    global _tracker
    if not studies:
        return
    layout.RESULTS.mkdir(exist_ok=True)
    for name in studies:
        layout.untracked(name).touch()
    command = [sys.executable, "-m", "convergence", "sync", "--follow", str(os.getpid()), *studies]
    with TRACKING_LOG.open("a") as log:
        # In a session of its own it does not receive Ctrl-C, so it can report how the jobs ended.
        _tracker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True)


def stop_tracking(studies: Collection[str]) -> list[str]:
    """Stops the tracking process after it has sent the remaining results to MLflow.

    The warnings of the process are printed.

    Args:
        studies: names of the studies, for a warning if the process does not end properly.

    Returns:
        one line per study in MLflow: name and address of the study.
    """
    if _tracker is None:
        return []
    _tracker.send_signal(signal.SIGTERM)
    rest = f"the next run of the study, or `convergence sync {' '.join(studies)}`, forwards the rest"
    try:
        lines = _tracker.communicate(timeout=LAST_PASS_SECONDS)[0].splitlines()
    except subprocess.TimeoutExpired:
        lines = [f"{WARNING}MLflow does not answer in time: {rest}"]
    if _tracker.returncode not in (None, 0, -signal.SIGTERM):  # SIGTERM ends a process that has not begun
        lines.append(f"{WARNING}the process that forwards results to MLflow has failed ({TRACKING_LOG}): {rest}")
    for line in lines:
        if line.startswith(WARNING):
            print(line, file=sys.stderr)
            for name in studies:  # another process may have removed it
                layout.untracked(name).touch()
    return [line for line in lines if not line.startswith(WARNING)]


def forward_missing(studies: Iterable[str]) -> None:
    """Sends results that MLflow may lack because a tracking process was killed or MLflow failed.

    Args:
        studies: names of the studies.
    """
    left = [name for name in studies if layout.untracked(name).exists()]
    if left:
        subprocess.run([sys.executable, "-m", "convergence", "sync", *left], stdout=sys.stderr)
