"""Probe of a checkpoint: the losses and the gradient noise of the net, in bins of timesteps.

All arms (compared training schemes) and checkpoints with the same seed are probed with the same images and noise.
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
from diffusion.gradients import LossGradients
from diffusion.paths import NoisePath
from diffusion.progress import log_ready
from diffusion.schemes import Tables
from diffusion.streams import generator
from diffusion.timesteps import draw_timesteps

ALL = "all"  # name of the bin of all timesteps
LEARNED_DENSITY = "the density is learned"


class GradientMoments:
    """Mean, and trace of the covariance, of random vectors that are added one at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.total, self.sum_of_squares = torch.zeros(2, dtype=torch.float64)

    def add(self, vector: Tensor) -> None:
        """Adds a vector [P]."""
        vector = vector.double()
        self.count += 1
        self.total = self.total.to(vector.device) + vector
        self.sum_of_squares = self.sum_of_squares.to(vector.device) + vector.square().sum()

    @property
    def mean(self) -> Tensor:
        """Mean of the vectors, float64 [P]."""
        return self.total / self.count

    @property
    def covariance_trace(self) -> float:
        """Unbiased estimate of the trace of the covariance. At least two vectors are needed."""
        return (self.sum_of_squares.item() - self.total.square().sum().item() / self.count) / (self.count - 1)

    @property
    def squared_norm(self) -> float:
        """Unbiased estimate of the squared norm of the expected vector. The estimate may be negative.

        On average, the squared norm of the mean of n vectors is too large by covariance_trace / n. This excess is
        subtracted.
        """
        return self.mean.square().sum().item() - self.covariance_trace / self.count


class GradientNoise(NamedTuple):
    """Expectation g and covariance Sigma of the gradient of one image at one random timestep."""

    squared_norm: float
    """Unbiased estimate of |g|^2, the squared norm of the expected gradient. The estimate may be negative."""
    variance: float
    """Trace of the covariance, tr(Sigma)."""


UNKNOWN = GradientNoise(np.nan, np.nan)


def bin_edges(timesteps: int, bins: int) -> list[int]:
    """Returns the edges [bins + 1] of bins of nearly equal width.

    Bin b contains the timesteps edges[b] to edges[b + 1] - 1.
    """
    return [timesteps * b // bins for b in range(bins + 1)]


def _bin_name(first: int, end: int) -> str:
    return f"{first}-{end - 1}"


def probe_images(directory: Path, held_out: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """Chooses the images of a probe. The images are the same for all arms and checkpoints with the same seed.

    Args:
        directory: directory of a prepared dataset.
        held_out: number of images that are held out from training. If positive, only held-out images are chosen.
        count: maximum number of images.
        batch_size: images per batch.
        seed: seed of the run.

    Returns:
        images, uint8 [N, H, W, 3]. N is the largest possible multiple of batch_size up to `count`.

    Raises:
        InputError: if fewer than two batches are possible.
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
    schedule: NoisePath,
    tables: Tables | None,
    images: np.ndarray,
    bins: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> list[dict[str, Any]]:
    """Measures the losses and the gradient noise of a net, in bins of timesteps and over all timesteps.

    The metrics are:

    - `mse`, `vb`: the mean squared error of epsilon, whatever the net predicts, and the unweighted vb term of the loss,
      averaged over uniformly drawn timesteps. These values are comparable between arms (training schemes).
    - `gradient_squared_norm`, `gradient_variance`: see `GradientNoise`. The gradient is that of the training loss of
      the arm: the terms have the weights of the arm, and timesteps are drawn from the density of the arm, restricted to
      the bin.

    A bin with probability p_b contributes p_b * gradient_variance to the variance over all timesteps. The rest of this
    variance is the variance between the bins (law of total variance). Batches with stratified timesteps have less
    gradient noise than these values state.

    Negative estimates of |g|^2 are kept, because only the mean of all estimates is unbiased.

    Args:
        model: net that maps x_t [N, 3, H, W] and t [N] to [N, 3 or 6, H, W].
        schedule: path on which the net was trained, with what the net predicts.
        tables: density and loss weights of the arm. None if the density is learned: then only the losses are measured.
        images: images, uint8 [N, H, W, 3]. N is a multiple of batch_size, and at least 2 * batch_size.
        bins: number of bins of nearly equal width, at most the number of timesteps.
        batch_size: images per gradient. The variance is estimated between the gradients of different batches.
        seed: seed of the run, which determines noise and timesteps.
        device: device of the model.
        precision: precision of the gradients and losses: "fp32", "bf16" or "auto" (see
            `diffusion.devices.compute_dtype`).

    Returns:
        rows with the keys `timesteps` (such as "0-99", or "all"), `metric`, `value`, and `reason` (why the value is
        NaN, or "").
    """
    model.requires_grad_(True)
    compute = LossGradients(model, schedule, precision)
    compute.refresh()
    x_start_all = to_model_range(torch.from_numpy(images))
    edges = bin_edges(schedule.timesteps, bins)

    def batches(index: int, probabilities: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields images, noise and timesteps of each batch.

        The timesteps are in bin `index`, and are drawn in proportion to `probabilities` [width of the bin].
        """
        epsilon_all = torch.randn(x_start_all.shape, generator=generator(seed, "probe noise", index))
        random = generator(seed, "probe timesteps", index)
        t_all = edges[index] + draw_timesteps(probabilities / probabilities.sum(), len(x_start_all), random)
        for batch in zip(*(tensor.split(batch_size) for tensor in (x_start_all, epsilon_all, t_all)), strict=True):
            yield tuple(part.to(device, non_blocking=True) for part in batch)

    of_epsilon = torch.stack([schedule.epsilon_factor, torch.ones_like(schedule.epsilon_factor)]).float().to(device)

    def losses(x_start: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Returns the mse of epsilon and the vb of each image, [2, batch_size]."""
        return compute.losses(x_start, epsilon, t) * of_epsilon[:, t]

    if tables is not None:
        tables = tables.to(torch.device(device))
    rows, bin_losses = [], []
    mean, mean_bias, second_moment = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for index, (first, end) in enumerate(itertools.pairwise(edges)):
        uniform = [losses(*batch).mean(1) for batch in batches(index, torch.ones(end - first))]
        mse, vb = torch.stack(uniform).double().mean(0).tolist()
        bin_losses.append((mse, vb))
        noise = UNKNOWN
        probability = tables.probabilities[first:end].sum().item() if tables else 0.0
        if tables and probability:
            moments = GradientMoments()
            for x_start, epsilon, t in batches(index, tables.probabilities[first:end]):
                weights = (tables.mse_weight[t].float() / batch_size, tables.vb_weight[t].float() / batch_size)
                gradients, _ = compute(x_start, epsilon, t, *weights)
                moments.add(torch.cat([gradient.flatten() for gradient in gradients]))
                log_ready()
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
    """Returns the rows of `probe` for a run that diverged at a step. All values are NaN."""
    names = [_bin_name(first, end) for first, end in itertools.pairwise(bin_edges(timesteps, bins))] + [ALL]
    reason = f"diverged at step {step}"
    return [row for name in names for row in _rows(name, np.nan, np.nan, UNKNOWN, reason)]
