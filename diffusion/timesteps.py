"""Densities over timesteps, and functions that draw timesteps from a density.

A density is a function of the path that returns one probability per timestep, [T], with a sum of 1.
`DENSITIES` maps names to these functions. `LossHistory` is the only density that is learned during training.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.paths import NoisePath


def uniform(schedule: NoisePath) -> Tensor:
    """Returns the probability 1 / T for each timestep, [T] (Ho et al. 2020, algorithm 1)."""
    return torch.full_like(schedule.snr, 1 / schedule.timesteps)


def p2(schedule: NoisePath, gamma: float, k: float) -> Tensor:
    """Returns the density that is proportional to the P2 weight 1 / (k + SNR)^gamma, [T] (Choi et al. 2022)."""
    weight = (k + schedule.snr) ** -gamma
    return weight / weight.sum()


def log_normal_sigma(schedule: NoisePath, mean: float, std: float) -> Tensor:
    """Returns the density for which ln(sigma) ~ N(mean, std^2), where sigma = SNR^(-1/2), [T].

    Source: Karras et al. 2022, arXiv 2206.00364, table 1 (mean -1.2, std 1.2). Each timestep covers an interval of
    ln(sigma), which ends halfway to the neighbouring timesteps. The probability of the timestep is the normal
    probability of this interval. The normal distribution is truncated to the range of the schedule.
    """
    log_sigma = -0.5 * schedule.snr.log()
    midpoints = (log_sigma[1:] + log_sigma[:-1]) / 2
    ends = 2 * log_sigma[[0, -1]] - midpoints[[0, -1]]
    return _normal_probabilities(torch.cat([ends[:1], midpoints, ends[1:]]), mean, std)


def logit_normal(schedule: NoisePath, mean: float, std: float) -> Tensor:
    """Returns the density for which logit(time) ~ N(mean, std^2), [T].

    Source: Esser et al. 2024, arXiv 2403.03206, eq. 19. Time 0 is data and time 1 is noise, as in the paper. In the
    paper, time is the time of a rectified flow. Here, timestep t covers the times from t / T to (t + 1) / T.
    """
    edges = torch.arange(schedule.timesteps + 1, dtype=torch.float64) / schedule.timesteps
    return _normal_probabilities(torch.logit(edges), mean, std)


def speed(schedule: NoisePath, k: float, tau: int) -> Tensor:
    """Returns the density that is k times as high for t < tau as for t >= tau, [T].

    Source: SpeeD, Wang et al. 2024, arXiv 2405.17403, "asymmetric sampling". This function follows the paper. The
    published code differs: half of each batch is also mirrored to other timesteps, which changes the density.
    """
    weight = torch.ones_like(schedule.snr)
    weight[:tau] = k
    return weight / weight.sum()


def loss_second_moment(schedule: NoisePath, history: int, uniform_share: float) -> Tensor:
    """Returns the uniform density, [T], which `LossHistory` replaces during training (Nichol & Dhariwal 2021)."""
    return uniform(schedule)


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "p2": p2,
    "loss_second_moment": loss_second_moment,
    "log_normal_sigma": log_normal_sigma,
    "logit_normal": logit_normal,
    "speed": speed,
}


class LossHistory:
    """Density proportional to sqrt(E[L_t^2]), estimated from the most recent losses L_t of each timestep t.

    Source: Nichol & Dhariwal 2021, eq. 18. With importance-corrected losses, this density minimizes the variance of
    the total loss. The density is uniform until every timestep has `history` losses. After that, the estimated density
    is mixed with the uniform density, so that every timestep is still drawn.

    Args:
        timesteps: number of timesteps T.
        history: number of losses kept for each timestep.
        uniform_share: share of the uniform density in the mixture, in [0, 1].
        device: device of the losses that are added.
    """

    def __init__(self, timesteps: int, history: int, uniform_share: float, device: torch.device | str = "cpu"):
        self.history, self.uniform_share = history, uniform_share
        # One extra row takes the losses of a batch that newer losses of the same batch replace.
        self.losses = torch.zeros(timesteps + 1, history, dtype=torch.float64, device=device)
        self.counts = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """Returns the current density, float64 [T], with a sum of 1."""
        rms = self.losses[:-1].square().mean(1).sqrt()
        timesteps = len(rms)
        learned = rms / rms.sum() * (1 - self.uniform_share) + self.uniform_share / timesteps
        return torch.where((self.counts >= self.history).all(), learned, 1 / timesteps)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the losses [T + 1, history] and the number of losses added at each timestep [T], without copies.

        Later calls of `add` change these tensors. The last row of the losses is not used.
        """
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces the losses and their numbers by the tensors that `state_dict` returned, without copies.

        Args:
            state: losses [T + 1, history] and numbers of losses added [T], on the device of this history.
        """
        self.losses, self.counts = state["losses"], state["counts"]

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Adds the losses of a batch without synchronization with the device.

        If a timestep already has `history` losses, the new losses replace the oldest ones.

        Args:
            t: timesteps, int64 [B].
            losses: losses at these timesteps, [B], from the oldest to the newest.
        """
        t, order = t.sort(stable=True)
        # Position of each loss among the losses of the same timestep in this batch.
        position = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)
        added = torch.zeros_like(self.counts).index_add_(0, t, torch.ones_like(t))
        kept = position >= added[t] - self.history
        rows = torch.where(kept, t, len(self.counts))
        self.losses[rows, (self.counts[t] + position) % self.history] = losses[order].double()
        self.losses[-1] = 0
        self.counts += added


