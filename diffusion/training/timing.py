"""Training times of several runs, measured in turns.

The speed of a machine drifts. Runs that are timed in turns are exposed to the same drift. Therefore, the ratio of two
times within a round is more precise than the times themselves.
"""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from diffusion.config import RunConfig
from diffusion.data.arrays import split
from diffusion.progress import log_ready
from diffusion.training.state import TrainState, train_step

# Steps of a turn. The first ones allocate memory and choose algorithms; they are not timed.
WARM_UP, TIMED = 2, 4
MIN_ROUNDS, MAX_ROUNDS = 3, 8
SECONDS_PER_RUN = 20.0  # after which no further round starts


def time_steps(
    runs: Sequence[RunConfig], images: np.ndarray, device: torch.device | str, processes: int = 1
) -> np.ndarray:
    """Returns the training time of each run in each round, in seconds per image, [rounds, runs].

    In each round, each run starts from the untrained net of seed 0 and takes 2 steps without and 4 steps with timing.
    No files are written, and only one run is in memory at a time.

    Args:
        runs: configurations of the runs. Each run computes with its own number of threads.
        images: all images of the dataset, uint8 [N, H, W, 3].
        device: device of the nets.
        processes: number of data-parallel processes of each run. Only one process is timed, with its part of the batch
            and without communication.
    """
    parts = [_part(run, processes) for run in runs]
    return in_turns([partial(_turn, run, images, device) for run in parts], time.perf_counter)


def in_turns(functions: Sequence[Callable[[], float]], clock: Callable[[], float]) -> np.ndarray:
    """Calls the functions in turns (a, b, c, a, b, c, ...) and returns their results, [rounds, functions].

    There are 3 to 8 rounds. After 3 rounds, a new round starts only within 20 s per function from the beginning.

    Args:
        functions: functions that are called.
        clock: function that returns the present time in seconds.
    """
    end = clock() + SECONDS_PER_RUN * len(functions)
    rounds: list[list[float]] = []
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and clock() < end):
        rounds.append([function() for function in functions])
    return np.array(rounds)


def _part(run: RunConfig, processes: int) -> RunConfig:
    """Returns the configuration of a run, with the batch size of one process."""
    train = run.train.model_copy(update={"batch_size": run.train.batch_size // processes})
    return run.model_copy(update={"train": train})


def _turn(run: RunConfig, images: np.ndarray, device: torch.device | str) -> float:
    """Takes some training steps of one run, and returns the seconds per image."""
    gc.collect()  # a training state refers to itself, so the previous one is still in memory
    torch.set_num_threads(run.train.threads)
    state = TrainState(run, 0, device)
    batches = state.batches(images, split(len(images), run.dataset.held_out)[0])
    for _ in range(WARM_UP):
        train_step(state, batches)
        log_ready()
    state.meter.means()  # waits for the device, as at a row of the log
    start = time.perf_counter()
    for _ in range(TIMED):
        train_step(state, batches)
    state.meter.means()
    return (time.perf_counter() - start) / (TIMED * run.train.batch_size)
