"""The effect of a candidate on one quantity, as data in the units that reports print.

Statistics are computed on *differences in level*: candidate minus baseline, above 0 is worse. A level is the log of a
distance, or of training images; for other metrics it is the metric, with a minus sign if more is better. An `Effect`
has the same numbers in printed units.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from convergence.analysis.intervals import Interval
from convergence.tables import HIGHER_IS_BETTER

Quantity = Literal["average", "final", "images", "hours"]
Scale = Literal["ratio", "difference"]
Unit = Literal["percent", "factor", "difference"]
Shown = Literal["better", "worse", "not shown"]
# JSON has no infinity and no NaN: they are written as the strings "Infinity", "-Infinity" and "NaN".
JSON_CONFIG = ConfigDict(ser_json_inf_nan="strings", extra="forbid")


@dataclass(frozen=True)
class Effect:
    """The effect of a candidate on one quantity, over all seeds or of one seed.

    `estimate`, `low` and `high` have the unit `percent` (change of the metric, above 0 is worse), `factor` (images or
    hours of the candidate divided by those of the baseline, above 1 is slower) or `difference` (change of the metric
    itself). An unknown estimate is NaN; an unknown bound is infinite, or 0 for the lower bound of a factor.
    """

    __pydantic_config__ = JSON_CONFIG

    quantity: Quantity
    """`average`: the metric averaged over training images. `final`: the metric at the last common checkpoint.
    `images`: training images until the metric reaches `threshold`. `hours`: the same, multiplied by the arm's cost."""
    threshold: float
    """A value of the metric; NaN for `average` and `final`."""
    unit: Unit
    baseline: float
    """The metric, or the training images or hours. Images are infinite if the run never reaches the threshold, and NaN
    if it reached it before its first trained checkpoint."""
    candidate: float
    estimate: float
    low: float
    """Over all seeds: the ends of the 95% interval. Of one seed: the bounds of a censored pair."""
    high: float
    shown: Shown
    """Whether the interval excludes no effect. The arm with more failed runs is never better."""
    p_value: float
    """Of the paired t-test; NaN if it is unknown. For images and hours it is always NaN."""
    pairs: int
    """Pairs of runs that the effect uses."""
    censored: int
    """Pairs of which only bounds are known."""
    failed_baseline: int
    """Runs of the baseline that diverged or collapsed."""
    failed_candidate: int
    seed: int | None = None
    """None: over all seeds."""
    per_seed: tuple["Effect", ...] = ()
    """The effect of each seed, in the order of the comparison's seeds."""


def shown(low: float, high: float, failed_baseline: int = 0, failed_candidate: int = 0) -> Shown:
    """Returns what the interval (low, high) of a difference in level shows about the candidate.

    The arm with more failed runs cannot be better.
    """
    if high < 0 and failed_candidate <= failed_baseline:
        return "better"
    if low > 0 and failed_baseline <= failed_candidate:
        return "worse"
    return "not shown"


def in_unit(low: float, high: float, unit: Unit, metric: str) -> tuple[float, float]:
    """Returns an interval (low, high) of a difference in level as the interval of the change in a printed unit."""
    with np.errstate(over="ignore"):
        if unit == "percent":
            # A bound of -100% would look known.
            return -np.inf if np.isneginf(low) else float(100 * np.expm1(low)), float(100 * np.expm1(high))
        if unit == "factor":
            return float(np.exp(low)), float(np.exp(high))
    return (-high, -low) if metric in HIGHER_IS_BETTER else (low, high)


def interval_in_unit(interval: Interval, unit: Unit, metric: str) -> Interval:
    """Returns the interval of a difference in level as that of the change in a printed unit."""
    estimate, low, high = map(float, interval)
    return Interval(in_unit(estimate, estimate, unit, metric)[0], *in_unit(low, high, unit, metric))
