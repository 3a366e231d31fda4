"""Trains one segment of a run, which is the part between two checkpoints.

The segment is trained in this process, or in several processes that share each batch (torchrun).
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, PlainSerializer

from convergence.errors import StudyError
from convergence.jobs import exit_on_job_error, log_to, use_torch
from diffusion.config import RunConfig
from diffusion.data.arrays import load_images
from diffusion.errors import Stopped
from diffusion.training.segment import train_segment


class Segment(BaseModel):
    """Settings of one segment of a run.

    If several processes train the segment, each process receives these settings as JSON.
    """

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    run: Annotated[RunConfig, PlainSerializer(lambda run: json.loads(run.canonical()))]
    """Configuration of the run."""
    seed: int
    """Seed of the run."""
    dataset: Path
    """Directory of the prepared dataset."""
    previous: Path | None
    """state.pt of the previous checkpoint; None: training starts at step 0."""
    directory: Path
    """Directory of the checkpoint at the end of the segment."""
    until: int
    """Step of the checkpoint at the end of the segment."""
    gpus: int
    """Number of GPUs of each process: 0 or 1."""
    threads: int
    """Number of CPU threads of torch in each process."""
    log: str
    """Log file, to which every process appends."""
    name: str
    """Prefix of each log line."""


def drop_older_states(state: Path) -> None:
    """Removes the states of a run that are older than `state`.

    A job calls this function when training continues from `state`. At that time, Snakemake knows that `state` is
    complete. The two newest states of a run always remain.

    Args:
        state: state.pt of the checkpoint from which training continues.
    """
    step = int(state.parent.name.removeprefix("step"))
    for older in state.parent.parent.glob("step*/state.pt"):
        if int(older.parent.name.removeprefix("step")) < step:
            older.unlink()


def train(segment: Segment, processes: int) -> None:
    """Trains a segment.

    Args:
        segment: settings of the segment.
        processes: number of processes that share each batch.

    Raises:
        Stopped: if training was asked to stop. The state of training is saved.
        StudyError: if `processes` does not divide the batch size, there are fewer GPUs than processes, or a process
            failed.
        InputError: if a state file is damaged, no image is left for training, or another process trains this run.
    """
    if processes == 1:
        return _train_here(segment)
    batch_size = segment.run.train.batch_size
    if batch_size % processes:  # the study is checked, but a profile may set another number
        raise StudyError(f"processes: {processes} does not divide the batch_size {batch_size}: use a divisor")
    if segment.gpus and torch.cuda.device_count() < processes:
        raise StudyError(
            f"processes: {processes} processes need a GPU each, but torch finds {torch.cuda.device_count()}: use fewer"
        )
    # Imported late: these imports take a second, and most jobs have one process.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its table of failed processes repeats their own messages.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=1,
        local_addr="localhost",
    )
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup; torch would handle this signal, too
        config.signals_to_handle = "SIGTERM,SIGINT"
    try:
        elastic_launch(config, sys.executable)("-m", "convergence.train_job", segment.model_dump_json())
    except SignalException:
        raise Stopped("stopped: run the same command again to resume") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise StudyError(
            f"process {rank} of {processes} failed with exit code {failure.exitcode}: correct the error above (also in "
            f"{segment.log}), then run the same command again"
        ) from None


def _train_here(segment: Segment) -> None:
    device = use_torch(segment.threads, segment.gpus)
    images = load_images(segment.dataset, verify=True)
    train_segment(segment.run, segment.seed, images, segment.previous, segment.directory, segment.until, device)


def _main() -> None:
    """Runs one of several processes, as torchrun starts it.

    Raises:
        RuntimeError: if this process failed. If another process failed, this process exits without a message.
    """
    segment = Segment.model_validate_json(sys.argv[1])
    if segment.gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if segment.gpus else "gloo")
    log_to(segment.log, segment.name if dist.get_rank() == 0 else f"{segment.name}, process {dist.get_rank()}")
    try:
        with exit_on_job_error():
            try:
                _train_here(segment)
            except Stopped as error:
                # Every process stops at the same step; one of them reports it.
                if dist.get_rank() == 0:
                    logging.error("%s", error)
                sys.exit(1)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        sys.exit(1)  # another process failed and has reported it
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main()
