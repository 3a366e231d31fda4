"""How far a long work is: a line now and then, wherever its log goes."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

TELL_SECONDS = 10

Item = TypeVar("Item")


class Progress:
    """Tells, every ten seconds at most, how much of a count is done, how fast, and how long the rest takes.

    Args:
        what: plural, such as "images read".
        total: how many.
    """

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.start = self.told = time.monotonic()

    def update(self, done: float) -> None:
        """So many are done: more than 0."""
        now = time.monotonic()
        if now - self.told >= TELL_SECONDS:
            self.told, rate = now, done / max(now - self.start, 1e-9)
            left = (self.total - done) / rate
            logger.info("%g of %d %s, %.3g/s, %.0f s left", round(done, 1), self.total, self.what, rate, left)


def with_progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, one by one, while `Progress` tells how many are through."""
    progress = Progress(what, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)
