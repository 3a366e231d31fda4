"""Finds the GPUs that jobs may use, and assigns them to jobs.

A job locks files while it uses a GPU: one file if it shares the GPU, all files of the GPU if it has the GPU alone. The
operating system unlocks them when the process ends, also after kill -9. All studies of a user on one machine use the
same files.
"""

import fcntl
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from convergence.errors import StudyError

VISIBLE = "CUDA_VISIBLE_DEVICES"
ALONE = "CONVERGENCE_GPU_ALONE"  # set in a process that runs again because the memory of a shared GPU was full
NO_GPU = {"", "-1", "NoDevFiles"}  # values of CUDA_VISIBLE_DEVICES
JOBS_PER_GPU = 2  # by default: a job starts its process while another one computes
MEMORY_SHARE = 0.4  # of the memory of a GPU: a job that needs more has the GPU alone by default
UNKNOWN_MEGABYTES = 16_000  # memory of a GPU of unknown size
MAX_JOBS_PER_GPU = 16  # number of lock files of each GPU
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)
_locks: list[IO[str]] = []  # of this process


class Gpu(NamedTuple):
    """A GPU or MIG device: its name in CUDA_VISIBLE_DEVICES, and its memory."""

    id: str
    megabytes: int


def visible_gpus() -> list[Gpu]:
    """Returns the GPUs of this machine that CUDA_VISIBLE_DEVICES names; all GPUs if this variable is not set.

    If MIG divides a GPU, its MIG devices are returned instead.

    Raises:
        StudyError: CUDA_VISIBLE_DEVICES names a GPU that this machine does not have.
    """
    installed, named = _installed(), os.environ.get(VISIBLE)
    if named is None or not installed:
        return list(installed)
    entries = [] if named.strip() in NO_GPU else [entry.strip() for entry in named.split(",")]
    return list(dict.fromkeys(_find(entry, installed) for entry in entries))


def _find(entry: str, installed: Sequence[Gpu]) -> Gpu:
    """Returns the GPU that one entry of CUDA_VISIBLE_DEVICES names: an index, or the first characters of an id.

    Raises:
        StudyError: no GPU, or more than one, has this name.
    """
    if entry.isdecimal() and int(entry) < len(installed):
        # nvidia-smi orders GPUs by their slots, CUDA by their speed unless CUDA_DEVICE_ORDER is set.
        sizes = {gpu.megabytes for gpu in installed}
        same_order = len(sizes) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        return installed[int(entry)] if same_order else Gpu(entry, min(sizes))
    found = [gpu for gpu in installed if entry.startswith(("GPU-", "MIG-")) and gpu.id.startswith(entry)]
    if len(found) != 1:
        ids = ", ".join(gpu.id for gpu in installed)
        raise StudyError(
            f"{VISIBLE}: `{entry}` is not one GPU of this machine: name indices from 0 to {len(installed) - 1}, or ids "
            f"({ids}), separated by commas, or unset the variable"
        )
    return found[0]


