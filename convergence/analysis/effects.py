"""The effect of a candidate on one quantity, as data in the units that reports print.

Statistics are computed on *differences in level*: level of the candidate minus level of the baseline, so above 0 is
worse. The level of a distance such as FD, or of a number of training images, is its log. The level of another metric is
the metric itself, with a minus sign if higher is better. An `Effect` contains the same numbers in printed units.
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

    `estimate`, `low` and `high` have one of three units:

    - `percent`: relative change of the metric; above 0 is worse.
    - `factor`: images or hours of the candidate divided by those of the baseline; above 1 is slower.
    - `difference`: change of the metric itself.

    An unknown estimate is NaN. An unknown bound is infinite, or 0 if it is the lower bound of a factor.
    """

    __pydantic_config__ = JSON_CONFIG

    quantity: Quantity
    """`average`: the metric averaged over training images. `final`: the metric at the last common checkpoint. `images`:
    training images until the metric reaches `threshold`. `hours`: these images multiplied by the arm's training time
    per image; the interval contains the noise of both."""
    threshold: float
    """Value of the metric that the runs have to reach; NaN for `average` and `final`."""
    unit: Unit
    baseline: float
    """Value of the baseline: the metric, the training images or the hours; over all seeds, the mean. Of one seed,
    images and hours are infinite if the run never reaches the threshold, and NaN if the run reaches the threshold
    before its first trained checkpoint."""
    candidate: float
    estimate: float
    low: float
    """Over all seeds, `low` and `high` are the ends of the 95% interval. Of one seed, `low` and `high` are bounds of
    the effect, which differ only if the pair is censored."""
    high: float
    shown: Shown
    """What the interval shows: "better" or "worse" if the whole interval is on one side of "no effect", otherwise "not
    shown". The arm with more failed runs is never better."""
    p_value: float
    """p-value of the paired t-test over all seeds; NaN for images and hours, and with fewer than two pairs."""
    pairs: int
    """Number of pairs of runs that the effect uses."""
    censored: int
    """Number of pairs whose effect is known only up to bounds, because a run does not cross the threshold between two
    of its checkpoints."""
    failed_baseline: int
    """Number of runs of the baseline that diverged or collapsed."""
    failed_candidate: int
    seed: int | None = None
    """Seed of the effect; None: the effect is over all seeds."""
    per_seed: tuple["Effect", ...] = ()
    """Effect of each seed, in the order of `Comparison.seeds`; empty in the effect of one seed."""


def shown(low: float, high: float, failed_baseline: int = 0, failed_candidate: int = 0) -> Shown:
    """Returns what the interval (low, high) of a difference in level shows about the candidate.

    The result is "better" if the interval is below 0, "worse" if the interval is above 0, otherwise "not shown". The
    arm with more failed runs is never better; the result is then "not shown".
    """
    if high < 0 and failed_candidate <= failed_baseline:
        return "better"
    if low > 0 and failed_baseline <= failed_candidate:
        return "worse"
    return "not shown"


def in_unit(low: float, high: float, unit: Unit, metric: str) -> tuple[float, float]:
    """Converts an interval (low, high) of a difference in level to the printed unit."""
    with np.errstate(over="ignore"):
        if unit == "percent":
            # A bound of -100% would look known.
            return -np.inf if np.isneginf(low) else float(100 * np.expm1(low)), float(100 * np.expm1(high))
        if unit == "factor":
            return float(np.exp(low)), float(np.exp(high))
    return (-high, -low) if metric in HIGHER_IS_BETTER else (low, high)


def interval_in_unit(interval: Interval, unit: Unit, metric: str) -> Interval:
    """Converts the estimate and the bounds of a difference in level to the printed unit."""
    estimate, low, high = map(float, interval)
    return Interval(in_unit(estimate, estimate, unit, metric)[0], *in_unit(low, high, unit, metric))
