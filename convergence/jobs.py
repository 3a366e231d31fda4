"""Functions that the scripts of all Snakemake rules use: logging, error messages and the device."""

import errno
import gc
import logging
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from convergence.errors import StudyError, with_remedy
from convergence.gpus import is_gpu_full, run_again_alone, take_gpus
from diffusion.errors import FileError, InputError, Stopped
from diffusion.progress import log_ready


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _print_unraisable(unraisable: Any) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


# Ctrl-C prints no traceback, even during the imports of a script, which imports this module first, and its last
# callbacks. Snakemake reports the stop once for all jobs.
sys.excepthook, sys.unraisablehook = _print_exception, _print_unraisable
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `convergence.snakefile.hold_interrupts` blocks it
# The imports of a job make a million objects that stay: looking for garbage among them takes a seventh of their time.
GARBAGE_THRESHOLDS = gc.get_threshold()
gc.set_threshold(100_000)
# The section of a study file that has the arguments which errors of the library name, by rule.
ON_A_DEVICE = {"train", "evaluate", "probe", "reference", "cost"}  # the library logs when their work begins
SECTIONS = {"dataset": "dataset", "evaluate": "evaluate", "probe": "probe", "reference": "evaluate"}

FULL_MEMORY = "the memory of the %s is full: %s, or lower train.micro_batch, sample.batch_size or probe.batch_size"
FULL_MACHINE = FULL_MEMORY % ("machine", "run fewer jobs at once (--cores 1)")
FULL_GPU = FULL_MEMORY % ("GPU", "end other programs that use it")


def job_name(snakemake: Any) -> str:
    """Returns the rule and the wildcards of a job as text, such as `train openmoji uni05-1a2b3c4d 0 128`."""
    return snakemake.rule + "".join(f" {value}" for value in snakemake.wildcards)


def log_to(path: str, name: str) -> None:
    """Writes the log of this process to the terminal and to a file, with the name of the job in each line.

    Messages of the library at the level DEBUG are written to the file alone.
    """
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.INFO)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s  {name}: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[terminal, logging.FileHandler(path)],
    )
    logging.getLogger("diffusion").setLevel(logging.DEBUG)


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Runs the body of a script, and writes its log to the terminal and to the log file of the rule.

    After an error of the user or of the machine, the process ends with one sentence in the log (`exit_on_job_error`).
    If the memory of a shared GPU is full, the script runs again alone on the GPU (`run_again_alone`).

    Args:
        snakemake: the object that Snakemake puts into every script.
    """
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    log_to(snakemake.log[0], job_name(snakemake))
    if snakemake.rule not in ON_A_DEVICE:
        log_ready()
    with exit_on_job_error(SECTIONS.get(snakemake.rule)), run_again_alone():
        yield


@contextmanager
def exit_on_job_error(section: str | None = None) -> Iterator[None]:
    """Ends the process with exit code 1 and one sentence in the log if the body raises certain errors.

    These errors are `InputError`, `Stopped`, Ctrl-C, full memory, a full disk and a missing permission. Any other
    exception is a bug and keeps its traceback.

    Args:
        section: section of the study file. If an `InputError` is about a value in this section, the name of the section
            is written before the message.

    Raises:
        RuntimeError: the body raised a RuntimeError that is not torch's error for full memory.
        OSError: the body raised an OSError for a reason other than a full disk or a missing permission.
    """
    try:
        yield
    except InputError as error:
        of_value = not isinstance(error, (FileError, StudyError))
        logging.error("%s%s", f"{section}: " if section and of_value else "", with_remedy(error))
        sys.exit(1)
    except Stopped as error:
        logging.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logging.error("stopped: run the same command again to continue")
        sys.exit(1)
    except MemoryError:
        logging.error(FULL_MACHINE)
        sys.exit(1)
    except RuntimeError as error:
        if is_gpu_full(error):
            logging.error(FULL_GPU)
        elif "can't allocate memory" in str(error):  # torch's, on a CPU
            logging.error(FULL_MACHINE)
        else:
            raise
        sys.exit(1)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}:
            raise
        logging.error("%s: %s: free space or correct the permission, then run the same command again",
                      error.filename or Path.cwd(), error.strerror)  # fmt: skip
        sys.exit(1)


def wait_for_gpus(snakemake: Any) -> None:
    """Waits for the GPUs that the job needs, and makes only these visible to torch.

    Call this function after slow imports, so that they run while other jobs compute.

    Args:
        snakemake: the object that Snakemake puts into every script.
    """
    take_gpus(snakemake.resources.gpu, snakemake.resources.jobs_per_gpu)


def job_device(snakemake: Any, threads: int | None) -> str:
    """Waits for the GPU of the job, sets the number of torch's CPU threads, and returns the device to compute on.

    Args:
        snakemake: the object that Snakemake puts into every script.
        threads: number of threads; None for torch's choice.

    Returns:
        "cuda" or "cpu".

    Raises:
        StudyError: a GPU is needed, and torch finds none.
    """
    wait_for_gpus(snakemake)
    return use_torch(threads, snakemake.resources.gpu)


def use_torch(threads: int | None, gpus: int) -> str:
    """Sets the number of torch's CPU threads, and returns the device to compute on: "cuda" or "cpu".

    Args:
        threads: number of threads; None for torch's choice.
        gpus: 1 to compute on a GPU, otherwise 0.

    Raises:
        StudyError: a GPU is needed, and torch finds none.
    """
    import torch

    gc.set_threshold(*GARBAGE_THRESHOLDS)
    if threads:
        torch.set_num_threads(threads)
    if gpus and not torch.cuda.is_available():
        raise StudyError(
            f"torch {torch.__version__} finds no GPU on {platform.node()}: compute on the CPU (`device: cpu` in "
            "a study, `--device cpu` in a command), or install versions of torch and of the driver that match"
        )
    return "cuda" if gpus else "cpu"
