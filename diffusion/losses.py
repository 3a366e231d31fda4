"""The hybrid loss, and weights over timesteps.

A weight is a function of the noise schedule that gives a table [T]; `WEIGHTS` names them for the experiment file.
Images are [B, C, H, W], losses per image [B].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, gather, p_mean_variance


def p2_weight(snr: Tensor, gamma: float, k: float) -> Tensor:
    """1 / (k + SNR)^gamma (Choi et al. 2022, arXiv 2204.00227, eq. 8, without the variational weight). snr [...]
    gives the same shape.

    With k = 1 it is (1 - alphas_cumprod)^gamma. gamma = 0 gives ones.
    """
    return (k + snr) ** -gamma


def unweighted(schedule: NoiseSchedule) -> Tensor:
    """Ones [T]: the simple loss of Ho et al. 2020, eq. 14."""
    return torch.ones_like(schedule.snr)


def p2(schedule: NoiseSchedule, gamma: float, k: float) -> Tensor:
    """The P2 weight of each timestep (Choi et al. 2022, arXiv 2204.00227). [T]."""
    return p2_weight(schedule.snr, gamma, k)


def min_snr(schedule: NoiseSchedule, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR, the form for epsilon-prediction (Hang et al. 2023, arXiv 2303.09556, sec. 3.4). [T].

    For v-prediction it would be min(SNR, gamma) / (SNR + 1), with only the numerator clipped.
    """
    return schedule.snr.clamp(max=gamma) / schedule.snr


def debiased(schedule: NoiseSchedule) -> Tensor:
    """1 / sqrt(SNR) (Yu et al. 2023, arXiv 2310.08442). [T]."""
    return schedule.snr.rsqrt()


def speed(schedule: NoiseSchedule, lam: float, tau: int) -> Tensor:
    """(1 - lam) + (2 lam - 1) minmax(d(1 - alphas_cumprod)/dt) for t < tau, 1 beyond. [T], in [1 - lam, lam] and 1.

    The change-aware weight of SpeeD (Wang et al. 2024, arXiv 2405.17403): steps at which the noise grows fast count
    for more. The derivative is by central differences and scaled over all timesteps, as in the published code.
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
    """Losses per image, [B]: loss = mse + vb, both as weighted."""

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
    """The hybrid loss of Nichol & Dhariwal 2021, eq. 16: the noise's mean squared error plus a scaled bound.

    The bound, in bits per dimension times T / 1000 (which changes nothing at T = 1000), trains the variance alone: the
    mean is detached in it. The code line that this agrees with weights mse by P2, and never the bound.

    Args:
        x_start, x_t, noise: [B, C, H, W]: images in [-1, 1], what `q_sample` makes of them, and the noise in it.
        model_output: [B, 2C, H, W] epsilon and variance, or [B, C, H, W] epsilon alone (then vb is 0).
        t: timesteps of the images, [B].
        mse_weight, vb_weight: factors of the two terms, per image [B] or one number.
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
    """L_t of Ho et al. 2020, eq. 5, in bits per dimension, [B]; its gradient reaches the variance only."""
    epsilon, variance = model_output.chunk(2, dim=1)
    frozen = torch.cat([epsilon.detach(), variance], dim=1)
    mean, log_variance, _ = p_mean_variance(schedule, frozen, x_t, t, clip=False)
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
    """log p of 8-bit images scaled to [-1, 1], each level a bin 2/255 wide (Ho et al. 2020, eq. 13). Shape of x."""
    inverse_std = (-0.5 * log_variance).exp()
    upper = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    # The outermost bins reach to infinity.
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation to the standard normal's distribution that the reference code line uses (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
