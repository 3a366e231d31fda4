"""Writes progress reports of long loops to the log."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

IMPORTED = time.monotonic()
REPORT_SECONDS = 10  # least time between two reports

Item = TypeVar("Item")


class Progress:
    """Progress of a loop: logs the number of finished items, the rate and the remaining time.

    The rate excludes the items before the first call of `update`, because the first batch of a process also compiles
    kernels and allocates memory.

    Args:
        label: what the number counts, in the plural, such as "images read".
        total: number of all items.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total = label, total
        self.reported = time.monotonic()
        self.first: tuple[float, float] | None = None  # time and items of the first call of `update`

    def update(self, done: float) -> None:
        """Logs the progress if the last report is at least `REPORT_SECONDS` old. The first call logs nothing.

        Args:
            done: number of finished items, more than at the previous call. The number may include a fraction of an
                item.
        """
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        elif now - self.reported >= REPORT_SECONDS:
            start, before = self.first
            self.reported, rate = now, (done - before) / max(now - start, 1e-9)
            left = (self.total - done) / rate
            digits = ".3g" if rate < 100 else ",.0f"
            logger.info("%d of %d %s, %s/s, %.0f s left", done, self.total, self.label, format(rate, digits), left)


def with_progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yields the items one by one and logs the progress. `label` is the same as in `Progress`."""
    progress = Progress(label, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)


@cache
def log_ready() -> None:
    """Logs, at its first call in a process, how long the process has run, at the level DEBUG.

    Each kind of work calls this function when its first useful result exists, such as a training step or a batch of
    features.
    """
    logger.debug("ready after %.1f s", _process_seconds())


def _process_seconds() -> float:
    """Returns the age of this process in seconds; without /proc, the time since this module was imported."""
    try:
        # Field 22 is the start in clock ticks since the boot. Field 2, the name, may contain spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - IMPORTED
