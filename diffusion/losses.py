"""The hybrid loss, and loss weights over timesteps.

A weight is a function of the noise schedule that returns a table [T]. `WEIGHTS` maps names to weights. Images are
[B, C, H, W]; losses are per image, [B].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, gather, p_mean_variance


def p2_weight(snr: Tensor, gamma: float, k: float) -> Tensor:
    """Returns the P2 weight 1 / (k + SNR)^gamma, in the shape [...] of `snr`.

    Source: Choi et al. 2022, arXiv 2204.00227, eq. 8, relative to the simple loss. For k = 1 it equals
    (1 - alphas_cumprod)^gamma; for gamma = 0 it is 1.
    """
    return (k + snr) ** -gamma


def unweighted(schedule: NoiseSchedule) -> Tensor:
    """Returns ones [T]: the simple loss of Ho et al. 2020, eq. 14."""
    return torch.ones_like(schedule.snr)


def p2(schedule: NoiseSchedule, gamma: float, k: float) -> Tensor:
    """Returns the P2 weight of each timestep, [T] (Choi et al. 2022, arXiv 2204.00227, eq. 8)."""
    return p2_weight(schedule.snr, gamma, k)


def min_snr(schedule: NoiseSchedule, gamma: float) -> Tensor:
    """Returns min(SNR, gamma) / SNR, [T]: the Min-SNR weight for models that predict epsilon.

    Source: Hang et al. 2023, arXiv 2303.09556, sec. 3.4. (For models that predict v, the paper's weight is
    min(SNR, gamma) / (SNR + 1).)
    """
    return schedule.snr.clamp(max=gamma) / schedule.snr


def debiased(schedule: NoiseSchedule) -> Tensor:
    """Returns 1 / sqrt(SNR), [T] (Yu et al. 2023, arXiv 2310.08442)."""
    return schedule.snr.rsqrt()


def speed(schedule: NoiseSchedule, lam: float, tau: int) -> Tensor:
    """Returns SpeeD's change-aware weight, [T]: larger where the noise level changes faster.

    It is (1 - lam) + (2 lam - 1) r_t for t < tau, and 1 for t >= tau, where r_t is the derivative of
    1 - alphas_cumprod, scaled to [0, 1]. Source: Wang et al. 2024, arXiv 2405.17403. As in the published code, the
    derivative uses central differences and is scaled over all timesteps.
    """
    (change,) = torch.gradient(1 - schedule.alphas_cumprod)
    scaled = (change - change.min()) / (change.max() - change.min())
    weight = (1 - lam) + (2 * lam - 1) * scaled
    weight[tau:] = 1
    return weight


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "unweighted": unweighted,
    "p2": p2,
    "min_snr": min_snr,
    "debiased": debiased,
    "speed": speed,
}


class HybridLoss(NamedTuple):
    """Weighted losses per image, each [B]: loss = mse + vb."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


def hybrid_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    mse_weight: Tensor | float = 1.0,
    vb_weight: Tensor | float = 1.0,
) -> HybridLoss:
    """Returns the hybrid loss: the mean squared error of epsilon (mse) plus the scaled variational bound (vb).

    Source: Nichol & Dhariwal 2021, eq. 16. The bound is in bits per dimension, multiplied by T / 1000. Its gradient
    reaches only the variance, because epsilon is detached in it. The reference code (guided-diffusion with P2
    weighting) applies the P2 weight to mse and never to vb.

    Args:
        schedule: noise schedule of T timesteps.
        model_output: epsilon and v, [B, 2C, H, W], or epsilon only, [B, C, H, W] (vb is then 0).
        x_start: images in [-1, 1], [B, C, H, W].
        x_t: noisy images, as `schedule.q_sample(x_start, t, noise)` returns them, [B, C, H, W].
        t: timesteps of the images, int64 [B].
        noise: the noise in x_t, [B, C, H, W].
        mse_weight: factor of mse, per image [B] or a number.
        vb_weight: factor of vb, per image [B] or a number.
    """
    channels = x_start.shape[1]
    mse = mse_weight * (model_output[:, :channels] - noise).square().mean((1, 2, 3))
    if model_output.shape[1] == channels:
        vb = torch.zeros_like(mse)
    else:
        vb = vb_weight * _variational_bound(schedule, model_output, x_start, x_t, t) * (schedule.timesteps / 1000)
    return HybridLoss(mse + vb, mse, vb)


def _variational_bound(
    schedule: NoiseSchedule, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Returns L_t of Ho et al. 2020, eq. 5, in bits per dimension, [B]; its gradient reaches only the variance."""
    epsilon, variance = model_output.chunk(2, dim=1)
    detached = torch.cat([epsilon.detach(), variance], dim=1)
    mean, log_variance, _ = p_mean_variance(schedule, detached, x_t, t, clip=False)
    true_mean = schedule.q_posterior_mean(x_start, x_t, t)
    true_log_variance = gather(schedule.posterior_log_variance_clipped, t, x_t)
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nll = -_discretized_gaussian_log_likelihood(x_start, mean, log_variance)
    nats = torch.where(t == 0, nll.mean((1, 2, 3)), divergence.mean((1, 2, 3)))
    return nats / math.log(2)


def _discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns log p of 8-bit images scaled to [-1, 1]: bins of width 2/255 (Ho et al. 2020, eq. 13). Shape of x."""
    inverse_std = (-0.5 * log_variance).exp()
    upper = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    # The first and last bins extend to infinity.
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Returns the tanh approximation of the standard normal CDF (Page 1977), which the reference code uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
