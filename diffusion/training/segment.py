"""Training of one segment: the part of a run between two neighbouring checkpoints.

A segment starts from the training state of the previous checkpoint. The first segment starts from the untrained net. A
segment ends with the training state of its own checkpoint. Training can be stopped and resumed at any step.
"""

import csv
import hashlib
import io
import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

from diffusion.averages import weights_files
from diffusion.checkpoints import save_weights
from diffusion.config import RunConfig
from diffusion.data.arrays import split
from diffusion.data.batches import Batches
from diffusion.errors import InputError, Stopped
from diffusion.files import atomic_write, exclusive_lock
from diffusion.progress import log_ready
from diffusion.sources import source_hash
from diffusion.training import parallel
from diffusion.training.state import NORMS, Meter, TrainState, learning_rate, save_state, train_step

logger = logging.getLogger(__name__)

LOG_COLUMNS = [
    "step", "images", "seconds", "loss", "mse", "vb", "loss_q0", "loss_q1", "loss_q2", "loss_q3",
    "grad_norm", "learning_rate", "images_per_second",
]  # fmt: skip
CODE = source_hash()  # of the code that this process has loaded: the files may change later
SAVE_SECONDS = 300  # between two partial states
REPORT_SECONDS = 10  # least time between two progress reports


def train_segment(
    run: RunConfig,
    seed: int,
    images: np.ndarray,
    previous: Path | None,
    directory: Path,
    until: int,
    device: torch.device | str,
) -> TrainState:
    """Trains a run from the previous checkpoint to step `until`, and writes the checkpoint of this step.

    The checkpoint consists of state.pt and a file for each average of the weights (`weights_files`) in `directory`. In
    the parent of `directory`, log.csv contains the log of the whole run since step 0. If an earlier call for this
    segment was stopped, `directory` contains state.partial.pt, and training resumes from this file. SIGTERM, SIGINT and
    SIGHUP stop training after the current step.

    Args:
        run: configuration of the run.
        seed: seed of the run.
        images: all images of the dataset, uint8 [N, H, W, 3]. Training leaves out `run.dataset.held_out` of these
            images.
        previous: path of state.pt of the previous checkpoint. If None, training starts from the untrained net of the
            seed.
        directory: directory of the new checkpoint. Its parent is the directory of the run.
        until: step of the new checkpoint.
        device: device of the net.

    Returns:
        the training state at step `until`. If the run diverged, the attribute `diverged` of this state is not None.

    Raises:
        Stopped: if a signal stopped training. The state is then saved in state.partial.pt.
        OSError: if the disk is full or not writable.
        FileError: if a state file is damaged or belongs to another run.
        InputError: if no image is left for training, or if another process trains this run.
    """
    started = time.perf_counter()
    indices, _ = split(len(images), run.dataset.held_out)
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory.parent) if parallel.rank() == 0 else nullcontext():
        state = TrainState(run, seed, device)
        if previous is None:
            state.id = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()  # a partial state has its images
        else:
            state.load(previous)
        _resume(state, directory / "state.partial.pt")
        state.sources = [*(code for code in state.sources if code != CODE), CODE]
        _train(state, state.batches(images, indices), directory, until, started)
    return state


def _resume(state: TrainState, partial: Path) -> None:
    """Loads `partial` into `state` if the file continues this state. Otherwise deletes the file."""
    if not partial.exists():
        return
    try:
        state.load(partial, parent=state.id)
        logger.info("resuming from step %d", state.step)
    except InputError as error:
        logger.warning("%s: it is deleted, and training resumes from step %d", error, state.step)
        partial.unlink(missing_ok=True)


