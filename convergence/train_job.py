"""One training segment: in this process, or in several under torchrun that share its batches."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from convergence.errors import StudyError
from convergence.jobs import exit_on_job_error, log_to, use_torch
from diffusion.config import RunConfig
from diffusion.data.arrays import training_images
from diffusion.errors import Stopped
from diffusion.training.segment import train_segment


class Segment(NamedTuple):
    """What a process must know; it travels to the others as JSON."""

    run: str
    """`RunConfig`, as JSON."""
    seed: int
    dataset: str
    """Directory of the prepared dataset."""
    previous: str | None
    """state.pt to go on from; None: from the seed alone."""
    directory: str
    """Receives the checkpoint."""
    until: int
    """Its step."""
    gpus: int
    """Of one process: 0 or 1."""
    threads: int
    """Of torch in one process."""
    log: str
    """File that every process adds to."""
    name: str
    """What log lines begin with."""


def drop_older_states(state: Path) -> None:
    """Remove the states of a run before this one. A segment does so when it starts from this one, which Snakemake then
    knows to be complete; the two newest states of a run always stay."""
    step = int(state.parent.name.removeprefix("step"))
    for older in state.parent.parent.glob("step*/state.pt"):
        if int(older.parent.name.removeprefix("step")) < step:
            older.unlink()


def train(segment: Segment, processes: int) -> None:
    """Train a segment.

    Raises:
        Stopped: asked to stop; what was trained is kept.
        StudyError: as `diffusion.training.segment.train_segment`, or a process failed.
    """
    if processes == 1:
        return _train_here(segment)
    batch_size = RunConfig.model_validate_json(segment.run).train.batch_size
    if batch_size % processes:  # a profile may ask for more than the study's own check has seen
        raise StudyError(f"processes: {processes} do not divide the batch_size {batch_size}: ask for a divisor")
    if segment.gpus and torch.cuda.device_count() < processes:
        raise StudyError(
            f"processes: {processes} need a GPU each, and torch finds {torch.cuda.device_count()}: ask for fewer"
        )
    # Late: they cost every job of one process a second.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its table of failed processes repeats what they said themselves.
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
    try:
        elastic_launch(config, sys.executable)("-m", "convergence.train_job", json.dumps(segment))
    except SignalException:
        raise Stopped("stopped: the same command goes on from there") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise StudyError(
            f"process {rank} of {processes} ended with exit code {failure.exitcode}: mend what it says above (and in "
            f"{segment.log}), then run the same command again"
        ) from None


def _train_here(segment: Segment) -> None:
    device = use_torch(segment.threads, segment.gpus)
    previous = Path(segment.previous) if segment.previous else None
    run = RunConfig.model_validate_json(segment.run)
    images = training_images(Path(segment.dataset), run.dataset.held_out)
    train_segment(run, segment.seed, images, previous, Path(segment.directory), segment.until, device)


def _main() -> None:
    """One of several processes, as torchrun starts it.

    Raises:
        RuntimeError: a fault of its own; where another process failed, it ends in silence.
    """
    segment = Segment(*json.loads(sys.argv[1]))
    if segment.gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if segment.gpus else "gloo")
    log_to(segment.log, segment.name if dist.get_rank() == 0 else f"{segment.name}, process {dist.get_rank()}")
    try:
        with exit_on_job_error():
            try:
                _train_here(segment)
            except Stopped as error:
                # Every process stops at the same step; one says so.
                if dist.get_rank() == 0:
                    logging.error("%s", error)
                sys.exit(1)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        sys.exit(1)  # another process failed, and has said why
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main()
