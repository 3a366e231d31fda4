"""The effect of a candidate on one quantity: its data, its sign, and the decision that it supports.

Every effect is an *advantage*: positive if the candidate is better than the baseline. For times and for metrics on the
scale "log" it is a natural logarithm of a ratio; on the scale "plain" it is a difference of the metric.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from convergence.tables import HIGHER_IS_BETTER

Quantity = Literal["average", "final", "images", "seconds"]
Scale = Literal["log", "plain"]
Outcome = Literal["faster", "slower", "no difference shown"]
NO_DIFFERENCE: Outcome = "no difference shown"
# JSON has no infinity and no NaN: they are written as the strings "Infinity", "-Infinity" and "NaN".
JSON_CONFIG = ConfigDict(ser_json_inf_nan="strings", extra="forbid")


@dataclass(frozen=True)
class Effect:
    """The advantage of a candidate in one quantity, over all seeds or of one seed.

    An unknown number is NaN; an unknown bound is infinite.
    """

    __pydantic_config__ = JSON_CONFIG

    quantity: Quantity
    """`average`: the metric averaged over training images. `final`: the metric at the last common checkpoint.
    `images`, `seconds`: the time until the metric reaches `threshold`."""
    threshold: float
    """A value of the metric; NaN for `average` and `final`."""
    baseline: float
    """The metric, or the time in training images or seconds. A time is infinite if the run never reaches the threshold,
    and NaN if it reached it before its first trained checkpoint."""
    candidate: float
    estimate: float
    low: float
    """Over all seeds: the ends of the 95% interval. Of one seed: the bounds of a censored pair."""
    high: float
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


def decide(low: float, high: float, failed_baseline: int = 0, failed_candidate: int = 0) -> Outcome:
    """Returns the outcome of a comparison from the 95% interval of its average advantage.

    The outcome never favours the arm with more failed runs.
    """
    if low > 0 and failed_candidate <= failed_baseline:
        return "faster"
    if high < 0 and failed_baseline <= failed_candidate:
        return "slower"
    return NO_DIFFERENCE


def to_change(advantage: float, metric: str, scale: Scale) -> float:
    """Returns the change of the metric that an advantage corresponds to, candidate against baseline.

    It is relative on the scale "log" (-0.1: 10% lower) and a difference on the scale "plain".
    """
    if scale == "log":
        return float(np.expm1(-advantage))
    return advantage if metric in HIGHER_IS_BETTER else -advantage


def falls_with_advantage(metric: str, scale: Scale) -> bool:
    """Returns whether a larger advantage is a smaller metric; its low end is then the high end of the change."""
    return scale == "log" or metric not in HIGHER_IS_BETTER