@cache
def _installed() -> tuple[Gpu, ...]:
    """Returns the GPUs that nvidia-smi lists; without nvidia-smi, the device files, as indices."""
    query = _nvidia_smi("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
    megabytes = dict(re.findall(r"(GPU-\S+), (\d+)", query))
    gpus: list[Gpu] = []
    for line in _nvidia_smi("-L").splitlines():
        identifier, size = re.search(r"UUID: ([^)]+)", line), re.search(r"MIG .*?(\d+)gb", line)
        if not identifier:
            continue
        if size and gpus and gpus[-1].id.startswith("GPU-"):
            gpus.pop()  # the GPU that MIG divides
        known = 1000 * int(size[1]) if size else int(megabytes.get(identifier[1], UNKNOWN_MEGABYTES))
        gpus.append(Gpu(identifier[1], known))
    files = sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(gpus) or tuple(Gpu(str(index), UNKNOWN_MEGABYTES) for index in range(files))


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def show_gpus(limit: int | None, jobs_per_gpu: int) -> int:
    """Makes the first `limit` visible GPUs visible to all jobs that this process starts, and prints their number.

    Args:
        limit: number of GPUs to use; None: all visible ones.
        jobs_per_gpu: largest number of jobs that share a GPU.

    Returns:
        the number of jobs that use GPUs at the same time. If this machine has no GPU, the number of GPUs is assumed to
        be `limit` or 1, so that Snakemake can plan a study.

    Raises:
        StudyError: fewer GPUs than `limit` are visible, or CUDA_VISIBLE_DEVICES names no GPU or a wrong one.
    """
    gpus = visible_gpus()
    if not gpus and VISIBLE in os.environ and limit != 0:
        raise StudyError(
            f"{VISIBLE}={os.environ[VISIBLE]} names no GPU of this machine, but `device: cuda` needs one: unset it"
        )
    count = (len(gpus) or 1) if limit is None else limit
    if gpus:
        if count > len(gpus):
            raise StudyError(
                f"--resources gpu={count}: only {len(gpus)} can be used: lower it, or let several jobs share "
                "each GPU with --config jobs_per_gpu=N"
            )
        os.environ[VISIBLE] = ",".join(gpu.id for gpu in gpus[:count])
        print(f"GPUs: {count}, with up to {jobs_per_gpu} job(s) on each", file=sys.stderr)
    return count * jobs_per_gpu


def default_jobs_per_gpu(needed: int) -> int:
    """Returns how many jobs share a GPU by default: 2 if each of them needs a small part of its memory, otherwise 1.

    Args:
        needed: memory of the GPU that a job needs, in bytes.
    """
    smallest = min((gpu.megabytes for gpu in visible_gpus()), default=UNKNOWN_MEGABYTES)
    return JOBS_PER_GPU if needed < MEMORY_SHARE * smallest * 1e6 else 1


def take_gpus(count: int, jobs_per_gpu: int) -> None:
    """Waits until GPUs are free, locks them until this process ends, and makes only these visible to torch.

    Call this function before torch uses a GPU. Of the visible GPUs, those with the fewest jobs are taken. Jobs wait in
    a queue: the job that has waited longest gets the next GPU.

    Args:
        count: number of GPUs; if fewer are visible, all of them are taken.
        jobs_per_gpu: largest number of jobs on each of these GPUs, with this one: 1 to 16. With 1, no other job joins.
            0: GPUs are not assigned, because the job needs none, or a cluster has assigned them.
    """
    if not count or not jobs_per_gpu:
        return
    named = os.environ.get(VISIBLE)
    ids = [gpu.id for gpu in visible_gpus()] if named is None else named.split(",")
    if not ids:
        return  # torch says what is missing
    if ALONE in os.environ:
        jobs_per_gpu = 1
    directory = Path(tempfile.gettempdir(), f"convergence-gpus-{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    with (directory / "queue").open("w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        waits = False
        while not (taken := _lock_gpus(directory, ids, count, jobs_per_gpu)):
            if not waits:
                logger.info("waiting for a free GPU")
                waits = True
            time.sleep(POLL_SECONDS)
    os.environ[VISIBLE] = ",".join(taken)


def _lock_gpus(directory: Path, ids: Sequence[str], count: int, jobs_per_gpu: int) -> list[str]:
    """Locks the GPUs with the fewest jobs if they are free, and returns their ids; otherwise returns no id."""
    free = {identifier: _lock_free_files(directory, identifier) for identifier in ids}
    chosen = sorted(ids, key=lambda identifier: -len(free[identifier]))[:count]
    if MAX_JOBS_PER_GPU - len(free[chosen[-1]]) >= jobs_per_gpu:
        chosen = []
    kept = MAX_JOBS_PER_GPU if jobs_per_gpu == 1 else 1
    for identifier, files in free.items():
        number = kept if identifier in chosen else 0
        _locks.extend(files[:number])
        for file in files[number:]:
            file.close()
    return chosen


def _lock_free_files(directory: Path, identifier: str) -> list[IO[str]]:
    """Locks all files of a GPU that no other process has locked, and returns them."""
    files: list[IO[str]] = []
    for index in range(MAX_JOBS_PER_GPU):
        file = (directory / f"{identifier.replace('/', '_')}.{index}").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.append(file)
        except BlockingIOError:
            file.close()
    return files


def is_gpu_full(error: BaseException | None) -> bool:
    """Returns whether an error, or the error during which it occurred, means that the memory of a GPU is full."""
    while error:
        # torch's own class; the text of CUDA and Triton; that of cuBLAS and cuDNN. Not every job imports torch.
        full = ("out of memory", "ALLOC_FAILED")
        if type(error).__name__ == "OutOfMemoryError" or (
            isinstance(error, RuntimeError) and any(text in str(error) for text in full)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def run_again_alone() -> Iterator[None]:
    """Starts this process again if the memory of a shared GPU is full.

    The process then waits until it has the GPU alone. A training job resumes from its last partial state.

    Raises:
        RuntimeError: the body raised a RuntimeError for another reason, or this process has its GPU alone.
    """
    try:
        yield
    except RuntimeError as error:
        if len(_locks) != 1 or not is_gpu_full(error):
            raise
        logger.warning("the memory of the GPU is full: this job runs again as soon as no other job uses the GPU")
        os.environ[ALONE] = "1"
        sys.stdout.flush()
        # A new program in the same process frees all memory, also that of CUDA, and its locks.
        os.execv(sys.executable, sys.orig_argv)
