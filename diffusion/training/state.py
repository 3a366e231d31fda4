"""The state of a training run, and one optimizer step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.averages import RAW, Average, average_name, ema_decay
from diffusion.build import build, run_tables
from diffusion.checkpoints import save_weights
from diffusion.config import Initial, RunConfig, Train
from diffusion.data.batches import Batches, random_flip, to_model_range
from diffusion.errors import FileError
from diffusion.files import atomic_write
from diffusion.gradients import LossGradients
from diffusion.paths import NoisePath
from diffusion.schemes import Tables, matched
from diffusion.streams import generator, stream_seed
from diffusion.timesteps import LossHistory, draw_stratified, draw_timesteps
from diffusion.training import parallel
from diffusion.training.adamw import AdamW

NORMS = ("update_norm", "weight_norm")


def untrained(config: Initial, seed: int) -> tuple[nn.Module, NoisePath]:
    """Returns the untrained net of a seed, on the CPU, and its path.

    Runs with the same seed and the same configuration of the net start from this net.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(seed, "init").get_state())
        return build(config)


def initial_weights(config: Initial, seed: int, path: Path) -> None:
    """Writes the weights of the untrained net (step 0) to a safetensors file, in the format of `save_weights`."""
    model, _ = untrained(config, seed)
    save_weights(path, model.state_dict(), config, seed, step=0, diverged=False)