def _train(state: TrainState, batches: Batches, directory: Path, until: int, started: float) -> None:
    """Trains to step `until`, and writes the checkpoint and the log.

    The first step of a process also compiles kernels and allocates memory. Therefore, `state.startup_seconds` counts
    the time from `started` to the end of this step, and `state.seconds` counts the other steps.

    Raises:
        Stopped: if a signal stopped training. The state is then saved in state.partial.pt.
    """
    run, writes = state.run, parallel.rank() == 0
    partial = directory / "state.partial.pt"
    before: list[Tensor] = []  # the weights before the last step, on the CPU: the memory of a GPU may be full
    log, saver = _Log(directory.parent / "log.csv", state, until) if writes else None, _Saver(partial)
    with _StopSignals() as stop:
        saved, first, timed = time.monotonic(), True, 0
        while state.step < until and state.diverged is None:
            if writes and state.step == until - 1:
                before = [p.detach().to("cpu", copy=True) for p in state.parameters]
            began = time.perf_counter()
            train_step(state, batches)
            row_due = state.step % run.train.log_every == 0 or state.step == until
            if row_due or first:
                # Reading the means waits for the device, so that the time includes the work of all steps until now.
                means = state.meter.means()
            if first:
                state.startup_seconds += time.perf_counter() - started
                first = False
                log_ready()
            else:
                state.seconds += time.perf_counter() - began
                timed += 1
            if row_due:
                state.diverged = None if math.isfinite(means["loss"]) else state.step
                if log:
                    log.add(means, timed)
                state.meter, timed = Meter(state.device), 0
            stopping, saving = parallel.any_rank([stop.is_set(), time.monotonic() - saved > SAVE_SECONDS])
            if (stopping or saving) and state.step < until:
                if writes:
                    saver.save(state.state_dict())
                saved = time.monotonic()
                if stopping:
                    saver.wait()
                    raise Stopped(f"stopped at step {state.step} of {until}: training resumes from this step")
    if state.diverged is None and not _finite([*state.parameters, *chain(*state.averages.values())]):
        state.diverged = state.step  # the gradient of the last step was not finite
    if state.diverged is not None:
        logger.warning(
            "the loss or a weight at step %d is not finite: the run diverged and ends here; lower its learning rate",
            state.diverged,
        )
        state.step = until
    state.id = uuid.uuid4().hex
    state.norms = _norms(before, state.parameters)
    if log:
        log.write()
        diverged = state.diverged is not None
        averages = state.averaged_weights()
        for name, file in weights_files(averages).items():
            save_weights(directory / file, averages[name], run.initial, state.seed, until, diverged)
        save_state(directory / "state.pt", state.state_dict())
        saver.wait()
        partial.unlink(missing_ok=True)


def _norms(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    """Returns the norms of an update and of the weights before it (`TrainState.norms`).

    Args:
        before: weights before the update, tensors [...] on the CPU. Without weights, the norms are NaN.
        after: weights after the update, tensors [...] on any device.
    """
    if not before:
        return dict.fromkeys(NORMS, math.nan)
    update = [new.detach().cpu() - old for new, old in zip(after, before, strict=True)]
    return {name: get_total_norm(tensors).item() for name, tensors in zip(NORMS, (update, before), strict=True)}


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


class _Saver:
    """Writes states in a background thread, one at a time, while training continues."""

    def __init__(self, path: Path):
        self.path, self.writer = path, ThreadPoolExecutor(max_workers=1)
        self.writing: Future[None] | None = None

    def save(self, content: dict[str, Any]) -> None:
        """Waits for the previous write, copies `content` to the CPU, and starts to write the copy."""
        self.wait()
        copy = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self.writing = self.writer.submit(save_state, self.path, copy)

    def wait(self) -> None:
        """Waits for the current write. If this write failed, raises its exception."""
        if self.writing:
            self.writing.result()


class _Log:
    """The file log.csv of a run.

    At the start of a segment, the rows of the state replace the content of the file, so that no step appears twice.
    After that, each new row is appended.
    """

    def __init__(self, path: Path, state: TrainState, until: int):
        self.path, self.state, self.until = path, state, until
        self.last_seconds, self.reported = state.seconds, time.monotonic()
        self.write()

    def write(self) -> None:
        """Replaces the file by a new file with all rows of the state."""
        with atomic_write(self.path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            writer = self._writer(text)
            writer.writeheader()
            writer.writerows(self.state.rows)

    @staticmethod
    def _writer(file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")

    def add(self, means: dict[str, float], timed: int) -> None:
        """Appends a row to the state and to the file.

        The progress is logged if the last progress message is more than 10 s old.

        Args:
            means: means of the losses since the last row.
            timed: steps since the last row whose time `state.seconds` includes. If there is none, the row has no rate.
        """
        state, train = self.state, self.state.run.train
        rate = timed * train.batch_size / max(state.seconds - self.last_seconds, 1e-9)
        self.last_seconds = state.seconds
        row: dict[str, Any] = {
            "step": state.step,
            "images": state.step * train.batch_size,
            "seconds": round(state.seconds, 3),
            **means,
            "learning_rate": learning_rate(state.step - 1, train),
            "images_per_second": round(rate, 2) if timed else None,
        }
        state.rows.append(row)
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)
        if timed and time.monotonic() - self.reported > REPORT_SECONDS:
            self.reported = time.monotonic()
            left = (self.until - state.step) * train.batch_size / rate
            logger.info(
                "step %d/%d, %s images, %.0f images/s, loss %.4f, %d:%02d left",
                state.step, self.until, f"{row['images']:,}", rate, means["loss"], left // 60, left % 60,
            )  # fmt: skip


class _StopSignals:
    """A context in which SIGTERM, SIGINT and SIGHUP set an event instead of ending the process.

    Signals that the process ignores stay ignored. For example, `nohup` makes a process ignore SIGHUP.
    """

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.old[number] = signal.signal(number, lambda *_: event.set())
        return event

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
