"""Writing files so that a reader never meets half of one, and no two processes write the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from diffusion import StudyError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all went well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep a second trainer off a run: one may still be at work after what started it was killed.

    Raises:
        StudyError: another process is in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StudyError(
            f"{directory}: another process is training this run: wait until it ends, or stop it, and start again"
        ) from None
    with lock:
        yield