class TrainState:
    """Everything that changes during a run, such as parameters, optimizer, step, seconds and log.

    The state also contains the averages of the parameters over the steps. Runs with the same seed and the same
    configuration of the net start from the same weights.

    Args:
        run: configuration of the run.
        seed: seed of all random streams.
        device: device of the net.

    Attributes:
        step: number of optimizer steps so far.
        seconds: time of all training steps so far, except the first one of each process, in seconds.
        startup_seconds: time so far until the first step of each process was done, in seconds.
        diverged: step at which the loss or a weight was found to be infinite or NaN; None if this has not happened.
        norms: L2 norms over all weights, not averaged ones: `update_norm` of the last update before the newest
            checkpoint, and `weight_norm` of the weights before this update; NaN if unknown.
        rows: rows of the log since the start of the run.
        sources: `source_hash` of each version of the code that trained the run. The present version is last.
        id: identifier of the state from which the present segment started. A partial state has the same identifier as
            the state that it continues.
    """

    def __init__(self, run: RunConfig, seed: int, device: torch.device | str):
        self.run, self.seed, self.device = run, seed, torch.device(device)
        model, self.schedule = untrained(run, seed)
        tables = run_tables(run)
        self.schedule = self.schedule.to(self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).train()
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.averages: dict[Average, list[Tensor]] = {
            average: [p.detach().clone() for p in self.parameters] for average in run.train.averages if average != RAW
        }
        self.optimizer = AdamW(self.parameters, run.train.weight_decay, run.train.betas)
        self.tables = tables.to(self.device)
        self.history = None
        if run.scheme.timesteps.learned:
            _, parameters = run.scheme.timesteps.chosen
            self.history = LossHistory(self.schedule.timesteps, device=self.device, **parameters)  # type: ignore[arg-type]
        self.gradients = LossGradients(self.model, self.schedule, run.train.precision)
        self.meter = Meter(self.device)
        self.step = 0
        self.seconds = self.startup_seconds = 0.0
        self.diverged: int | None = None
        self.norms = dict.fromkeys(NORMS, np.nan)
        self.rows: list[dict[str, float]] = []
        self.sources: list[str] = []
        self.id = "start"

    def averaged_weights(self) -> dict[str, dict[str, Tensor]]:
        """Returns name of an average -> its weights: a state dict of the net, float32 tensors [...].

        The order is that of `train.ema_decay`. `raw` are the parameters themselves.
        """
        names = [name for name, _ in self.model.named_parameters()]
        constant = self.model.state_dict()  # of which the buffers remain
        return {
            average_name(average): constant | dict(zip(names, self.averages.get(average, self.parameters), strict=True))
            for average in self.run.train.averages
        }

    def batches(self, images: np.ndarray, indices: np.ndarray | None = None) -> Batches:
        """Returns the training batches of this run.

        Args:
            images: all images of the dataset, uint8 [N, H, W, 3].
            indices: indices of the images that are used for training, int64 [M]. If None, all images are used.
        """
        count = len(images) if indices is None else len(indices)

        def order(epoch: int) -> Tensor:
            return torch.randperm(count, generator=generator(self.seed, "order", epoch))

        return Batches(images, self.run.train.batch_size, order, self.device, indices)

    def tables_now(self) -> Tables:
        """Returns the density and the loss weights at the present step, each [T].

        The density changes during training only if it is learned. Importance-corrected loss weights change with such a
        density.
        """
        if self.history is None:
            return self.tables
        probabilities, scheme = self.history.probabilities(), self.run.scheme
        if scheme.corrected:
            return matched(probabilities, self.tables, scheme.correct_vb)
        return replace(self.tables, probabilities=probabilities)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict of plain values and tensors [...].

        The tensors are not copied, so later training steps change the returned tensors.
        """
        return {
            "run": self.run.canonical(), "seed": self.seed, "step": self.step, "seconds": self.seconds,
            "startup_seconds": self.startup_seconds, "diverged": self.diverged, "id": self.id, "rows": self.rows,
            "norms": self.norms, "sources": self.sources, "model": self.model.state_dict(), "ema": self._ema(),
            "optimizer": self.optimizer.state_dict(), "meter": self.meter.state_dict(),
            "history": self.history.state_dict() if self.history else None,
        }  # fmt: skip

    def _ema(self) -> dict[str, Any]:
        """Returns the item `ema` of a state: the weights of the only average, or name -> weights of each average.

        The parameters themselves (`raw`) are in the item `model`.
        """
        weights = self.averaged_weights()
        if isinstance(self.run.train.ema_decay, float):
            return weights.popitem()[1]
        return {name: tensors for name, tensors in weights.items() if name != RAW}

    def load(self, path: Path, parent: str | None = None) -> None:
        """Replaces this state by the state in a file. If an error is raised, this state is unchanged.

        Args:
            path: file that `save_state` wrote.
            parent: `id` that the state in the file must have. A partial state has the `id` of the state that it
                continues. If None, any `id` is accepted.

        Raises:
            FileError: if the file is damaged, or belongs to another run or segment.
        """
        with _reading(path):
            content = torch.load(path, map_location=self.device, weights_only=True)
            content.setdefault("startup_seconds", 0.0)  # states of earlier versions count it as training
            content.setdefault("norms", self.norms)
            if (content["run"], content["seed"]) != (self.run.canonical(), self.seed):
                raise FileError(path, "is the state of a run with other settings")
            if parent not in (None, content["id"]):
                raise FileError(path, "does not continue the state that this segment starts from")
            _check_layout(content, self.state_dict())

        # In place: a captured graph reads the parameters at their addresses.
        self.model.load_state_dict(content["model"])
        for average in self.averages:
            only = isinstance(self.run.train.ema_decay, float)
            weights = content["ema"] if only else content["ema"][average_name(average)]
            self.averages[average] = [weights[name] for name, _ in self.model.named_parameters()]
        self.optimizer.load_state_dict(content["optimizer"])
        self.meter.load_state_dict(content["meter"])
        if self.history:
            self.history.load_state_dict(content["history"])
        self.step, self.seconds, self.diverged = content["step"], content["seconds"], content["diverged"]
        self.startup_seconds = content["startup_seconds"]
        self.rows, self.sources, self.id = content["rows"], content["sources"], content["id"]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Converts any error in the block, except a lack of memory, into a FileError.

    For a damaged file, torch raises exceptions of many types.

    Raises:
        FileError: if the file is damaged.
        MemoryError: if the memory of the host is full.
        OutOfMemoryError: if the memory of the GPU is full.
    """
    try:
        yield
    except (FileError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise FileError(path, f"is damaged ({' '.join(str(error).split())[:120]})") from None


def _check_layout(value: Any, expected: Any, name: str = "state") -> None:
    """Checks that a value has the layout of an expected value.

    Nested dicts must have equal keys, tensors equal shapes and dtypes, and other values equal types.

    Raises:
        ValueError: if the layouts differ.
    """
    if isinstance(expected, dict):
        if not isinstance(value, dict) or value.keys() != expected.keys():
            keys = set(value) ^ set(expected) if isinstance(value, dict) else expected
            raise ValueError(f"{name}: keys missing or unknown: {', '.join(map(str, keys))}")
        for key in expected:
            _check_layout(value[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, Tensor):
        layouts = [(list(v.shape), v.dtype) if isinstance(v, Tensor) else type(v).__name__ for v in (value, expected)]
        if layouts[0] != layouts[1]:
            raise ValueError(f"{name} is {layouts[0]}, not {layouts[1]}")
    elif not isinstance(value, (int, NoneType) if name == "state.diverged" else type(expected)):
        raise ValueError(f"{name} is {type(value).__name__}, not {type(expected).__name__}")


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Writes a state, as `TrainState.state_dict` returns it, to a file.

    Raises:
        OSError: if the disk is full or not writable.
    """
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # On a full disk, closing the archive fails, too, which hides the first error.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def summary(path: Path, since: int = 0) -> dict[str, Any]:
    """Returns the main facts of a state file without reading its tensors.

    Args:
        path: file that `save_state` wrote.
        since: step of the previous checkpoint; 0 if the previous checkpoint is the untrained net.

    Returns:
        a dict with `step`, `diverged`, `sources`, `seconds`, `startup_seconds` and the norms (see `TrainState`), and
        `mse`. `mse` is the unweighted mean squared error of the prediction, averaged over the steps after `since`.
        Norms and `mse` are None if they are not finite.

    Raises:
        FileError: if the file is damaged.
    """
    with _reading(path):
        content = torch.load(path, weights_only=True, mmap=True)
        facts = {name: content[name] for name in ("step", "diverged", "sources")}
        rows = [row for row in content["rows"] if row["step"] > since]
        steps = np.diff([since, *(row["step"] for row in rows)])
        mse = np.average([row["mse"] for row in rows], weights=steps) if rows else np.nan
        times = {name: round(content[name], 3) for name in ("seconds", "startup_seconds")}
        numbers = content.get("norms", {}) | {"mse": float(mse)}
        return facts | times | {name: value if np.isfinite(value) else None for name, value in numbers.items()}


class Meter:
    """Sums of the losses since the last row of the log.

    The sums are on the device of the losses, so that no training step waits for a copy to the CPU.

    Args:
        device: device of the losses.
    """

    def __init__(self, device: torch.device):
        self.sums = {
            "losses": torch.zeros(3, dtype=torch.float64, device=device),
            "quarters": torch.zeros(2, 4, dtype=torch.float64, device=device),
            "grad_norm": torch.zeros((), dtype=torch.float64, device=device),
        }
        self.steps = self.images = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums and the counts. Later calls of `add` change the returned sums, which are tensors [...]."""
        return {"sums": self.sums, "steps": self.steps, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the sums and counts by those in `state`, which `state_dict` returned.

        The sums are tensors [...] on the device of this meter. They are not copied.
        """
        self.sums, self.steps, self.images = state["sums"], state["steps"], state["images"]

    def add(self, loss: Tensor, mse: Tensor, vb: Tensor, quarter: Tensor) -> None:
        """Adds the losses of a batch.

        Args:
            loss: weighted loss of each image, [B].
            mse: unweighted mean squared error of the prediction of each image, [B].
            vb: unweighted variational bound of each image, [B].
            quarter: index of the quarter of 0..T-1 that contains the timestep of each image, int64 [B] in 0..3.
        """
        self.sums["losses"] += torch.stack([loss, mse, vb]).double().sum(1)
        self.sums["quarters"].index_add_(1, quarter, torch.stack([mse, torch.ones_like(mse)]).double())
        self.steps += 1
        self.images += len(loss)

    def means(self) -> dict[str, float]:
        """Returns the means since the last row of the log.

        `loss`, `mse` and `vb` are means over images, and `grad_norm` is a mean over steps. `loss_q0` to `loss_q3` are
        the means of the unweighted mse in the four quarters of the timesteps 0..T-1. The mean of a quarter without
        images is NaN.
        """
        loss, mse, vb = (self.sums["losses"] / self.images).tolist()
        total, count = self.sums["quarters"]
        quarters = {f"loss_q{q}": value for q, value in enumerate((total / count).tolist())}
        grad_norm = (self.sums["grad_norm"] / self.steps).item()
        return {"loss": loss, "mse": mse, "vb": vb, **quarters, "grad_norm": grad_norm}


def train_step(state: TrainState, batches: Batches) -> None:
    """Takes one optimizer step on batch `state.step`, and updates `state`.

    The CPU does not wait for the GPU, except to copy the permutation of the images at the start of an epoch.
    """
    train, schedule, device = state.run.train, state.schedule, state.device
    seed, step, size = state.seed, state.step, state.run.train.batch_size

    x_start = to_model_range(batches[step])
    if train.random_flip:
        x_start = random_flip(x_start, generator(seed, "flips", step, device))
    tables = state.tables_now()
    draw = draw_stratified if state.run.scheme.stratified else draw_timesteps
    t = draw(tables.probabilities, size, generator(seed, "timesteps", step, device))
    mse_weight, vb_weight = tables.mse_weight[t].float(), tables.vb_weight[t].float()
    noise = torch.randn(x_start.shape, device=device, generator=generator(seed, "noise", step, device))
    if state.gradients.dropout:
        # Only dropout uses torch's global generator. Its seed differs between processes.
        torch.manual_seed(stream_seed(seed, f"dropout{parallel.rank() or ''}", step))

    state.gradients.refresh()
    own = parallel.rank_slice(size)
    micro_batch = train.micro_batch or len(own)
    gradients: list[Tensor] = []
    terms = torch.zeros(2, size, device=device)
    for first in range(own.start, own.stop, micro_batch):
        i = slice(first, min(first + micro_batch, own.stop))
        part, terms[:, i] = state.gradients(x_start[i], noise[i], t[i], mse_weight[i] / size, vb_weight[i] / size)
        if gradients:
            torch._foreach_add_(gradients, part)
        else:
            # The next call may overwrite the results of this one.
            gradients = [g.clone() for g in part] if len(own) > micro_batch else part
    parallel.all_reduce_sum([*gradients, terms])

    mse, vb = terms
    state.meter.add(mse_weight * mse + vb_weight * vb, mse, vb, t * 4 // schedule.timesteps)
    state.meter.sums["grad_norm"] += torch.nn.utils.get_total_norm(gradients)
    if state.history:
        # The history compares timesteps by their losses under uniform draws.
        state.history.add(t, state.tables.mse_weight[t] * mse + state.tables.vb_weight[t] * vb)

    state.optimizer.step(gradients, learning_rate(step, train))
    with torch.no_grad():
        for average, tensors in state.averages.items():
            torch._foreach_lerp_(tensors, state.parameters, 1 - ema_decay(step, average, train.ema_warmup))
    state.step += 1


def learning_rate(step: int, train: Train) -> float:
    """Returns the learning rate of a step (counted from 0).

    The rate rises linearly from `learning_rate` / `learning_rate_warmup` to `learning_rate` in the first
    `learning_rate_warmup` steps. It then is constant, unless `train.decay` is set: this decreases it from the step
    `from` to the step `until`, after which it is constant.
    """
    rate = train.learning_rate
    if train.decay:
        steps = train.decay.steps
        done = min(max((step - steps.start) / (steps.until - steps.start), 0.0), 1.0)
        rate = steps.to + (rate - steps.to) * (1 - done if train.decay.linear else (1 + math.cos(math.pi * done)) / 2)
    warmup = train.learning_rate_warmup
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate
