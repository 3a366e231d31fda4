"""Writing files so that a reader never meets half of one, and no two processes write the same; reading what may be
damaged.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from diffusion.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all went well, and vanishes otherwise.

    What a killed writer of the same path left behind goes first; one that is still at work, forgotten, then fails.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        # A full disk says no name, and the temporary one tells a reader nothing; another file keeps its own.
        if error.filename is None or Path(error.filename) == temporary:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_npy_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """The header of a .npy file of uint8 numbers of this shape, in C order; they follow."""
    import numpy as np  # not for every dry run

    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def sha256(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(path: Path, digest: str) -> None:
    """Make sure that a file holds what it held when its `sha256` was taken.

    Raises:
        InputError: it does not.
    """
    if sha256(path) != digest:
        raise InputError(f"{path}: changed since it was written (sha256): delete it and run the same command again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing: run the same command again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}): delete it and run the same command again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (no JSON object): delete it and run the same command again")
    return content


@contextmanager
def exclusive_lock(directory: Path) -> Iterator[None]:
    """Keep a second trainer off a run: one may still be at work after what started it was killed.

    Raises:
        InputError: another process is in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{directory}: another process is training this run: wait until it ends, or stop it, and start again"
        ) from None
    with lock:
        yield
