"""The state of a training run, and one optimiser step."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.checkpoints import build, save_weights
from diffusion.config import Initial, RunConfig
from diffusion.data.batches import Batches, random_flip, to_model_range
from diffusion.devices import CudaGraphed, autocast
from diffusion.errors import InputError
from diffusion.files import atomic_write
from diffusion.gaussian import NoiseSchedule
from diffusion.losses import hybrid_loss
from diffusion.nets.unet import UNet
from diffusion.schemes import Tables, matched, scheme_tables
from diffusion.streams import generator, stream_seed
from diffusion.timesteps import LossHistory, draw_stratified, draw_timesteps
from diffusion.training import parallel

logger = logging.getLogger(__name__)


def untrained(config: Initial, seed: int) -> tuple[UNet, NoiseSchedule]:
    """The net that every arm of a seed starts from, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(seed, "init").get_state())
        return build(config)


def initial_weights(config: Initial, seed: int, path: Path) -> None:
    """Write the weights of step 0, as any later step's are written."""
    model, _ = untrained(config, seed)
    save_weights(path, dict(model.named_parameters()), config, seed, step=0, diverged=False)


class TrainState:
    """Everything that moves during a run: parameters, their moving average, the optimiser, step and seconds."""

    def __init__(self, run: RunConfig, seed: int, device: torch.device | str):
        """The state at step 0. Arms of equal seed and net start from the same weights."""
        self.run, self.seed, self.device = run, seed, torch.device(device)
        model, self.schedule = untrained(run, seed)
        tables = scheme_tables(self.schedule, run.scheme, run.match)
        self.schedule = self.schedule.to(self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).train()
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        train = run.train
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
        )
        self.tables = tables.to(self.device)
        self.history = None
        if run.scheme.timesteps.learnt:
            _, parameters = run.scheme.timesteps.chosen
            self.history = LossHistory(self.schedule.timesteps, device=self.device, **parameters)  # type: ignore[arg-type]
        # Dropout draws anew at each call, which a graph would have to be told of.
        graphed = self.device.type == "cuda" and not run.model.dropout
        self.gradients = CudaGraphed(self._gradients) if graphed else self._gradients
        self.meter = Meter(self.device)
        self.step = 0
        self.seconds = 0.0
        self.diverged: int | None = None
        # Of this state; a partial one names as its parent the state that it continues.
        self.id = "start"

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged weights, by the net's own parameter names, each of its parameter's shape [...], float32."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.ema, strict=True))

    def batches(self, images: np.ndarray) -> Batches:
        """The batches of this run out of its images, uint8 [N, H, W, 3]."""

        def order(epoch: int) -> Tensor:
            return torch.randperm(len(images), generator=generator(self.seed, "order", epoch))

        return Batches(images, self.run.train.batch_size, order, self.device)

    def _gradients(
        self, x_start: Tensor, noise: Tensor, t: Tensor, mse_weight: Tensor, vb_weight: Tensor
    ) -> list[Tensor]:
        """Gradients of the parameters for the sum of the weighted losses over some images; mse and vb of each, [2, B].

        Args:
            x_start, noise: [B, 3, H, W].
            t, mse_weight, vb_weight: [B].
        """
        x_t = self.schedule.q_sample(x_start, t, noise)
        with autocast(self.device, self.run.train.precision):
            output = self.model(x_t, t)
        losses = hybrid_loss(self.schedule, output.float(), x_start, x_t, t, noise)
        loss = (mse_weight * losses.mse + vb_weight * losses.vb).sum()
        return [*torch.autograd.grad(loss, self.parameters), torch.stack([losses.mse, losses.vb]).detach()]

    def tables_now(self) -> Tables:
        """The tables at this step: a density that is learnt takes its weights along."""
        if self.history is None:
            return self.tables
        probabilities, scheme = self.history.probabilities(), self.run.scheme
        if scheme.corrected:
            return matched(probabilities, self.tables, scheme.correct_vb)
        return replace(self.tables, probabilities=probabilities)

    def content(self, **more: Any) -> dict[str, Any]:
        """All of it, as `save_state` writes it; a partial state has `more`: its parent's id and the rows of the log."""
        return {
            "run": self.run.canonical(), "seed": self.seed, "step": self.step, "seconds": self.seconds,
            "diverged": self.diverged, "id": self.id, "model": self.model.state_dict(), "ema": self.ema_weights(),
            "optimizer": self.optimizer.state_dict(), "meter": vars(self.meter),
            "history": vars(self.history) if self.history else None, **more,
        }  # fmt: skip

    def load(self, path: Path, parent: str | None = None) -> dict[str, Any]:
        """Take over the state in a file, and give its whole content.

        Args:
            parent: id of the state that a partial one must continue.

        Raises:
            InputError: the file is damaged, or belongs to another run or another parent; then nothing is taken over.
        """
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
            if (content["run"], content["seed"]) != (self.run.canonical(), self.seed):
                raise InputError(f"{path}: belongs to another run: move it away and run the same command again")
            if parent is not None and content["parent"] != parent:
                raise InputError(f"{path}: continues another state: delete it and run the same command again")
            ema = [content["ema"][name] for name, _ in self.model.named_parameters()]
            meter, history = content["meter"], content["history"]
            self.optimizer.load_state_dict(content["optimizer"])
            self.model.load_state_dict(content["model"])
        except InputError:
            raise
        except Exception as error:  # a damaged file fails in many ways inside torch
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{path}: damaged ({reason}): delete it and run the same command again") from None
        self.ema = ema
        vars(self.meter).update(meter)
        if self.history:
            vars(self.history).update(history)
        self.step, self.seconds, self.diverged = content["step"], content["seconds"], content["diverged"]
        self.id = content["id"]
        return content


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Write the content of a state.

    Raises:
        OSError: the disk is full, or nothing may be written there.
    """
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # Closing its archive fails too where the disk is full, and hides that.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def summary(path: Path) -> dict[str, Any]:
    """Step, seconds of training and the step of divergence (None: it did not) of a state file, without its tensors."""
    content = torch.load(path, weights_only=True, mmap=True)
    return {"step": content["step"], "seconds": round(content["seconds"], 3), "diverged": content["diverged"]}


class Meter:
    """Sums since the last row of the log, on the device, so that no step waits for the host."""

    def __init__(self, device: torch.device):
        self.sums = {
            "losses": torch.zeros(3, dtype=torch.float64, device=device),
            "quarters": torch.zeros(2, 4, dtype=torch.float64, device=device),
            "grad_norm": torch.zeros((), dtype=torch.float64, device=device),
        }
        self.steps = self.images = 0

    def add(self, loss: Tensor, mse: Tensor, vb: Tensor, quarter: Tensor) -> None:
        """Losses of a batch, loss as weighted, mse and vb not, and the quarter 0..3 of their timesteps, each [B]."""
        self.sums["losses"] += torch.stack([loss, mse, vb]).double().sum(1)
        self.sums["quarters"].index_add_(1, quarter, torch.stack([mse, torch.ones_like(mse)]).double())
        self.steps += 1
        self.images += len(loss)

    def means(self) -> dict[str, float]:
        """Means per image; loss_q0..3 are the unweighted mse by quarter of the timesteps; grad_norm is per step."""
        loss, mse, vb = (self.sums["losses"] / self.images).tolist()
        total, count = self.sums["quarters"]
        quarters = {f"loss_q{q}": value for q, value in enumerate((total / count).tolist())}
        grad_norm = (self.sums["grad_norm"] / self.steps).item()
        return {"loss": loss, "mse": mse, "vb": vb, **quarters, "grad_norm": grad_norm}


def train_step(state: TrainState, batches: Batches) -> None:
    """One optimiser step on the batch that belongs to `state.step`; all of `state` moves.

    Nothing in it waits for the device, but for the order of a new epoch to be copied there.
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
    if state.run.model.dropout:
        # Dropout is the one draw that torch takes from its global generator; processes must not share it.
        torch.manual_seed(stream_seed(seed, f"dropout{parallel.rank() or ''}", step))

    mine = parallel.rank_slice(size)
    micro_batch = train.micro_batch or len(mine)
    gradients: list[Tensor] = []
    terms = torch.zeros(2, size, device=device)
    for first in range(mine.start, mine.stop, micro_batch):
        i = slice(first, min(first + micro_batch, mine.stop))
        *found, terms[:, i] = state.gradients(x_start[i], noise[i], t[i], mse_weight[i] / size, vb_weight[i] / size)
        if gradients:
            torch._foreach_add_(gradients, found)
        else:
            # The next call may write where this one did.
            gradients = [g.clone() for g in found] if len(mine) > micro_batch else found
    parallel.all_reduce_sum([*gradients, terms])
    for parameter, gradient in zip(state.parameters, gradients, strict=True):
        parameter.grad = gradient

    mse, vb = terms
    state.meter.add(mse_weight * mse + vb_weight * vb, mse, vb, t * 4 // schedule.timesteps)
    state.meter.sums["grad_norm"] += torch.nn.utils.get_total_norm(gradients)
    if state.history:
        # What the losses would weigh under uniform draws, as the history compares timesteps.
        state.history.add(t, state.tables.mse_weight[t] * mse + state.tables.vb_weight[t] * vb)

    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, train.learning_rate, train.learning_rate_warmup)
    state.optimizer.step()
    with torch.no_grad():
        decay = ema_decay(step, train.ema_decay, train.ema_warmup)
        torch._foreach_lerp_(state.ema, state.parameters, 1 - decay)
    state.step += 1


def learning_rate(step: int, base: float, warmup: int) -> float:
    """Linear from base / warmup to base over the first `warmup` steps, then constant. Steps count from 0."""
    return base * min(1.0, (step + 1) / warmup) if warmup else base


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """Decay of the moving average at a step: (1 + step) / (10 + step) until that passes `decay`.

    Without the warm-up a decay of 0.9999 still holds 37% of the untrained weights after 10,000 steps.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
