"""Why an arm converges as it does: loss and gradient of a checkpoint in bins of timesteps, on images and noise that all
arms of a seed share.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.data.arrays import load_images, split
from diffusion.data.batches import to_model_range
from diffusion.errors import InputError
from diffusion.gaussian import NoiseSchedule
from diffusion.losses import hybrid_loss
from diffusion.schemes import Tables
from diffusion.streams import generator
from diffusion.timesteps import draw_timesteps

ALL = "all"
DROWNED = "the mean gradient drowns in noise: raise probe.images"


class Spread:
    """The mean g of random vectors and the trace of their covariance, of vectors seen one by one."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, vector: Tensor) -> None:
        """See one more vector, [P]."""
        vector = vector.double()
        self.count += 1
        self.total = self.total.to(vector.device) + vector
        self.squares += vector.square().sum().item()

    @property
    def mean(self) -> Tensor:
        """g, float64 [P]."""
        return self.total / self.count

    @property
    def trace(self) -> float:
        """tr(Sigma), without bias; at least two vectors."""
        return (self.squares - self.total.square().sum().item() / self.count) / (self.count - 1)

    @property
    def square(self) -> float:
        """|g|^2, without bias: the square of the mean of n vectors is too large by trace / n. It may be negative."""
        return self.mean.square().sum().item() - self.trace / self.count


class Noise(NamedTuple):
    """A gradient g and the trace of the covariance of that of one image and timestep."""

    square: float
    """|g|^2, without bias, so possibly negative."""
    variance: float

    def rows(self) -> dict[str, float]:
        """Norm, variance and the noise scale tr(Sigma) / |g|^2 (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.9): the
        batch size, in images, at which noise and gradient are equally large. NaN where |g|^2 is not above 0."""
        known = self.square > 0
        return {
            "gradient_norm": self.square**0.5 if known else np.nan,
            "gradient_variance": self.variance,
            "noise_scale": self.variance / self.square if known else np.nan,
        }


UNKNOWN = Noise(np.nan, np.nan)


def bin_edges(timesteps: int, bins: int) -> list[int]:
    """Edges [bins + 1] of bins of nearly equal width: bin b holds the timesteps edges[b] to edges[b + 1] - 1."""
    return [timesteps * b // bins for b in range(bins + 1)]


def _bin_name(first: int, end: int) -> str:
    return f"{first}-{end - 1}"


def probe_images(directory: Path, held_out: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """Images of a prepared dataset to probe with: uint8 [N, H, W, 3], N the largest multiple of batch_size up to count.

    They are of those held out from training where there are any. A seed's arms and checkpoints share them.

    Raises:
        InputError: there are fewer than two batches.
    """
    images = load_images(directory)
    pool = split(len(images), held_out)[1] if held_out else np.arange(len(images))
    size = min(count, len(pool)) // batch_size * batch_size
    if size < 2 * batch_size:
        raise InputError(
            f"probe: {len(pool)} images are not two batches of {batch_size}: lower probe.batch_size or raise "
            "dataset.held_out"
        )
    order = torch.randperm(len(pool), generator=generator(seed, "probe images"))[:size].numpy()
    return images[np.sort(pool[order])]


def probe(
    model: nn.Module,
    schedule: NoiseSchedule,
    tables: Tables | None,
    images: np.ndarray,
    bins: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Probe one net: rows of timesteps ("0-99", or "all"), metric, value and reason (why a value is missing).

    Metrics, of each bin and of all timesteps:

    - `mse`, `vb`: the unweighted terms of the loss, mean over uniform timesteps. Arms compare image by image.
    - `gradient_norm`, `gradient_variance`, `noise_scale`: of the arm's own loss, its weights included, at timesteps
      drawn by its own density, for one image (`Noise`). In a bin the density is that within it. Over all timesteps the
      bins mix by their share of the draws (law of total variance). `stratified` batches are less noisy than this says.

    Args:
        model: epsilon-prediction, [N, 3, H, W] and t [N] to [N, 3 or 6, H, W].
        tables: the arm's; None where its density is learnt, so that only losses can be told.
        images: uint8 [N, H, W, 3], N a multiple of batch_size and at least twice that.
        bins: how many bins of equal width, at most the number of timesteps.
        batch_size: images behind each of the gradients whose spread is measured.
        seed: that of the run; images, noise and the numbers behind timesteps depend on it alone.
    """
    model.requires_grad_(True)
    parameters = list(model.parameters())
    x_start = to_model_range(torch.from_numpy(images))
    edges = bin_edges(schedule.timesteps, bins)

    def losses(index: int, probabilities: Tensor, weights: Tables | None):
        """Losses of all images in one bin, batch by batch, at timesteps drawn from probabilities within it."""
        noise = torch.randn(x_start.shape, generator=generator(seed, "probe noise", index))
        random = generator(seed, "probe timesteps", index)
        t = edges[index] + draw_timesteps(probabilities / probabilities.sum(), len(x_start), random)
        for batch in zip(*(of.split(batch_size) for of in (x_start, noise, t)), strict=True):
            x, epsilon, steps = (of.to(device) for of in batch)
            x_t = schedule.q_sample(x, steps, epsilon)
            factors = (weights.mse_weight[steps].float(), weights.vb_weight[steps].float()) if weights else ()
            yield hybrid_loss(schedule, model(x_t, steps), x, x_t, steps, epsilon, *factors)

    if tables is not None:
        tables = tables.to(torch.device(device))
    rows, mse, vb = [], [], []
    mean, correction, scatter = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for index, (first, end) in enumerate(itertools.pairwise(edges)):
        with torch.no_grad():
            terms = [(of.mse.mean().item(), of.vb.mean().item()) for of in losses(index, torch.ones(end - first), None)]
        of_mse, of_vb = np.mean(terms, axis=0)
        mse.append(of_mse)
        vb.append(of_vb)
        found = UNKNOWN
        share = tables.probabilities[first:end].sum().item() if tables else 0.0
        if tables and share:
            spread = Spread()
            for of in losses(index, tables.probabilities[first:end], tables):
                gradients = torch.autograd.grad(of.loss.mean(), parameters)
                spread.add(torch.cat([g.flatten() for g in gradients]))
            found = Noise(spread.square, batch_size * spread.trace)
            mean = mean.to(spread.total.device) + share * spread.mean
            correction += share**2 * spread.trace / spread.count
            scatter += share * (found.variance + found.square)
        why = DROWNED if share else "never drawn" if tables else "the density is learnt"
        rows += _rows(_bin_name(first, end), of_mse, of_vb, found, why)
    widths = np.diff(edges)
    square = mean.square().sum().item() - correction
    whole = Noise(square, scatter - square) if tables else UNKNOWN
    why = DROWNED if tables else "the density is learnt"
    return rows + _rows(ALL, np.average(mse, weights=widths), np.average(vb, weights=widths), whole, why)


def _rows(timesteps: str, mse: float, vb: float, noise: Noise, why: str) -> list[dict[str, Any]]:
    values = {"mse": mse, "vb": vb, **noise.rows()}
    return [
        {"timesteps": timesteps, "metric": name, "value": value, "reason": why if np.isnan(value) else ""}
        for name, value in values.items()
    ]


def diverged_rows(timesteps: int, bins: int, step: int) -> list[dict[str, Any]]:
    """The rows of `probe` for a net whose run diverged at a step: no values."""
    names = [_bin_name(first, end) for first, end in itertools.pairwise(bin_edges(timesteps, bins))] + [ALL]
    reason = f"diverged at step {step}"
    return [row for name in names for row in _rows(name, np.nan, np.nan, UNKNOWN, reason)]
