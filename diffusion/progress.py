"""Writes progress reports of long loops to the log."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10  # least time between two reports

Item = TypeVar("Item")


class Progress:
    """Progress of a loop: logs the number of finished items, the rate and the remaining time.

    Args:
        label: what the number counts, in the plural, such as "images read".
        total: number of all items.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total = label, total
        self.start = self.reported = time.monotonic()

    def update(self, done: float) -> None:
        """Logs the progress if the last report is at least `REPORT_SECONDS` old.

        Args:
            done: number of finished items, more than 0. The number may include a fraction of an item.
        """
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported, rate = now, done / max(now - self.start, 1e-9)
            left = (self.total - done) / rate
            logger.info("%.0f of %d %s, %.3g/s, %.0f s left", done, self.total, self.label, rate, left)


def with_progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yields the items one by one and logs the progress. `label` is the same as in `Progress`."""
    progress = Progress(label, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)
