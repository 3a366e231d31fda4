"""The Gaussian diffusion process: noise schedules, q(x_t | x_0), its posterior, and p(x_{t-1} | x_t).

Time runs from data to noise: t = 0 is the least noisy of T timesteps, t = T - 1 the noisiest. Images are float tensors
[B, C, H, W] in [-1, 1]; t is an int64 tensor [B]. Tables over t are float64 [T] and are cast where they meet images.

Sources: Ho et al. 2020 (DDPM, arXiv 2006.11239); Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_betas(timesteps: int) -> Tensor:
    """Betas growing linearly from 1e-4 to 0.02 at T = 1000; for other T both ends scale by 1000 / T. [T] float64."""
    scale = 1000 / timesteps
    # From large to tiny T the scaled end may pass 1, where no variance is left to keep.
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17: alphas_cumprod follows cos^2; betas clipped at 0.999. [T] float64."""
    edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


class NoiseSchedule:
    """The tables that follow from betas, each a float64 tensor [T].

    `alphas_cumprod` is the share of x_0's variance that is left in x_t, `alphas_cumprod_prev` that in x_{t-1}, `snr`
    is alphas_cumprod / (1 - alphas_cumprod). `posterior_variance`, its logarithm `..._clipped` and the
    coefficients `posterior_mean_x_start` and `posterior_mean_x_t` of the mean are of q(x_{t-1} | x_t, x_0), Ho et al.
    2020, eq. 7.

    Args:
        betas: variances of q(x_t | x_{t-1}), [T], each in (0, 1).

    Raises:
        ValueError: betas are not a vector in (0, 1).
    """

    def __init__(self, betas: Tensor):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1")
        self.betas = betas
        self.timesteps = len(betas)
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.alphas_cumprod_prev = _previous(self.alphas_cumprod)
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The posterior variance is 0 at t = 0, so its logarithm takes the value at t = 1.
        self.posterior_log_variance_clipped = torch.cat(
            [self.posterior_variance[:2][-1:], self.posterior_variance[1:]]
        ).log()
        self.posterior_mean_x_start = betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_x_t = (1 - self.alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same tables on a device, where looking into them then waits for nothing."""
        moved = copy.copy(self)
        moved.__dict__.update({k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})
        return moved

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of q(x_t | x_0) for given noise (Ho et al. 2020, eq. 4). All images [B, C, H, W], t [B]."""
        return (
            gather(self.alphas_cumprod.sqrt(), t, x_start) * x_start
            + gather((1 - self.alphas_cumprod).sqrt(), t, x_start) * noise
        )

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7). Images [B, C, H, W], t [B]."""
        return gather(self.posterior_mean_x_start, t, x_t) * x_start + gather(self.posterior_mean_x_t, t, x_t) * x_t

    def predict_x_start(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 from predicted noise: `q_sample` (Ho et al. 2020, eq. 4) solved for it. Images [B, C, H, W], t [B]."""
        return (
            gather((1 / self.alphas_cumprod).sqrt(), t, x_t) * x_t
            - gather((1 / self.alphas_cumprod - 1).sqrt(), t, x_t) * epsilon
        )

    def predict_epsilon(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise between x_0 and x_t: the inverse of `predict_x_start`. Images [B, C, H, W], t [B]."""
        return (gather((1 / self.alphas_cumprod).sqrt(), t, x_t) * x_t - x_start) / gather(
            (1 / self.alphas_cumprod - 1).sqrt(), t, x_t
        )


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t), each [B, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    pred_x_start: Tensor


def p_mean_variance(
    schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True
) -> PMeanVariance:
    """p(x_{t-1} | x_t) as the model sees it: with the mean of Ho et al. 2020, eq. 7, at the x_0 that it predicts.

    Args:
        x_t, t: images [B, C, H, W] and their timesteps [B].
        model_output: [B, 2C, H, W] (epsilon, then v of the learned-range variance) or [B, C, H, W] (epsilon alone; the
            variance is then the clipped posterior variance).
        clip: clip the predicted x_0 to [-1, 1].
    """
    channels = x_t.shape[1]
    epsilon = model_output[:, :channels]
    minimum = gather(schedule.posterior_log_variance_clipped, t, x_t)
    if model_output.shape[1] == 2 * channels:
        # Nichol & Dhariwal 2021, eq. 15: v in [-1, 1] interpolates between the two bounds in the log domain.
        fraction = (model_output[:, channels:] + 1) / 2
        log_variance = fraction * gather(schedule.betas.log(), t, x_t) + (1 - fraction) * minimum
    else:
        log_variance = minimum.expand_as(x_t)
    pred_x_start = schedule.predict_x_start(epsilon, x_t, t)
    if clip:
        pred_x_start = pred_x_start.clamp(-1, 1)
    return PMeanVariance(schedule.q_posterior_mean(pred_x_start, x_t, t), log_variance, pred_x_start)


def respaced(schedule: NoiseSchedule, timesteps: Tensor) -> NoiseSchedule:
    """The process seen only at some timesteps: same alphas_cumprod there, new betas between them.

    Nichol & Dhariwal 2021, sec. 4.

    Args:
        timesteps: growing indices into the schedule, [S].

    Raises:
        ValueError: they do not grow.
    """
    if (timesteps.diff() <= 0).any():
        raise ValueError(f"timesteps must grow, but are {timesteps.tolist()}")
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    return NoiseSchedule(1 - alphas_cumprod / _previous(alphas_cumprod))


def _previous(alphas_cumprod: Tensor) -> Tensor:
    """alphas_cumprod of t - 1, which is 1 before t = 0. [T]."""
    return F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Values of a [T] table at t [B], as [B, 1, 1, 1] in the dtype and on the device of `like`."""
    return table.to(like.device)[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
