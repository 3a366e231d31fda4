"""What the scripts of all rules share: logging, errors, the device."""

import errno
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convergence.errors import StudyError
from diffusion.errors import InputError, Stopped


def job_name(snakemake: Any) -> str:
    """The rule and the wildcards of a job, such as `train openmoji uni05-1a2b3c4d 0 128`."""
    return snakemake.rule + "".join(f" {value}" for value in snakemake.wildcards)


def log_to(path: str, name: str) -> None:
    """Send this process's log to the terminal and to a file, under a name."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s  {name}: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(path)],
    )


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Run the body of a script: log to the terminal and the rule's log file, tell a mistake in one sentence."""
    log_to(snakemake.log[0], job_name(snakemake))
    with exit_on_job_error():
        yield


@contextmanager
def exit_on_job_error() -> Iterator[None]:
    """End this process with exit code 1 and one sentence in its log where it was stopped, or where the user or the
    machine made a mistake.

    Raises:
        RuntimeError: it is not torch's for a full GPU.
        OSError: it is not for a full disk or a missing permission.
    """
    try:
        yield
    except (InputError, Stopped) as error:
        logging.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logging.error("stopped: the same command does it again")
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every job imports
            raise
        logging.error("the memory of the GPU is full: let fewer jobs share it (--resources gpu=1), or lower "
                      "train.micro_batch, sample.batch_size or probe.batch_size")  # fmt: skip
        sys.exit(1)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}:
            raise
        logging.error("%s: %s: make room or mend the permission, then run the same command again",
                      error.filename or Path.cwd(), error.strerror)  # fmt: skip
        sys.exit(1)


def use_torch(threads: int, gpus: int) -> str:
    """Set torch's threads for this process and give the device to work on.

    Raises:
        StudyError: a GPU was asked for, and torch finds none.
    """
    import torch

    torch.set_num_threads(threads)
    if gpus and not torch.cuda.is_available():
        raise StudyError(
            f"torch {torch.__version__} finds no GPU on {platform.node()}: say `device: cpu` in the study, "
            "or install a torch and a driver that fit each other"
        )
    # Shapes stay: the fastest algorithms are worth a search.
    torch.backends.cudnn.benchmark = bool(gpus)
    return "cuda" if gpus else "cpu"
