"""Simulated studies with power-law curves, and what the analysis computes from them."""

from typing import NamedTuple

import numpy as np

from convergence.analysis.comparison import MARGIN_PERCENT
from convergence.analysis.curves import isotonic_fit, log_factor, mean_over_images, time_to_threshold
from convergence.analysis.decision import Outcome, decide
from convergence.analysis.effects import in_unit, shown
from convergence.analysis.intervals import Interval, censored_interval, t_interval

# The FD is 54 at the first checkpoint and falls with this power of the training images, as the published FFHQ curves.
FIRST_LEVEL, POWER_LAW = np.log(54), 0.35
BAD_RUN = np.log(1.25)  # how much higher the level of a bad run is


class Noise(NamedTuple):
    """Noise of the log of the metric at each checkpoint."""

    sd: float
    """Standard deviation."""
    memory: float
    """Correlation of consecutive checkpoints of a run."""
    pairing: float
    """Correlation of the two arms of a seed."""
    tails: float = np.inf
    """Degrees of freedom of its t-distribution; infinity gives a normal distribution."""
    ratio: float = 1.0
    """Standard deviation in the candidate, relative to that in the baseline."""
    run: float = 0.0
    """Standard deviation of a level that all checkpoints of a run share, and no other run."""
    bad: float = 0.0
    """Probability of a bad run in the candidate. Its other runs are better, so that the means of the arms are equal."""


# Residuals of power laws fitted to published FID curves with one run per arm: the standard deviations are 0.15 and
# 0.28 on FFHQ, and 0.13 and 0.14 on Flowers; the correlation of the arms is 0.2, that of consecutive checkpoints -0.5
# to 0.5.
NOISES = {
    "2%, paired": Noise(0.02, 0.5, 0.8),
    "5%, paired": Noise(0.05, 0.5, 0.5),
    "14%, as published (Flowers)": Noise(0.14, 0.0, 0.2),
    "28%, as published (FFHQ)": Noise(0.28, 0.5, 0.2),
    "28%, heavy tails": Noise(0.28, 0.5, 0.2, tails=3.0),
    "5%, 15% in the candidate": Noise(0.05, 0.5, 0.5, ratio=3.0),
    "5%, a level of 5% per run": Noise(0.05, 0.5, 0.5, run=0.05),
    "5%, 15% bad runs in the candidate": Noise(0.05, 0.5, 0.5, bad=0.15),
}


def simulate(
    rng: np.random.Generator, studies: int, seeds: int, factor: float, noise: Noise, checkpoints: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate the curves of studies; the candidate needs `factor` times the images of the baseline, with AR(1) noise.

    Returns:
        Logs of the metric of baseline and candidate, [studies, seeds, 2, checkpoints], and images [checkpoints].
    """
    images = np.arange(1, checkpoints + 1, dtype=float)
    size = (checkpoints, studies, seeds)
    if np.isinf(noise.tails):
        draws = rng.standard_normal((3, *size))
    else:
        draws = rng.standard_t(noise.tails, (3, *size)) / np.sqrt(noise.tails / (noise.tails - 2))
    shared, *own = draws
    shocks = np.sqrt(noise.pairing) * shared + np.sqrt(1 - noise.pairing) * np.array(own)  # [2, K, ...]
    errors = [shocks[:, 0]]
    for k in range(1, checkpoints):
        errors.append(noise.memory * errors[-1] + np.sqrt(1 - noise.memory**2) * shocks[:, k])
    errors = noise.sd * np.moveaxis(np.array(errors), (0, 1), (-1, -2))  # [studies, seeds, 2, K]
    errors *= np.array([[1], [noise.ratio]])
    runs = noise.run * rng.standard_normal((studies, seeds, 2))
    runs[..., 1] += BAD_RUN * ((rng.random((studies, seeds)) < noise.bad) - noise.bad)
    curves = FIRST_LEVEL - POWER_LAW * (np.log(images) - np.log([[1], [factor]]))
    return curves + errors + runs[..., None], images


class Effects(NamedTuple):
    """Intervals of the difference in level or in log images, candidate minus baseline, of each study."""

    average: Interval
    """Of the level averaged over images (A)."""
    final: Interval
    """Of the level at the last checkpoint (E)."""
    images: Interval
    """Of the images until the lowest level that all runs of the study reach (S)."""
    average_90: Interval
    """The 90% interval of A."""


def effects(levels: np.ndarray, images: np.ndarray) -> Effects:
    """Compute the effects from levels [studies, seeds, 2, checkpoints]."""
    difference = levels[:, :, 1] - levels[:, :, 0]
    average = mean_over_images(difference, images)
    fit = isotonic_fit(levels)
    needed = intervals(*factors(fit, images, fit[..., -1].max(axis=(1, 2))))
    return Effects(t_interval(average), t_interval(difference[..., -1]), needed, t_interval(average, 0.9))


def factors(levels: np.ndarray, images: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute bounds of the log factors of images, each [studies, seeds], at one level per study."""
    low, high = time_to_threshold(levels, images, threshold[:, None, None])
    return log_factor((low[..., 0], high[..., 0]), (low[..., 1], high[..., 1]))


def intervals(low: np.ndarray, high: np.ndarray) -> Interval:
    """Compute the intervals of studies from the bounds of their pairs [studies, seeds]."""
    with np.errstate(invalid="ignore"):
        result = t_interval(low)
    for study in np.flatnonzero((low < high).any(axis=1)):
        for end, value in zip(result, censored_interval(low[study], high[study]), strict=True):
            end[study] = value
    return result


def outcomes(effects: Effects) -> list[Outcome]:
    """Look up the outcome of each study in the decision table."""
    words = [map(shown, *interval[1:]) for interval in effects[:3]]
    margins = [in_unit(*ends, "percent", "fd") for ends in zip(*effects.average_90[1:], strict=True)]
    within = [low >= -MARGIN_PERCENT and high <= MARGIN_PERCENT for low, high in margins]
    return list(map(decide, *words, within))
