"""Densities over timesteps, and how timesteps are drawn from them.

A density is a function of the noise schedule that gives probabilities [T]; `DENSITIES` names them for the experiment
file. `LossHistory` is the one density that is learnt during training.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule


def uniform(schedule: NoiseSchedule) -> Tensor:
    """1 / T for each timestep. [T], sums to 1."""
    return torch.full_like(schedule.snr, 1 / schedule.timesteps)


def p2(schedule: NoiseSchedule, gamma: float, k: float) -> Tensor:
    """Probability proportional to the P2 weight 1 / (k + SNR)^gamma (Choi et al. 2022). [T], sums to 1."""
    weight = (k + schedule.snr) ** -gamma
    return weight / weight.sum()


def log_normal_sigma(schedule: NoiseSchedule, mean: float, std: float) -> Tensor:
    """ln(sigma) ~ N(mean, std^2), sigma = SNR^(-1/2) (Karras et al. 2022, arXiv 2206.00364, table 1: -1.2, 1.2).

    Each timestep takes the normal mass between the midpoints to its neighbours in ln(sigma); what lies outside the
    schedule's range of sigma is cut off. [T], sums to 1.
    """
    log_sigma = -0.5 * schedule.snr.log()
    middles = (log_sigma[1:] + log_sigma[:-1]) / 2
    ends = 2 * log_sigma[[0, -1]] - middles[[0, -1]]
    return _normal_mass(torch.cat([ends[:1], middles, ends[1:]]), mean, std)


def logit_normal(schedule: NoiseSchedule, mean: float, std: float) -> Tensor:
    """logit(time) ~ N(mean, std^2), where timestep t stands for the times from t / T to (t + 1) / T.

    Esser et al. 2024 (arXiv 2403.03206), eq. 19, with their direction of time: 0 is data, 1 is noise. Their time is
    that of a rectified flow; here it is the share of the schedule that has passed. [T], sums to 1.
    """
    edges = torch.arange(schedule.timesteps + 1, dtype=torch.float64) / schedule.timesteps
    return _normal_mass(torch.logit(edges), mean, std)


def speed(schedule: NoiseSchedule, k: float, tau: int) -> Tensor:
    """k times as likely for t < tau as beyond (SpeeD: Wang et al. 2024, arXiv 2405.17403, asymmetric sampling).

    The published code then mirrors half of the batch at another timestep, which changes the density; the paper, and
    this function, do not. [T], sums to 1.
    """
    weight = torch.ones_like(schedule.snr)
    weight[:tau] = k
    return weight / weight.sum()


def loss_second_moment(schedule: NoiseSchedule, history: int, uniform_share: float) -> Tensor:
    """Where `LossHistory` (Nichol & Dhariwal 2021) starts: 1 / T for each timestep. [T], sums to 1."""
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
    """The newest losses of each timestep, and the density sqrt(E[L_t^2]) that follows from them.

    Nichol & Dhariwal 2021, eq. 18: among all densities, with the losses divided by it, this one gives the sum over t
    the least variance. Uniform until every timestep has a full history, then mixed with a little of the uniform
    density, so that none is forgotten.

    Args:
        timesteps: T.
        history: losses kept for each timestep.
        uniform_share: share of the uniform density, in [0, 1].
        device: where losses arrive.
    """

    def __init__(self, timesteps: int, history: int, uniform_share: float, device: torch.device | str = "cpu"):
        self.history, self.uniform_share = history, uniform_share
        # The row beyond the last timestep takes what is older than the history already within a batch.
        self.losses = torch.zeros(timesteps + 1, history, dtype=torch.float64, device=device)
        self.counts = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """[T] float64, sums to 1."""
        rms = self.losses[:-1].square().mean(1).sqrt()
        total = len(rms)
        learnt = rms / rms.sum() * (1 - self.uniform_share) + self.uniform_share / total
        return torch.where((self.counts >= self.history).all(), learnt, 1 / total)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the losses and their counts, as tensors [...] that later calls of `add` change."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from what `state_dict` returned: the same tensors [...], on this device."""
        self.losses, self.counts = state["losses"], state["counts"]

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses of a batch, in its order. t int64 [B], losses [B]. Nothing waits for the device."""
        t, order = t.sort(stable=True)
        earlier = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)
        same = torch.zeros_like(self.counts).index_add_(0, t, torch.ones_like(t))
        fits = earlier >= same[t] - self.history
        rows = torch.where(fits, t, len(self.counts))
        self.losses[rows, (self.counts[t] + earlier) % self.history] = losses[order].double()
        self.losses[-1] = 0
        self.counts += same


def draw_timesteps(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps with the given probabilities, equal to those of a uniform draw as often as can be.

    Arms that share the generator's state share a uniform draw t ~ 1/T; each keeps it with probability
    min(1, p_t T) and otherwise draws from what its density has above the uniform one (the maximal coupling; Lindvall
    2002, I.5). The result has exactly the given density. At equal images and noise this lowers the variance of the
    difference of two arms' gradients by 48% against independent draws; sharing u in the inverse CDF lowers it by 16%
    (`benchmarks/gradient_variance.py`).

    Args:
        probabilities: [T], sums to 1.
        generator: of the stream "timesteps" at this step; its device is that of the result.

    Returns:
        int64 [count], each in 0..T-1.
    """
    timesteps = len(probabilities)
    p = probabilities.to(generator.device, torch.float64)
    proposal, keep, rest = torch.rand(3, count, dtype=torch.float64, device=generator.device, generator=generator)
    t = (proposal * timesteps).long()
    excess = (p - 1 / timesteps).clamp(min=0).cumsum(0)
    redrawn = torch.searchsorted(excess, rest * excess[-1], right=True).clamp(max=timesteps - 1)
    return torch.where(keep < p[t] * timesteps, t, redrawn)


def draw_stratified(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps with the given probabilities, spread evenly: u_i = (u_0 + i / B) mod 1 through the inverse CDF.

    Kingma et al. 2021 (VDM, arXiv 2107.00630), appendix I.1: each timestep keeps its density, and the mean over a
    batch varies less. Arms that share the generator's state share u_0.

    Args and returns: as `draw_timesteps`.
    """
    cumulative = probabilities.to(generator.device, torch.float64).cumsum(0)
    offset = torch.rand((), dtype=torch.float64, device=generator.device, generator=generator)
    u = (offset + torch.arange(count, dtype=torch.float64, device=generator.device) / count) % 1
    return torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp(max=len(probabilities) - 1)


def _normal_mass(edges: Tensor, mean: float, std: float) -> Tensor:
    """Share of N(mean, std^2) in each of the intervals between growing edges [T + 1], of all that lies in them."""
    z = (edges - mean) / std
    # Measured from the nearer tail: differences of numbers near 1 would lose the far one.
    below, above = 0.5 * torch.erfc(-z / math.sqrt(2)), 0.5 * torch.erfc(z / math.sqrt(2))
    mass = torch.where(z[1:] < 0, below[1:] - below[:-1], above[:-1] - above[1:])
    return mass / mass.sum()
