"""Writes files atomically, reads files with checks, and locks directories."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from diffusion.errors import FileError, InputError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary binary file for a `with` block. The temporary file replaces `path` if the block succeeds.

    If the block fails, the temporary file is removed, and `path` stays as it is. The content is on the disk before
    the temporary file is renamed. Therefore, `path` has either the old or the new content after a power failure.

    First, the function removes temporary files that earlier processes left for the same path. If another process is
    still writing `path`, the write of that process fails.

    Raises:
        OSError: if the file cannot be written. The attribute `filename` of the error is `path`.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        # Without this, a crash of the machine can leave the new name with the content missing.
        _sync(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some network file systems cannot do this for a directory
            _sync(path.parent)
    except OSError as error:
        # The error of a full disk has no file name. The error of another file keeps its own.
        if error.filename is None or Path(error.filename) == temporary:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Writes the content of a file or directory from the cache of the operating system to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: str = "|u1") -> None:
    """Writes the header of a .npy file for an array in C order. The caller then writes the data.

    Args:
        file: file that is open for writing.
        shape: shape of the array.
        dtype: type of the numbers in NumPy's notation; "|u1" is uint8.
    """
    import numpy as np  # slow to import: dry runs import this module

    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def save_npy(path: Path, array: "np.ndarray") -> None:
    """Writes an array of numbers [...] to a .npy file.

    Raises:
        OSError: if the file cannot be written. Unlike `numpy.save`, this function also raises the error if the disk is
            full.
    """
    with atomic_write(path) as file:
        write_npy_header(file, array.shape, array.dtype.str)
        file.write(array.tobytes())


def check_free_space(path: Path, size: int) -> None:
    """Checks that the disk of `path` has free space for a file of `size` bytes.

    Raises:
        OSError: if the free space is less than `size` bytes.
    """
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(path: Path, digest: str) -> None:
    """Checks that a file has not changed since it was written.

    Args:
        path: file to check.
        digest: SHA-256 digest that `sha256` returned when the file was written.

    Raises:
        FileError: if the SHA-256 digest of the file differs from `digest`.
    """
    if sha256(path) != digest:
        raise FileError(path, "has changed since it was written (its sha256 differs from the recorded one)")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, which must be a JSON object, as a dict.

    Raises:
        FileError: if the file is missing, cannot be read, or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(path, "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(path, f"is damaged ({error})") from None
    if not isinstance(content, dict):
        raise FileError(path, "is damaged (it does not hold a JSON object)")
    return content


@contextmanager
def exclusive_lock(directory: Path) -> Iterator[None]:
    """Locks the directory of a run during a `with` block, so that only one process trains this run.

    A second process is possible, because training may continue after Snakemake was killed.

    The file `.lock` in the directory contains the process id and the host name of the process that holds the lock. The
    lock ends with the block or with the process, but the file remains. On a file system without locks, the function
    logs a warning and does not lock.

    Raises:
        InputError: if another process holds the lock, or if locking fails for another reason.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some file systems report the second one
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InputError(
                f"{directory}: another process is training this run ({holder}): wait until it ends, or stop it, then "
                f"start again; if it no longer exists, delete {path}"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                logger.warning("%s: the file system has no locks: make sure that one process trains this run", path)
                yield
                return
            raise InputError(
                f"{path}: the file system cannot lock files ({error.strerror}): move the results to another one, or "
                "ask its administrator"
            ) from None
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
        yield
