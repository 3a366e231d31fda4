"""Curves of a metric over training images: levels, means, and the time to reach a threshold.

A level is a value of a metric on a scale where lower is better (`to_level`). K is the number of checkpoints.
"""

from typing import TypeVar

import numpy as np
from scipy.optimize import isotonic_regression

from convergence.tables import HIGHER_IS_BETTER

Values = TypeVar("Values", float, np.ndarray)


def isotonic_fit(level: np.ndarray) -> np.ndarray:
    """Returns the least-squares fit that never increases, for each curve along the last axis of [..., K].

    Isotonic regression (Barlow et al. 1972, Statistical inference under order restrictions) replaces neighbouring
    values that break the order with their mean. A curve that never increases is returned unchanged. Without the fit, a
    noisy curve may cross a threshold several times, and the last crossing would count. That crossing is too late, and
    this error is larger if the checkpoints are closer together.

    Args:
        level: levels [..., K]; lower is better. NaN is allowed at the end of a curve and stays NaN.
    """
    return np.apply_along_axis(_fit_one, -1, np.asarray(level, float))


def _fit_one(level: np.ndarray) -> np.ndarray:
    known = ~np.isnan(level)
    fit = level.copy()
    if known.any():
        fit[known] = isotonic_regression(level[known], increasing=False).x
    return fit


def time_to_threshold(
    level: np.ndarray, axis: np.ndarray, threshold: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bounds (low, high), each [...], of the time at which each curve reaches a threshold.

    Each curve is first replaced by its isotonic fit, which never increases. There are three cases:

    - The fit crosses the threshold between two checkpoints: both bounds are the interpolated time. Between trained
      checkpoints, the level is linear in the log of the axis, as for a power law. Between the untrained net and the
      first trained checkpoint, the level is linear in the axis. (Linear interpolation throughout made the ratios of
      power laws with ten checkpoints up to 4% too small.)
    - The fit ends above the threshold, so the threshold is not reached: (end of the axis, inf).
    - The fit starts at or below the threshold, so the threshold is reached before the first trained checkpoint:
      (0, first trained checkpoint).

    Args:
        level: levels [..., K]; lower is better. NaN marks a failed run, which never reaches a threshold.
        axis: [..., K] training images or seconds of the checkpoints, increasing.
        threshold: one level for all curves, or one level per curve, which broadcasts with [...].
    """
    level, axis = np.broadcast_arrays(isotonic_fit(level), axis)
    last = level.shape[-1] - 1
    above = ~(level <= np.asarray(threshold)[..., None])
    never, always = above[..., -1], ~above.any(axis=-1)
    left = np.clip(last - np.argmax(above[..., ::-1], axis=-1), 0, max(last - 1, 0))  # the last point above
    right = np.minimum(left + 1, last)
    level_left, level_right, axis_left, axis_right = (
        np.take_along_axis(values, index[..., None], -1)[..., 0] for values in (level, axis) for index in (left, right)
    )
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = (level_left - threshold) / (level_left - level_right)
        crossing = np.where(axis_left > 0, axis_left * (axis_right / axis_left) ** share, share * axis_right)
    first_trained = np.where(axis[..., 0] > 0, axis[..., 0], axis[..., min(1, last)])
    low = np.where(never, axis[..., -1], np.where(always, 0, crossing))
    high = np.where(never, np.inf, np.where(always, first_trained, crossing))
    return low, high


def log_factor(
    baseline: tuple[np.ndarray, np.ndarray], candidate: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bounds (low, high), each [...], of log(candidate's time / baseline's time); above 0 is slower.

    Args:
        baseline: bounds (low, high) of the times of the baseline, each [...].
        candidate: bounds (low, high) of the times of the candidate, each [...].
    """
    with np.errstate(divide="ignore"):
        base_low, base_high, cand_low, cand_high = np.log([*baseline, *candidate])
    return cand_low - base_high, cand_high - base_low


def mean_over_images(level: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns the mean [...] of curves [..., K] over training images [K] by the trapezoidal rule.

    The weight of a checkpoint is the range of training images around it. So a part of the curve with closely spaced
    checkpoints does not count more.
    """
    if len(images) == 1:
        return level[..., 0]
    return np.trapezoid(level, images, axis=-1) / (images[-1] - images[0])


def to_level(values: Values, metric: str, scale: str) -> Values:
    """Converts values of a metric to levels, for which lower is better.

    If `scale` is "ratio", the level is the log of the value. If `scale` is "difference", the level is the value, with a
    minus sign for metrics where higher is better.
    """
    if scale == "ratio":
        return np.log(values)
    return -values if metric in HIGHER_IS_BETTER else values


def from_level(levels: np.ndarray, metric: str, scale: str) -> np.ndarray:
    """Converts levels [...] back to values of the metric, as the inverse of `to_level`."""
    return np.exp(levels) if scale == "ratio" else to_level(levels, metric, scale)
