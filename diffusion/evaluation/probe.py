"""Probe of a checkpoint: its losses and the noise of its gradient in bins of timesteps.

All arms and checkpoints of a seed are probed with the same images and noise.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.data.arrays import load_images, split
from diffusion.data.batches import to_model_range
from diffusion.errors import InputError
from diffusion.gaussian import NoiseSchedule
from diffusion.losses import HybridLoss, hybrid_loss
from diffusion.schemes import Tables
from diffusion.streams import generator
from diffusion.timesteps import draw_timesteps

ALL = "all"  # name of the bin of all timesteps
LEARNED_DENSITY = "the density is learned"


class GradientMoments:
    """Mean and covariance trace of random vectors, accumulated one vector at a time."""

    def __init__(self) -> None:
        self.count, self.total, self.sum_of_squares = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, vector: Tensor) -> None:
        """Add a vector [P]."""
        vector = vector.double()
        self.count += 1
        self.total = self.total.to(vector.device) + vector
        self.sum_of_squares += vector.square().sum().item()

    @property
    def mean(self) -> Tensor:
        """Mean of the vectors, float64 [P]."""
        return self.total / self.count

    @property
    def covariance_trace(self) -> float:
        """Unbiased estimate of the trace of the covariance; needs at least two vectors."""
        return (self.sum_of_squares - self.total.square().sum().item() / self.count) / (self.count - 1)

    @property
    def squared_norm(self) -> float:
        """Unbiased estimate of the squared norm of the expectation; it may be negative.

        The squared norm of the mean of n vectors is too large by covariance_trace / n.
        """
        return self.mean.square().sum().item() - self.covariance_trace / self.count


class GradientNoise(NamedTuple):
    """Expectation and variance of the gradient of one image at one random timestep."""

    squared_norm: float
    """Unbiased estimate of the squared norm |g|^2 of the expected gradient; it may be negative."""
    variance: float
    """Trace of the covariance, tr(Sigma)."""


UNKNOWN = GradientNoise(np.nan, np.nan)


def bin_edges(timesteps: int, bins: int) -> list[int]:
    """Edges [bins + 1] of bins of nearly equal width: bin b contains the timesteps edges[b] to edges[b + 1] - 1."""
    return [timesteps * b // bins for b in range(bins + 1)]


def _bin_name(first: int, end: int) -> str:
    return f"{first}-{end - 1}"


def probe_images(directory: Path, held_out: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """Choose the images of a probe, the same for all arms and checkpoints of a seed.

    Args:
        directory: A prepared dataset.
        held_out: Number of images that are held out from training; if it is positive, only these are used.
        count: Maximum number of images.
        batch_size: Images per batch.
        seed: Seed of the run.

    Returns:
        uint8 [N, H, W, 3], N the largest possible multiple of batch_size.

    Raises:
        InputError: There are fewer than two batches.
    """
    images = load_images(directory, verify=True)
    candidates = split(len(images), held_out)[1] if held_out else np.arange(len(images))
    size = min(count, len(candidates)) // batch_size * batch_size
    if size < 2 * batch_size:
        raise InputError(
            f"a probe needs two batches of batch_size {batch_size}, but there are {len(candidates)} images: lower "
            "batch_size, or raise held_out"
        )
    order = torch.randperm(len(candidates), generator=generator(seed, "probe images"))[:size].numpy()
    return images[np.sort(candidates[order])]


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
    """Measure losses and gradient noise of a network, in bins of timesteps and over all timesteps.

    The metrics are:

    - `mse`, `vb`: The unweighted terms of the loss, averaged over uniform timesteps, which allows arms to be compared.
    - `gradient_squared_norm`, `gradient_variance`: See `GradientNoise`. The loss is the arm's own, with its weights, at
      timesteps drawn from its own density, restricted to the bin. So a bin with probability p_b contributes
      p_b * gradient_variance to the variance over all timesteps; the rest is the variance between the bins (law of
      total variance). Batches with stratified timesteps have less noise.

    No estimate of |g|^2 is left out because it is negative: only the mean of all estimates is unbiased.

    Args:
        model: Predicts epsilon; maps x_t [N, 3, H, W] and t [N] to [N, 3 or 6, H, W].
        schedule: The noise schedule.
        tables: The arm's density and weights; None if the density is learned, then only losses are measured.
        images: uint8 [N, H, W, 3], N a multiple of batch_size and at least twice that.
        bins: Number of bins of equal width, at most the number of timesteps.
        batch_size: Images per gradient; the variance is estimated between these gradients.
        seed: Seed of the run, which determines noise and timesteps.
        device: Device of the model.

    Returns:
        Rows with the keys timesteps ("0-99", or "all"), metric, value, and reason (why a value is NaN).
    """
    model.requires_grad_(True)
    parameters = list(model.parameters())
    x_start_all = to_model_range(torch.from_numpy(images))
    edges = bin_edges(schedule.timesteps, bins)

    def losses(index: int, probabilities: Tensor, weights: Tables | None) -> Iterator[HybridLoss]:
        """Yield the losses of each batch, at timesteps drawn within bin `index` from the probabilities [width]."""
        epsilon_all = torch.randn(x_start_all.shape, generator=generator(seed, "probe noise", index))
        random = generator(seed, "probe timesteps", index)
        t_all = edges[index] + draw_timesteps(probabilities / probabilities.sum(), len(x_start_all), random)
        for batch in zip(*(tensor.split(batch_size) for tensor in (x_start_all, epsilon_all, t_all)), strict=True):
            x_start, epsilon, t = (part.to(device) for part in batch)
            x_t = schedule.q_sample(x_start, t, epsilon)
            factors = (weights.mse_weight[t].float(), weights.vb_weight[t].float()) if weights else ()
            yield hybrid_loss(schedule, model(x_t, t), x_start, x_t, t, epsilon, *factors)

    if tables is not None:
        tables = tables.to(torch.device(device))
    rows, bin_losses = [], []
    mean, mean_bias, second_moment = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for index, (first, end) in enumerate(itertools.pairwise(edges)):
        with torch.no_grad():
            uniform = losses(index, torch.ones(end - first), None)
            mse, vb = np.mean([(batch.mse.mean().item(), batch.vb.mean().item()) for batch in uniform], axis=0)
        bin_losses.append((mse, vb))
        noise = UNKNOWN
        probability = tables.probabilities[first:end].sum().item() if tables else 0.0
        if tables and probability:
            moments = GradientMoments()
            for batch in losses(index, tables.probabilities[first:end], tables):
                gradients = torch.autograd.grad(batch.loss.mean(), parameters)
                moments.add(torch.cat([gradient.flatten() for gradient in gradients]))
            noise = GradientNoise(moments.squared_norm, batch_size * moments.covariance_trace)
            mean = mean.to(moments.total.device) + probability * moments.mean
            mean_bias += probability**2 * moments.covariance_trace / moments.count
            second_moment += probability * (noise.variance + noise.squared_norm)
        reason = "never drawn" if tables else LEARNED_DENSITY
        rows += _rows(_bin_name(first, end), mse, vb, noise, reason)
    mse, vb = (np.average(values, weights=np.diff(edges)) for values in zip(*bin_losses, strict=True))
    squared_norm = mean.square().sum().item() - mean_bias
    noise = GradientNoise(squared_norm, second_moment - squared_norm) if tables else UNKNOWN
    return rows + _rows(ALL, mse, vb, noise, LEARNED_DENSITY)


def _rows(timesteps: str, mse: float, vb: float, noise: GradientNoise, reason: str) -> list[dict[str, Any]]:
    values = {
        "mse": mse, "vb": vb, "gradient_squared_norm": noise.squared_norm, "gradient_variance": noise.variance
    }  # fmt: skip
    return [
        {"timesteps": timesteps, "metric": name, "value": value, "reason": reason if np.isnan(value) else ""}
        for name, value in values.items()
    ]


def diverged_rows(timesteps: int, bins: int, step: int) -> list[dict[str, Any]]:
    """Return the rows of `probe` for a run that diverged at a step: all values are NaN."""
    names = [_bin_name(first, end) for first, end in itertools.pairwise(bin_edges(timesteps, bins))] + [ALL]
    reason = f"diverged at step {step}"
    return [row for name in names for row in _rows(name, np.nan, np.nan, UNKNOWN, reason)]
