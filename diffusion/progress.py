"""Progress reports of long loops, written to the log."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10  # least time between two reports

Item = TypeVar("Item")


class Progress:
    """Logs the finished count, the rate and the remaining time, at most once every `REPORT_SECONDS`.

    Args:
        label: What is counted, in the plural, such as "images read".
        total: Final count.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total = label, total
        self.start = self.reported = time.monotonic()

    def update(self, done: float) -> None:
        """Reports the count if a report is due.

        Args:
            done: Finished count so far, more than 0. A fraction counts part of an item.
        """
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported, rate = now, done / max(now - self.start, 1e-9)
            left = (self.total - done) / rate
            logger.info("%.0f of %d %s, %.3g/s, %.0f s left", done, self.total, self.label, rate, left)


def with_progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yields the items one by one and reports the progress. `label` is as in `Progress`."""
    progress = Progress(label, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)
