"""Variance-preserving diffusion: noise schedules, the posterior of q(x_t | x_0), and p(x_{t-1} | x_t).

Timesteps run from data to noise: t = 0 is the least noisy of T timesteps, t = T - 1 the noisiest. Images are float
tensors [B, C, H, W] in [-1, 1]; t is an int64 tensor [B]. Tables over t are float64 tensors [T]; `gather` casts their
values to the dtype of the images.

Sources: Ho et al. 2020 (DDPM, arXiv 2006.11239); Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.paths import NoisePath, Pair, epsilon, gather


def linear_betas(timesteps: int) -> Tensor:
    """Returns betas that increase linearly from 1e-4 to 0.02 (Ho et al. 2020, sec. 4), float64 [T].

    For T other than 1000, both ends are multiplied by 1000 / T, so that the total noise stays the same. No beta exceeds
    0.999.
    """
    scale = 1000 / timesteps
    # For small T the scaled end exceeds 1, which is not a valid variance.
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(timesteps: int) -> Tensor:
    """Returns the betas of the cosine schedule, float64 [T]: alphas_cumprod follows cos^2, and no beta exceeds 0.999.

    Source: Nichol & Dhariwal 2021, eq. 17.
    """
    edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


class NoiseSchedule(NoisePath):
    """Noise schedule of a variance-preserving process (alpha^2 + sigma^2 = 1): tables that follow from the betas.

    Args:
        betas: variances of q(x_t | x_{t-1}), [T], each in (0, 1).
        predict: what the net predicts, as for `NoisePath`.
        loss_in: space of the loss, as for `NoisePath`.

    Attributes:
        betas: the betas as float64 [T]. All attributes below are also float64 [T].
        alphas_cumprod: product of 1 - beta over the timesteps 0..t. In x_t, x_0 has the factor sqrt(alphas_cumprod).
        alphas_cumprod_prev: alphas_cumprod at t - 1; 1 at t = 0.
        snr: signal-to-noise ratio, alphas_cumprod / (1 - alphas_cumprod).
        posterior_variance: variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7).
        posterior_log_variance_clipped: logarithm of posterior_variance. At t = 0, where posterior_variance is 0, the
            value at t = 1 is used.
        posterior_mean_x_start, posterior_mean_x_t: coefficients of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0).

    Raises:
        ValueError: if betas is not a vector of numbers in (0, 1).
        InputError: as for `NoisePath`.
    """

    def __init__(self, betas: Tensor, predict: Callable[..., Pair] = epsilon, loss_in: str = "prediction"):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1 (exclusive)")
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        super().__init__(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), predict, loss_in)
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = _previous(self.alphas_cumprod)
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The posterior variance is 0 at t = 0, where its logarithm is not finite.
        self.posterior_log_variance_clipped = torch.cat(
            [self.posterior_variance[:2][-1:], self.posterior_variance[1:]]
        ).log()
        self.posterior_mean_x_start = betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_x_t = (1 - self.alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)

    def factors(self, t: Tensor, like: Tensor) -> Pair:
        """Returns alpha and sigma at t for samplers, each [B, 1, 1, 1].

        Both are roots of numbers that were rounded to the dtype of `like`, as in the reference code.
        """
        kept = gather(self.alphas_cumprod, t, like)
        return kept.sqrt(), (1 - kept).sqrt()

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7). Images [B, C, H, W], t [B]."""
        return gather(self.posterior_mean_x_start, t, x_t) * x_start + gather(self.posterior_mean_x_t, t, x_t) * x_t


class PMeanVariance(NamedTuple):
    """Mean and log variance of p(x_{t-1} | x_t), and the predicted x_0; each [B, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    pred_x_start: Tensor


def p_mean_variance(
    schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True
) -> PMeanVariance:
    """Returns the mean and log variance of the model's p(x_{t-1} | x_t), and the predicted x_0.

    The mean is the posterior mean (Ho et al. 2020, eq. 7) for the predicted x_0.

    Args:
        schedule: noise schedule of T timesteps.
        model_output: either the prediction and then v, [B, 2C, H, W], or only the prediction, [B, C, H, W]. If v is
            present, v interpolates the log variance between two bounds (Nichol & Dhariwal 2021, eq. 15). Without v, the
            log variance is `schedule.posterior_log_variance_clipped`.
        x_t: noisy images, [B, C, H, W].
        t: timesteps of the images, int64 [B].
        clip: whether the predicted x_0 is clipped to [-1, 1].
    """
    channels = x_t.shape[1]
    minimum = gather(schedule.posterior_log_variance_clipped, t, x_t)
    if model_output.shape[1] == 2 * channels:
        # v in [-1, 1] interpolates between the two bounds in the log domain.
        fraction = (model_output[:, channels:] + 1) / 2
        log_variance = fraction * gather(schedule.betas.log(), t, x_t) + (1 - fraction) * minimum
    else:
        log_variance = minimum.expand_as(x_t)
    pred_x_start = schedule.predict_x_start(model_output[:, :channels], x_t, t)
    if clip:
        pred_x_start = pred_x_start.clamp(-1, 1)
    return PMeanVariance(schedule.q_posterior_mean(pred_x_start, x_t, t), log_variance, pred_x_start)


def respaced(schedule: NoiseSchedule, timesteps: Tensor) -> NoiseSchedule:
    """Returns the noise schedule of a subset of the timesteps.

    Each timestep of the subset keeps its value of alphas_cumprod, and the betas are computed from these values.
    Source: Nichol & Dhariwal 2021, sec. 4.

    Args:
        schedule: noise schedule of T timesteps.
        timesteps: the subset in strictly increasing order, int64 [S], where S is the number of kept timesteps.

    Raises:
        ValueError: if `timesteps` is not strictly increasing.
    """
    if (timesteps.diff() <= 0).any():
        raise ValueError(f"timesteps must be strictly increasing, but are {timesteps.tolist()}")
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    return NoiseSchedule(1 - alphas_cumprod / _previous(alphas_cumprod), schedule.predict)


def _previous(alphas_cumprod: Tensor) -> Tensor:
    """Returns alphas_cumprod at t - 1 for each t, [T]. The value at t = 0 is 1."""
    return F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
