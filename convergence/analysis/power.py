"""The power of the paired t-test, and the noise of a comparison."""

import bisect

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, ncf
from scipy.stats import t as student_t

from convergence.analysis.intervals import TAIL
from convergence.analysis.results import Noise
from convergence.errors import StudyError

POWER = 0.8
MAX_SEEDS = 10_000


def power(effect: float, sd: float, pairs: int) -> float:
    """Returns the probability that a two-sided paired t-test at the 5% level detects a difference.

    The square of t has a noncentral F distribution with 1 and pairs - 1 degrees of freedom and the noncentrality
    pairs * (effect / sd)^2.

    Args:
        effect: true mean of the paired differences.
        sd: standard deviation of the paired differences.
        pairs: number of pairs, 2 or more.
    """
    if sd == 0:
        return 1.0
    quantile = student_t.ppf(1 - TAIL, pairs - 1)
    return float(ncf.sf(quantile**2, 1, pairs - 1, pairs * (effect / sd) ** 2))


def detectable(sd: float, pairs: int) -> float:
    """Returns the smallest difference that a paired t-test detects with 80% power; infinite for one pair."""
    if pairs < 2:
        return np.inf
    return sd * brentq(lambda ratio: power(ratio, 1, pairs) - POWER, 1e-3, 1e3)


def seeds_needed(effect: float, sd: float) -> int:
    """Returns the smallest number of pairs (one per seed), at least 2, that detects a difference with 80% power.

    Raises:
        StudyError: more than 10,000 pairs are needed.
    """
    counts = range(2, MAX_SEEDS + 1)
    index = bisect.bisect_left(counts, True, key=lambda pairs: power(effect, sd, pairs) >= POWER)
    if index == len(counts):
        raise StudyError(f"An effect of {effect:.2g} needs more than {MAX_SEEDS:,} seeds: choose a larger effect.")
    return counts[index]


def cautious_sd(sd: float, pairs: int) -> float:
    """Returns the 80% upper confidence bound of a standard deviation that was estimated from a number of pairs.

    A plan that uses the estimated standard deviation of a pilot gives too few seeds more often than not (Browne 1995,
    On the use of a pilot sample for sample size determination, Statistics in Medicine 14).

    Args:
        sd: estimated standard deviation.
        pairs: number of pairs of the estimate, 2 or more.
    """
    return sd * float(np.sqrt((pairs - 1) / chi2.ppf(1 - POWER, pairs - 1)))


def noise_over_seeds(levels: np.ndarray) -> Noise:
    """Returns the standard deviations over S seeds of levels [S, 2] of baseline and candidate.

    The levels are averages over training images. Seeds with a NaN are left out.
    """
    known = levels[~np.isnan(levels).any(axis=1)]
    if len(known) < 2:
        return Noise((np.nan, np.nan), np.nan, np.nan)
    baseline, candidate = map(float, known.std(axis=0, ddof=1))
    return Noise((baseline, candidate), float((known[:, 1] - known[:, 0]).std(ddof=1)), np.nan)
