"""Coverage of the intervals of `convergence.analysis`, and how often the decision table gives each outcome.

    python -m benchmarks.coverage [--studies 2000]

All values are percentages of the simulated studies, except for the last two columns of the first table; each cell
contains those for 2, 3, 5 and 10 seeds.

1. The 95% interval of the factor of images at a fixed threshold: its coverage, over all studies and over those without
   a censored pair; how often a pair is censored; how often the interval lacks one bound or both; its median width and
   the median distance of finite bounds from the true value, as 100 times the log of the factor.
2. Coverage of the level averaged over images (A), of that at the last checkpoint (E) and of the factor of images at the
   primary threshold (S), and how often A is better or worse, in studies without a difference.
3. How often the decision table gives each outcome, without a difference, and with a candidate that is 5% better.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import numpy as np

from benchmarks.simulation import NOISES, POWER_LAW, Noise, effects, factors, intervals, outcomes, simulate
from convergence.analysis.decision import Outcome

SEEDS = (2, 3, 5, 10)
BETTER = 0.95
OUTCOMES = [name for name in get_args(Outcome) if name not in ("identical", "interim")]
MIN_FRACTION = 0.1  # coverage over fewer of the studies is not shown
COLUMNS = ["coverage", "uncensored", "censored", "one bound", "no bound", "median width", "median reach"]


class Coverage(NamedTuple):
    covered: np.ndarray
    """Whether the interval contains the true factor, [studies]."""
    censored: np.ndarray
    """Whether a pair is censored, [studies]."""
    reach: np.ndarray
    """Distance of the lower and the upper bound from the true value, in log factor, [studies, 2]."""


def coverage(rng: np.random.Generator, studies: int, seeds: int, factor: float, noise: Noise, share: float) -> Coverage:
    """Simulate the factor of images at a threshold at `share` of the baseline's decrease."""
    levels, images = simulate(rng, studies, seeds, factor, noise)
    ends = levels[:, :, 0][..., [0, -1]].mean(axis=1)  # [studies, 2]
    low, high = factors(levels, images, ends[:, 0] + share * (ends[:, 1] - ends[:, 0]))
    interval = intervals(low, high)
    reach = np.column_stack([np.log(factor) - interval.low, interval.high - np.log(factor)])
    return Coverage((reach >= 0).all(axis=1), (low < high).any(axis=1), reach)


def of_threshold(result: Coverage) -> list[float]:
    """Compute the cells of the first table."""
    bounds = np.isfinite(result.reach).sum(axis=1)
    known = result.covered[~result.censored]
    uncensored = known.mean() if len(known) >= MIN_FRACTION * len(bounds) else np.nan
    finite = result.reach[np.isfinite(result.reach)]
    lengths = [np.median(result.reach.sum(axis=1)), np.median(np.abs(finite)) if finite.size else np.nan]
    columns = [result.covered.mean(), uncensored, result.censored.mean(), *((bounds == n).mean() for n in (1, 0))]
    return [100 * value for value in (*columns, *lengths)]


def of_effects(rng: np.random.Generator, studies: int, seeds: int, noise: Noise) -> list[float]:
    """Simulate the cells of the second table."""
    found = effects(*simulate(rng, studies, seeds, 1.0, noise))
    columns = [(low <= 0) & (high >= 0) for _, low, high in found[:3]] + [found.average.high < 0, found.average.low > 0]
    return [100 * np.mean(column) for column in columns]


def of_outcomes(rng: np.random.Generator, studies: int, seeds: int, factor: float, noise: Noise) -> list[float]:
    """Simulate the cells of the last tables."""
    count = Counter(outcomes(effects(*simulate(rng, studies, seeds, factor, noise))))
    return [100 * count[name] / studies for name in OUTCOMES]


def _table(head: Sequence[str], lines: Iterable[tuple[Sequence[object], Iterable[Sequence[float]]]]) -> None:
    """Print a table from the names of each line and, for each number of seeds, its cells."""
    for cells in (head, ["---"] * len(head)):
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
    for names, of_seeds in lines:
        columns = zip(*of_seeds, strict=True)
        cells = [" / ".join("–" if np.isnan(value) else f"{value:.1f}" for value in column) for column in columns]
        sys.stdout.write("| " + " | ".join([*map(str, names), *cells]) + " |\n")
    sys.stdout.write("\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per cell")
    studies = parser.parse_args().studies
    rng = np.random.default_rng(0)
    cells = itertools.product(list(NOISES)[:4], (0.5, 0.9, 1.0), (1.0, 0.5))
    _table(
        ["noise", "threshold", "factor", *COLUMNS],
        (
            (cell, [of_threshold(coverage(rng, studies, seeds, cell[2], NOISES[cell[0]], cell[1])) for seeds in SEEDS])
            for cell in cells
        ),
    )
    _table(
        ["noise", "A", "E", "S", "A better", "A worse"],
        (([name], [of_effects(rng, studies, seeds, noise) for seeds in SEEDS]) for name, noise in NOISES.items()),
    )
    for factor in (1.0, BETTER ** (1 / POWER_LAW)):
        _table(
            ["noise", *OUTCOMES],
            (([name], [of_outcomes(rng, studies, seeds, factor, noise) for seeds in SEEDS])
             for name, noise in NOISES.items()),
        )  # fmt: skip


if __name__ == "__main__":
    main()
