"""The hybrid loss, and loss weights over timesteps.

A loss weight is a function of the path that returns one factor per timestep, [T]. `WEIGHTS` maps names to these
functions. Images are [B, C, H, W]. Losses are per image, [B].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, p_mean_variance
from diffusion.paths import NoisePath, gather


def p2_weight(snr: Tensor, gamma: float, k: float) -> Tensor:
    """Returns the P2 weight 1 / (k + SNR)^gamma, in the shape [...] of `snr`.

    Source: Choi et al. 2022, arXiv 2204.00227, eq. 8, relative to the simple loss. For k = 1, the weight equals
    (1 - alphas_cumprod)^gamma. For gamma = 0, the weight is 1.
    """
    return (k + snr) ** -gamma


def unweighted(schedule: NoisePath) -> Tensor:
    """Returns the weight 1 for each timestep, [T], as in the simple loss of Ho et al. 2020, eq. 14."""
    return torch.ones_like(schedule.snr)


def p2(schedule: NoisePath, gamma: float, k: float) -> Tensor:
    """Returns the P2 weight of each timestep, [T] (Choi et al. 2022, arXiv 2204.00227, eq. 8)."""
    return p2_weight(schedule.snr, gamma, k)


def min_snr(schedule: NoisePath, gamma: float) -> Tensor:
    """Returns the Min-SNR weight min(SNR, gamma) / SNR of the squared error of epsilon, [T].

    Source: Hang et al. 2023, arXiv 2303.09556, sec. 3.4. The paper's weights for other predictions, such as
    min(SNR, gamma) / (SNR + 1) for v, are this weight times `NoisePath.epsilon_factor`.
    """
    return schedule.snr.clamp(max=gamma) / schedule.snr


def debiased(schedule: NoisePath) -> Tensor:
    """Returns the weight 1 / sqrt(SNR), [T] (Yu et al. 2023, arXiv 2310.08442)."""
    return schedule.snr.rsqrt()


def speed(schedule: NoisePath, lam: float, tau: int) -> Tensor:
    """Returns SpeeD's change-aware weight, [T] (Wang et al. 2024, arXiv 2405.17403).

    The weight is (1 - lam) + (2 lam - 1) r_t for t < tau, and 1 for t >= tau. Here, r_t is the derivative of
    1 - alphas_cumprod with respect to t, scaled to [0, 1]. As in the published code, the derivative is computed by
    central differences, and the scaling uses the minimum and maximum over all timesteps.
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
# Weights that their papers define for the error of epsilon. The others apply in the space of the loss.
WEIGHTS_OF_EPSILON = {"p2", "min_snr", "debiased"}


class HybridLoss(NamedTuple):
    """Weighted losses per image, each [B]. `loss` is `mse` + `vb`."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


def hybrid_loss(
    schedule: NoisePath,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    mse_weight: Tensor | float = 1.0,
    vb_weight: Tensor | float = 1.0,
) -> HybridLoss:
    """Returns the hybrid loss: the mean squared error of the prediction (mse) plus the scaled variational bound (vb).

    Source: Nichol & Dhariwal 2021, eq. 16. The vb term is the bound in bits per dimension, multiplied by T / 1000. The
    gradient of the vb term reaches only the predicted variance, because the prediction is detached in this term. The
    reference code (guided-diffusion with P2 weighting) applies the P2 weight to the mse term and never to the vb term.

    Args:
        schedule: path of T timesteps; a `NoiseSchedule` if the model predicts the variance.
        model_output: either the prediction and then v (see `diffusion.gaussian.p_mean_variance`), [B, 2C, H, W], or
            only the prediction, [B, C, H, W]. Without v, the vb term is 0.
        x_start: images in [-1, 1], [B, C, H, W].
        x_t: noisy images, the result of `schedule.q_sample(x_start, t, noise)`, [B, C, H, W].
        t: timesteps of the images, int64 [B].
        noise: noise in x_t, [B, C, H, W].
        mse_weight: factor of the mse term, one number or one per image [B].
        vb_weight: factor of the vb term, one number or one per image [B].
    """
    channels = x_start.shape[1]
    target = schedule.target(x_start, t, noise)
    mse = mse_weight * (model_output[:, :channels] - target).square().mean((1, 2, 3))
    if not isinstance(schedule, NoiseSchedule) or model_output.shape[1] == channels:
        vb = torch.zeros_like(mse)
    else:
        vb = vb_weight * _variational_bound(schedule, model_output, x_start, x_t, t) * (schedule.timesteps / 1000)
    return HybridLoss(mse + vb, mse, vb)


def _variational_bound(
    schedule: NoiseSchedule, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Returns L_t of Ho et al. 2020, eq. 5, in bits per dimension, [B]. It trains the variance only."""
    prediction, variance = model_output.chunk(2, dim=1)
    detached = torch.cat([prediction.detach(), variance], dim=1)
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
    """Returns the log-likelihood of each value of 8-bit images under a Gaussian, in the shape of x.

    The values are scaled to [-1, 1], so that each value has a bin of width 2/255 (Ho et al. 2020, eq. 13).
    """
    inverse_std = (-0.5 * log_variance).exp()
    upper = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    # The first and last bins extend to infinity.
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Returns the tanh approximation of the standard normal CDF (Page 1977), as in the reference code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