def draw_timesteps(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws timesteps with the given probabilities by a maximal coupling with uniform draws (Lindvall 2002, sec. I.5).

    Training runs whose generators have the same state share a uniform draw t. Each run keeps t with probability
    min(1, p_t T). Otherwise, the run draws a timestep from the part of its density that exceeds the uniform density.
    The result has exactly the given density.

    For equal images and noise, the coupling lowers the variance of the difference between the gradients of two runs by
    48%, compared with independent draws. If both runs apply their inverse CDF to the same uniform numbers, this
    variance is only 16% lower than with independent draws (`benchmarks/gradient_variance.py`).

    Args:
        probabilities: density [T] that sums to 1.
        count: number of timesteps to draw.
        generator: random generator; its device is the device of the result.

    Returns:
        timesteps in 0..T-1, int64 [count].
    """
    timesteps = len(probabilities)
    p = probabilities.to(generator.device, torch.float64)
    proposal, keep, rest = torch.rand(3, count, dtype=torch.float64, device=generator.device, generator=generator)
    t = (proposal * timesteps).long()
    excess = (p - 1 / timesteps).clamp(min=0).cumsum(0)
    redrawn = torch.searchsorted(excess, rest * excess[-1], right=True).clamp(max=timesteps - 1)
    return torch.where(keep < p[t] * timesteps, t, redrawn)


def draw_stratified(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws timesteps with the given probabilities: applies the inverse CDF to u_i = (u_0 + i / count) mod 1.

    Source: Kingma et al. 2021 (VDM, arXiv 2107.00630), appendix I.1. The offset u_0 is uniform in [0, 1). Training runs
    whose generators have the same state share u_0. Each timestep has its given probability, and a mean over the batch
    has a lower variance than with independent draws.

    Args:
        probabilities: density [T] that sums to 1.
        count: number of timesteps to draw.
        generator: random generator; its device is the device of the result.

    Returns:
        timesteps in 0..T-1, int64 [count].
    """
    cumulative = probabilities.to(generator.device, torch.float64).cumsum(0)
    offset = torch.rand((), dtype=torch.float64, device=generator.device, generator=generator)
    u = (offset + torch.arange(count, dtype=torch.float64, device=generator.device) / count) % 1
    return torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp(max=len(probabilities) - 1)


def _normal_probabilities(edges: Tensor, mean: float, std: float) -> Tensor:
    """Returns the probabilities [T] of N(mean, std^2) between increasing edges [T + 1], normalized to a sum of 1."""
    z = (edges - mean) / std
    # Differences of tail probabilities keep their precision; differences of numbers near 1 would lose it.
    below, above = 0.5 * torch.erfc(-z / math.sqrt(2)), 0.5 * torch.erfc(z / math.sqrt(2))
    probabilities = torch.where(z[1:] < 0, below[1:] - below[:-1], above[:-1] - above[1:])
    return probabilities / probabilities.sum()
