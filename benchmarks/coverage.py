"""Coverage of the intervals of `convergence.analysis`, and its rate of false alarms, in simulated studies.

    python -m benchmarks.coverage [--studies 2000]

The first table shows the coverage of the 95% interval of the speed-up, over all studies and over those without a
censored pair; how often a pair is censored; how often the interval lacks one bound or both; its median width in log
speed-up; and the median distance of finite bounds from the true value. The second table shows how often a study
without a difference is reported as faster or slower. Each cell contains the values for 3, 5 and 10 seeds.
"""

import argparse
import itertools
import sys
from typing import NamedTuple

import numpy as np

from convergence.analysis.curves import log_speedup, mean_over_images, time_to_threshold
from convergence.analysis.effects import NO_DIFFERENCE, decide
from convergence.analysis.intervals import censored_interval, t_interval

SEEDS = (3, 5, 10)
MIN_FRACTION = 0.1  # coverage over fewer of the studies is not shown
# The FD is 54 at the first checkpoint and falls with this power of the training images, as the published FFHQ curves.
FIRST_LEVEL, POWER_LAW = np.log(54), 0.35


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


# Residuals of power laws fitted to published FID curves with one run per arm: the standard deviations are 0.15 and
# 0.28 on FFHQ, and 0.13 and 0.14 on Flowers; the correlation of the arms is 0.2, that of consecutive checkpoints -0.5
# to 0.5.
NOISES = {
    "2%, paired": Noise(0.02, 0.5, 0.8),
    "5%, paired": Noise(0.05, 0.5, 0.5),
    "14%, as published (Flowers)": Noise(0.14, 0.0, 0.2),
    "28%, as published (FFHQ)": Noise(0.28, 0.5, 0.2),
    "28%, heavy tails": Noise(0.28, 0.5, 0.2, 3.0),
}


def simulate(
    rng: np.random.Generator, studies: int, seeds: int, speedup: float, noise: Noise, checkpoints: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate the curves of studies; the candidate reaches each value `speedup` times as early, with AR(1) noise.

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
    curves = FIRST_LEVEL - POWER_LAW * (np.log(images) + np.log([[1], [speedup]]))
    return curves + errors, images


def speedups(levels: np.ndarray, images: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the log speed-ups, each [studies, seeds], at a threshold at `share` of the baseline's decrease."""
    ends = levels[:, :, 0][..., [0, -1]].mean(axis=1)  # [studies, 2]
    threshold = ends[:, 0] + share * (ends[:, 1] - ends[:, 0])
    low, high = time_to_threshold(levels, images, threshold[:, None, None])
    return log_speedup((low[..., 0], high[..., 0]), (low[..., 1], high[..., 1]))


class Coverage(NamedTuple):
    covered: np.ndarray
    """Whether the interval contains the true speed-up, [studies]."""
    censored: np.ndarray
    """Whether a pair is censored, [studies]."""
    reach: np.ndarray
    """Distance of the lower and the upper bound from the true value, in log speed-up, [studies, 2]."""


def coverage(
    rng: np.random.Generator, studies: int, seeds: int, speedup: float, noise: Noise, share: float
) -> Coverage:
    low, high = speedups(*simulate(rng, studies, seeds, speedup, noise), share)
    _, lower, upper = np.array([censored_interval(*bounds) for bounds in zip(low, high, strict=True)]).T
    reach = np.column_stack([np.log(speedup) - lower, upper - np.log(speedup)])
    return Coverage((reach >= 0).all(axis=1), (low < high).any(axis=1), reach)


def false_alarms(rng: np.random.Generator, studies: int, seeds: int, noise: Noise) -> float:
    """Fraction of the studies without a difference whose outcome is "faster" or "slower"."""
    levels, images = simulate(rng, studies, seeds, 1.0, noise)
    of_seeds = mean_over_images(levels, images)
    _, low, high = t_interval(of_seeds[..., 0] - of_seeds[..., 1])
    return np.mean([decide(*bounds) != NO_DIFFERENCE for bounds in zip(low, high, strict=True)])


def _cells(result: Coverage) -> list[str]:
    bounds = np.isfinite(result.reach).sum(axis=1)
    uncensored = result.covered[~result.censored]
    percentages = [100 * column.mean() for column in (result.covered, result.censored, bounds == 1, bounds == 0)]
    percentages.insert(1, 100 * uncensored.mean() if len(uncensored) >= MIN_FRACTION * len(bounds) else np.nan)
    finite = result.reach[np.isfinite(result.reach)]
    lengths = [np.median(result.reach.sum(axis=1)), np.median(np.abs(finite)) if finite.size else np.nan]
    return ["–" if np.isnan(value) else f"{value:.1f}" for value in percentages] + [f"{value:.2f}" for value in lengths]


def _row(*cells: object) -> None:
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per cell")
    studies = parser.parse_args().studies
    rng = np.random.default_rng(0)
    columns = [
        "coverage, %",
        "uncensored, %",
        "censored, %",
        "one bound, %",
        "no bound, %",
        "median width",
        "median reach",
    ]
    _row("noise", "threshold", "speed-up", *columns)
    _row(*["---"] * (3 + len(columns)))
    for (name, noise), share, speedup in itertools.product(list(NOISES.items())[:4], (0.5, 0.9, 1.0), (1.0, 1.25, 2.0)):
        cells = [_cells(coverage(rng, studies, seeds, speedup, noise, share)) for seeds in SEEDS]
        _row(name, share, speedup, *(" / ".join(column) for column in zip(*cells, strict=True)))
    sys.stdout.write("\n")
    _row("noise", "false alarms, %")
    _row("---", "---")
    for name, noise in NOISES.items():
        _row(name, " / ".join(f"{100 * false_alarms(rng, studies, seeds, noise):.1f}" for seeds in SEEDS))


if __name__ == "__main__":
    main()
