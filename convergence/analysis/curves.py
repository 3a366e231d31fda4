"""Curves of a metric over training images: levels, means, and the time to reach a threshold."""

from typing import TypeVar

import numpy as np
from scipy.optimize import isotonic_regression

from convergence.tables import HIGHER_IS_BETTER

Values = TypeVar("Values", float, np.ndarray)


def isotonic_fit(level: np.ndarray) -> np.ndarray:
    """Returns the least-squares fit of curves that never increase, along the last axis of [..., K].

    Isotonic regression (Barlow et al. 1972, Statistical inference under order restrictions) replaces neighbours that
    increase by their mean. Without it, the last of several noisy crossings of a threshold would decide, which is late,
    and later the closer the checkpoints are. A curve that never increases is returned unchanged.

    Args:
        level: levels, lower is better. NaN is allowed at the end of a curve and stays NaN.
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
    """Returns bounds (low, high) of the time at which the isotonic fit of each curve reaches a threshold.

    The bounds are equal if the crossing is between two checkpoints. Between trained checkpoints the level is linear in
    the log of the axis, as for a power law; between the untrained net and the first trained checkpoint it is linear in
    the axis. (Linear interpolation throughout made the ratios of power laws with ten checkpoints up to 4% too small.)

    - A curve whose fit ends above the threshold has not reached it: (end of the axis, inf).
    - A curve whose fit starts at or below the threshold reached it before its first trained checkpoint:
      (0, first trained checkpoint).

    Args:
        level: [..., K], lower is better; NaN where a run failed, which never reaches a threshold.
        axis: [..., K] training images or seconds, increasing.
        threshold: one level, or one level per curve that broadcasts with [...].
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
    """Returns bounds (low, high) of log(time of the candidate / time of the baseline); above 0 is slower.

    Args:
        baseline: bounds (low, high) of its times, each [...].
        candidate: the same for the candidate.
    """
    with np.errstate(divide="ignore"):
        base_low, base_high, cand_low, cand_high = np.log([*baseline, *candidate])
    return cand_low - base_high, cand_high - base_low


def mean_over_images(level: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns the mean of curves [..., K] over training images [K] by the trapezoidal rule.

    Each checkpoint is weighted by the images around it, so closely spaced checkpoints do not count more.
    """
    if len(images) == 1:
        return level[..., 0]
    return np.trapezoid(level, images, axis=-1) / (images[-1] - images[0])


def to_level(values: Values, metric: str, scale: str) -> Values:
    """Converts values of a metric to levels, for which lower is better. `scale` is "ratio" or "difference"."""
    if scale == "ratio":
        return np.log(values)
    return -values if metric in HIGHER_IS_BETTER else values


def from_level(levels: np.ndarray, metric: str, scale: str) -> np.ndarray:
    """Converts levels [...] back to values of the metric."""
    return np.exp(levels) if scale == "ratio" else to_level(levels, metric, scale)
