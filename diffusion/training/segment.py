"""A training segment: from one checkpoint of a run to the next.

A segment starts from the state at the end of its predecessor (or from the seed), writes its own state, and can be
stopped and resumed at any step.
"""

import csv
import io
import math
import signal
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffusion.checkpoints import save_weights
from diffusion.config import RunConfig
from diffusion.data.batches import Batches
from diffusion.errors import InputError, Stopped
from diffusion.files import atomic_write, exclusive_lock
from diffusion.training import parallel
from diffusion.training.state import Meter, TrainState, learning_rate, logger, save_state, train_step

LOG_COLUMNS = [
    "step", "images", "seconds", "loss", "mse", "vb", "loss_q0", "loss_q1", "loss_q2", "loss_q3",
    "grad_norm", "learning_rate", "images_per_second",
]  # fmt: skip
SAVE_SECONDS = 300
TELL_SECONDS = 10


class _Saver:
    """Writes states beside the training that goes on, one at a time."""

    def __init__(self, path: Path):
        self.path, self.writer = path, ThreadPoolExecutor(max_workers=1)
        self.writing: Future[None] | None = None

    def save(self, content: dict[str, Any]) -> None:
        """Write the content as it is now; first wait for what is being written."""
        self.wait()
        copy = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self.writing = self.writer.submit(save_state, self.path, copy)

    def wait(self) -> None:
        """Until all is written; raises what the writing raised."""
        if self.writing:
            self.writing.result()


def train_segment(
    run: RunConfig,
    seed: int,
    images: np.ndarray,
    previous: Path | None,
    directory: Path,
    until: int,
    device: torch.device | str,
) -> TrainState:
    """Train to step `until` and write weights.safetensors, state.pt and log.csv into `directory`.

    Starts from the state file `previous` (None: from the seed), or from state.partial.pt in `directory`, where an
    earlier attempt at the same segment stopped. SIGTERM and SIGINT stop it after the current step.

    Args:
        images: the dataset, uint8 [N, H, W, 3].
        previous: state.pt of the checkpoint before.
        directory: of this checkpoint, below that of the run.
        until: its step.

    Raises:
        Stopped: asked to stop; the partial state is saved.
        OSError: the disk is full, or nothing may be written there.
        InputError: a state file is damaged or foreign, the dataset is empty, or another process trains this run.
    """
    if len(images) == 0:
        raise InputError(
            f"{directory}: its dataset has no images: delete that below results/datasets and run the same command again"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory.parent) if parallel.rank() == 0 else nullcontext():
        state = TrainState(run, seed, device)
        if previous is not None:
            state.load(previous)
        rows = _resume(state, directory / "state.partial.pt")
        _train(state, state.batches(images), directory, until, rows)
    return state


def _train(state: TrainState, batches: Batches, directory: Path, until: int, rows: list[dict[str, float]]) -> None:
    """The loop of a segment, from the state as it is; `rows` were logged before.

    Raises:
        Stopped: asked to stop; the partial state is saved.
    """
    run, parent, writes = state.run, state.id, parallel.rank() == 0
    partial = directory / "state.partial.pt"
    log, saver = _Log(directory / "log.csv", rows, state, until) if writes else None, _Saver(partial)
    with _StopSignals() as stop:
        saved = time.monotonic()
        while state.step < until and state.diverged is None:
            began = time.perf_counter()
            train_step(state, batches)
            row_due = state.step % run.train.log_every == 0 or state.step == until
            if row_due:
                # Reading the means waits for the device, so the seconds before it count the work of all steps.
                means = state.meter.means()
                state.diverged = None if math.isfinite(means["loss"]) else state.step
            state.seconds += time.perf_counter() - began
            if row_due:
                if log:
                    log.add(means)
                state.meter = Meter(state.device)
            stopping, saving = parallel.any_rank([stop.is_set(), time.monotonic() - saved > SAVE_SECONDS])
            if (stopping or saving) and state.step < until:
                if log:
                    saver.save(state.content(parent=parent, rows=list(log.rows)))
                saved = time.monotonic()
                if stopping:
                    saver.wait()
                    raise Stopped(f"stopped at step {state.step} of {until}: the same command goes on from there")
    if state.diverged is not None:
        logger.warning(
            "the loss is no longer finite at step %d: this run diverged and ends here; lower its learning rate",
            state.diverged,
        )
        state.step = until
    state.id = uuid.uuid4().hex
    if writes:
        weights = state.ema_weights()
        save_weights(
            directory / "weights.safetensors", weights, run.initial, state.seed, until, state.diverged is not None
        )
        save_state(directory / "state.pt", state.content())
        saver.wait()
        partial.unlink(missing_ok=True)


def _resume(state: TrainState, partial: Path) -> list[dict[str, float]]:
    """Go on from a partial state if it continues this one; otherwise drop it. Gives the rows logged so far."""
    if not partial.exists():
        return []
    try:
        content = state.load(partial, parent=state.id)
    except InputError:
        logger.warning("%s does not continue this run and is dropped: going on from step %d", partial, state.step)
        partial.unlink(missing_ok=True)
        return []
    logger.info("going on from step %d", state.step)
    return content["rows"]


class _Log:
    """log.csv, rewritten whole at its start so that a resumed segment has each step once, then appended to."""

    def __init__(self, path: Path, rows: list[dict[str, float]], state: TrainState, until: int):
        self.path, self.rows, self.state, self.until = path, rows, state, until
        self.last_seconds, self.told = state.seconds, time.monotonic()
        self.write()

    def write(self) -> None:
        with atomic_write(self.path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            writer = self._writer(text)
            writer.writeheader()
            writer.writerows(self.rows)

    @staticmethod
    def _writer(file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")

    def add(self, means: dict[str, float]) -> None:
        state, train = self.state, self.state.run.train
        rate = state.meter.images / max(state.seconds - self.last_seconds, 1e-9)
        self.last_seconds = state.seconds
        row = {
            "step": state.step,
            "images": state.step * train.batch_size,
            "seconds": round(state.seconds, 3),
            **means,
            "learning_rate": learning_rate(state.step - 1, train.learning_rate, train.learning_rate_warmup),
            "images_per_second": round(rate, 2),
        }
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)
        if time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            left = (self.until - state.step) * train.batch_size / rate
            logger.info(
                "step %d/%d, %s images, %.0f images/s, loss %.4f, %d:%02d left",
                state.step, self.until, f"{row['images']:,}", rate, means["loss"], left // 60, left % 60,
            )  # fmt: skip


class _StopSignals:
    """While open, SIGTERM and SIGINT set an event instead of ending the process."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, lambda *_: event.set())
        return event

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
