"""The power of the paired t-test, and the noise of a comparison."""

import bisect
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import chi2, ncf
from scipy.stats import t as student_t

from convergence.analysis.intervals import TAIL
from convergence.errors import StudyError

POWER = 0.8
MOST_SEEDS = 10_000


def power(effect: float, sd: float, pairs: int) -> float:
    """Chance that the two-sided 5% paired t-test shows an advantage `effect`, when paired differences have this `sd`.

    t squared is F with 1 and pairs - 1 degrees of freedom and noncentrality pairs (effect / sd)^2.

    Args:
        pairs: 2 or more.
    """
    if sd == 0:
        return 1.0
    quantile = student_t.ppf(1 - TAIL, pairs - 1)
    return float(ncf.sf(quantile**2, 1, pairs - 1, pairs * (effect / sd) ** 2))


def detectable(sd: float, pairs: int) -> float:
    """The smallest advantage that so many pairs show with 80% power; infinite for one pair."""
    if pairs < 2:
        return np.inf
    return sd * brentq(lambda ratio: power(ratio, 1, pairs) - POWER, 1e-3, 1e3) if sd else 0.0


def seeds_needed(effect: float, sd: float) -> int:
    """The fewest pairs that show an advantage `effect` with 80% power, at least 2.

    Raises:
        StudyError: that takes more than 10,000.
    """
    counts = range(2, MOST_SEEDS + 1)
    found = bisect.bisect_left(counts, True, key=lambda pairs: power(effect, sd, pairs) >= POWER)
    if found == len(counts):
        raise StudyError(f"An effect of {effect:.2g} takes more than {MOST_SEEDS:,} seeds: name a larger one.")
    return counts[found]


def cautious_sd(sd: float, pairs: int) -> float:
    """The standard deviation that the true one is below with 80% confidence, given that of so many pairs.

    To plan from a pilot by its own sd gives too few seeds more often than not (Browne 1995, On the use of a pilot
    sample for sample size determination, Statistics in Medicine 14).

    Args:
        pairs: 2 or more.
    """
    return sd * float(np.sqrt((pairs - 1) / chi2.ppf(1 - POWER, pairs - 1)))


class Noise(NamedTuple):
    """Standard deviations over seeds of the level averaged over images; NaN for fewer than two pairs."""

    between: float
    """Of the runs of one arm, both arms pooled."""
    paired: float
    """Of the paired differences."""


def noise_floor(table: pd.DataFrame) -> Noise:
    """The noise of one comparison, from its rows of `average` in `speedup_table`."""
    of_seeds = table[(table["quantity"] == "average") & table["seed"].notna() & table["effect"].notna()]
    if len(of_seeds) < 2:
        return Noise(np.nan, np.nan)
    values = of_seeds[["of_baseline", "of_candidate"]].to_numpy(float)
    levels = np.log(values) if (of_seeds["scale"] == "log").all() else values
    return Noise(float(np.sqrt(levels.var(axis=0, ddof=1).mean())), float(of_seeds["effect"].std(ddof=1)))
