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
MOST_PLACED = 12  # censored pairs, of which every placement is tried: 2^12


class Interval(NamedTuple):
    """An estimate between its bounds; a bound that is not known is infinite, an estimate NaN."""

    estimate: Any
    low: Any
    high: Any


# --- Intervals ----------------------------------------------------------------------------------------------


def t_interval(values: np.ndarray) -> Interval:
    """Mean over the last axis of values [..., S] with its 95% t-interval; one value has no bounds, none no mean."""
    values = np.asarray(values, float)
    size = values.shape[-1]
    if size == 0:
        return Interval(np.nan, -np.inf, np.inf)
    mean = values.mean(axis=-1)
    half = np.full_like(mean, np.inf)
    if size > 1:
        half = student_t.ppf(1 - TAIL, size - 1) * values.std(axis=-1, ddof=1) / np.sqrt(size)
    return Interval(mean, mean - half, mean + half)


def censored_interval(low: np.ndarray, high: np.ndarray) -> Interval:
    """95% interval of the typical value of S values of which only bounds may be known: low <= value <= high, each [S].

    Exact values (low = high) give the t-interval of their mean. Otherwise each bound has an error of 2.5% of its own:

    - A side to which some value is open: the bound of the sign test, which a value may pass by any distance. It is an
      order statistic, and infinite for fewer than six values.
    - The side to which all are closed, while `open` values are open to the other: it rests on the S - open values next
      to it, their mean moved outwards by a multiple of their standard deviation. The multiple is the quantile of
      (mean - mu) / sd of as many outermost values of normal samples of size S, a pivot, as for samples censored at one
      end (Lawless 2003, Statistical models and methods for lifetime data, ch. 5). Open values may lie among them: of
      all places they can have, the worst counts. The bound is concave in each: the ends of its range are enough.
      With fewer than two values left, or more than twelve open ones, this too is the bound of the sign test.

    The estimate is the mean of exact values, otherwise the median where that is known.
    """
    low, high = np.asarray(low, float), np.asarray(high, float)
    if (low == high).all():
        return t_interval(low)
    median = np.median(low) if np.median(low) == np.median(high) else np.nan
    return Interval(median, _lower_bound(low, high), -_lower_bound(-high, -low))


def _lower_bound(low: np.ndarray, high: np.ndarray) -> float:
    size, open_above = len(low), int(np.isposinf(high).sum())
    if np.isneginf(low).any() or size - open_above < 2 or open_above > MOST_PLACED:
        rank = int(binom.ppf(TAIL, size, 0.5)) - 1
        return np.sort(low)[rank] if rank >= 0 else -np.inf
    ends = [(a,) if a == b else (a, b) for a, b in zip(low, high, strict=True)]
    lowest = np.sort(list(itertools.product(*ends)))[:, : size - open_above]
    return (lowest.mean(axis=1) - _pivot_quantile(size, open_above) * lowest.std(axis=1, ddof=1)).min()


@cache
def _pivot_quantile(size: int, without: int) -> float:
    """Quantile 1 - TAIL of mean / sd of all but the largest `without` values of normal samples of a size, simulated."""
    values = np.sort(np.random.default_rng(0).standard_normal((PIVOT_DRAWS, size)))[:, : size - without]
    return float(np.quantile(values.mean(axis=1) / values.std(axis=1, ddof=1), 1 - TAIL))
