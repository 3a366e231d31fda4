"""Confidence intervals of paired differences over seeds."""

import itertools
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
    """An estimate and its bounds; an unknown bound is infinite, an unknown estimate is NaN."""

    estimate: Any
    low: Any
    high: Any


def t_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Returns the mean over the last axis of values [..., S] and its t-interval.

    One value has infinite bounds; no value has the estimate NaN.
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


def t_test(values: np.ndarray) -> float:
    """Returns the two-sided p-value of the t-test that values [S] have the mean 0; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        t = values.mean() / (values.std(ddof=1) / np.sqrt(len(values)))
    return 1.0 if np.isnan(t) else float(2 * student_t.sf(abs(t), len(values) - 1))


def censored_interval(low: np.ndarray, high: np.ndarray) -> Interval:
    """Returns a 95% interval of the centre of S values that are known only up to bounds: low <= value <= high.

    If all values are exact (low = high), this is the t-interval of their mean. Otherwise each end has an error
    probability of 2.5%:

    - If some value is unbounded on one side, that end comes from the sign test. It is an order statistic, and infinite
      below six values.
    - The other end, if `k` values are unbounded on the opposite side, uses the S - k outermost values on its own side:
      their mean minus (or plus) a multiple of their standard deviation. The multiple is a quantile of the pivot
      (mean - mu) / sd of as many outermost values of normal samples of size S (Lawless 2003, Statistical models and
      methods for lifetime data, ch. 5: samples censored at one end). Censored values may be among them: the end is the
      worst over all values that they can have. It is concave in each of them, so only the ends of their ranges are
      tried. With fewer than two values left, or more than twelve censored ones, this end comes from the sign test too.

    The estimate is the mean of exact values, otherwise the median if it is known.

    Coverage in simulations: benchmarks/README.md.

    Args:
        low: lower bounds [S]; -inf if unbounded.
        high: upper bounds [S]; inf if unbounded.
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
    """Returns the simulated quantile 1 - TAIL of mean / sd of standard normal samples without their largest values."""
    values = np.sort(np.random.default_rng(0).standard_normal((PIVOT_DRAWS, size)))[:, : size - dropped]
    return float(np.quantile(values.mean(axis=1) / values.std(axis=1, ddof=1), 1 - TAIL))
