"""Confidence intervals of paired differences over seeds."""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom
from scipy.stats import t as student_t

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
PIVOT_DRAWS = 100_000
MAX_CENSORED = 12  # all 2^12 combinations of the ends of censored values are tried


class Interval(NamedTuple):
    """An estimate and its bounds. An unknown estimate is NaN, and an unknown bound is infinite."""

    estimate: Any
    low: Any
    high: Any


def t_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Returns the mean over the last axis of values [..., S] and the t-interval of this mean.

    The bounds are infinite if S is 1. The estimate is NaN if S is 0.
    """
    values = np.asarray(values, float)
    size = values.shape[-1]
    if size == 0:
        return Interval(np.nan, -np.inf, np.inf)
    mean = values.mean(axis=-1)
    half = np.full_like(mean, np.inf)
    if size > 1:
        half = student_t.ppf((1 + confidence) / 2, size - 1) * values.std(axis=-1, ddof=1) / np.sqrt(size)
    return Interval(mean, mean - half, mean + half)


def sum_interval(intervals: Sequence[Interval]) -> Interval:
    """Returns an interval of the sum of independent quantities, from an interval of each (MOVER).

    The distance of a bound from the estimate is the root of the sum of the squared distances of the parts (Zou and
    Donner 2008, Construction of confidence limits about effect measures). If an estimate is NaN, the bounds are added,
    which gives a wider interval.
    """
    estimates, lows, highs = np.array(intervals, float).T
    estimate = estimates.sum()
    if np.isnan(estimate):
        return Interval(estimate, lows.sum(), highs.sum())
    below, above = (np.sqrt((distances**2).sum()) for distances in (estimates - lows, highs - estimates))
    return Interval(estimate, estimate - below, estimate + above)


def t_test(values: np.ndarray) -> float:
    """Returns the two-sided p-value of the t-test that the mean of values [S] is 0; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        t = values.mean() / (values.std(ddof=1) / np.sqrt(len(values)))
    return 1.0 if np.isnan(t) else float(2 * student_t.sf(abs(t), len(values) - 1))


def censored_interval(low: np.ndarray, high: np.ndarray) -> Interval:
    """Returns a 95% interval of the centre of S values that are known only up to bounds: low <= value <= high.

    If all values are exact (low = high), the result is the t-interval of their mean. Otherwise each end of the interval
    has an error probability of 2.5%. The lower end is computed as follows; the upper end mirrors it.

    - If some value has no lower bound, the lower end comes from the sign test: it is one of the sorted lower bounds. It
      is infinite for fewer than six values.
    - Otherwise let k be the number of values without an upper bound. The lower end is the mean of the S - k lowest
      values, minus a multiple of their standard deviation. The multiple is a quantile of (mean - mu) / sd, where mean
      and sd are those of the S - k lowest of S normal values (Lawless 2003, Statistical models and methods for lifetime
      data, ch. 5: samples censored at one end). Values that are not exact may be among the lowest. The lower end is
      then the smallest result over all values within the bounds. The result is concave in each value, so only the
      bounds themselves are tried.
    - If S - k is below two, or k is above twelve, the lower end comes from the sign test, too.

    The estimate is the mean if all values are exact. Otherwise it is the median, or NaN if the bounds do not determine
    it.

    Coverage in simulations: benchmarks/README.md.

    Args:
        low: lower bounds [S]; -inf for a value without a lower bound.
        high: upper bounds [S]; inf for a value without an upper bound.
    """
    low, high = np.asarray(low, float), np.asarray(high, float)
    if (low == high).all():
        return t_interval(low)
    median = np.median(low) if np.median(low) == np.median(high) else np.nan
    return Interval(median, _lower_bound(low, high), -_lower_bound(-high, -low))


def _lower_bound(low: np.ndarray, high: np.ndarray) -> float:
    size, unbounded_above = len(low), int(np.isposinf(high).sum())
    if np.isneginf(low).any() or size - unbounded_above < 2 or unbounded_above > MAX_CENSORED:
        rank = int(binom.ppf(TAIL, size, 0.5)) - 1
        return np.sort(low)[rank] if rank >= 0 else -np.inf
    ends = [(a,) if a == b else (a, b) for a, b in zip(low, high, strict=True)]
    lowest = np.sort(list(itertools.product(*ends)))[:, : size - unbounded_above]
    return (lowest.mean(axis=1) - _pivot_quantile(size, unbounded_above) * lowest.std(axis=1, ddof=1)).min()


@cache
def _pivot_quantile(size: int, dropped: int) -> float:
    """Returns the simulated quantile 1 - TAIL of mean / sd of the lowest `size - dropped` of `size` normal values."""
    values = np.sort(np.random.default_rng(0).standard_normal((PIVOT_DRAWS, size)))[:, : size - dropped]
    return float(np.quantile(values.mean(axis=1) / values.std(axis=1, ddof=1), 1 - TAIL))
