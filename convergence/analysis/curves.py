"""Curves of a metric over training images: levels, averages, and the time to reach a threshold."""

from typing import TypeVar

import numpy as np
from scipy.optimize import isotonic_regression

from convergence.tables import HIGHER_IS_BETTER

Values = TypeVar("Values", float, np.ndarray)


# --- Curves -------------------------------------------------------------------------------------------------


def isotonic_fit(level: np.ndarray) -> np.ndarray:
    """The nearest curves that never rise: least-squares isotonic fits of [..., K] over the last axis.

    Neighbours that rise are pooled to their mean (Barlow et al. 1972, Statistical inference under order restrictions),
    so noise does not decide when a curve comes to a level for good: unsmoothed, the last of many noisy visits is late,
    by more where checkpoints lie close. A curve that falls as it is stays as it is. NaN, which only follows values,
    stays.
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
    """Where the falling fit of a curve comes to a threshold, as bounds (low, high), equal where the crossing is seen.

    Being there means staying there. Between trained checkpoints the level is linear in the log of the axis, as it is
    on a power law, and from the untrained net to the first one linear in the axis. (Linear in images throughout, on
    power laws with ten checkpoints, speed-ups came out up to 4% too small.) A curve whose fit ends above the threshold
    has not reached it, whatever came before: (end of the axis, inf). One that is never above got there before its
    first trained checkpoint: (0, that).

    Args:
        level: [..., K], lower is better; NaN after a divergence, which never is at a threshold.
        axis: [..., K] training images or seconds, growing.
        threshold: a level, or one per curve: broadcast with [...].
    """
    level, axis = np.broadcast_arrays(isotonic_fit(level), axis)
    last = level.shape[-1] - 1
    above = ~(level <= np.asarray(threshold)[..., None])
    never, always = above[..., -1], ~above.any(axis=-1)
    left = np.clip(last - np.argmax(above[..., ::-1], axis=-1), 0, max(last - 1, 0))  # the last point above
    right = np.minimum(left + 1, last)
    level_left, level_right, left, right = (
        np.take_along_axis(of, index[..., None], -1)[..., 0] for of in (level, axis) for index in (left, right)
    )
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = (level_left - threshold) / (level_left - level_right)
        crossing = np.where(left > 0, left * (right / left) ** share, share * right)
    first_trained = np.where(axis[..., 0] > 0, axis[..., 0], axis[..., min(1, last)])
    low = np.where(never, axis[..., -1], np.where(always, 0, crossing))
    high = np.where(never, np.inf, np.where(always, first_trained, crossing))
    return low, high


def log_speedup(
    baseline: tuple[np.ndarray, np.ndarray], candidate: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (low, high) of log(time of the baseline / time of the candidate), of bounds of both times."""
    with np.errstate(divide="ignore"):
        base_low, base_high, cand_low, cand_high = np.log([*baseline, *candidate])
    return base_low - cand_high, base_high - cand_low


def average(level: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Mean of curves [..., K] over images [K], by trapezoids: dense checkpoints count no more than sparse ones."""
    if len(images) == 1:
        return level[..., 0]
    return np.trapezoid(level, images, axis=-1) / (images[-1] - images[0])


# --- Comparisons --------------------------------------------------------------------------------------------


def to_level(values: Values, metric: str, scale: str) -> Values:
    """Values of a metric as levels, lower is better. `scale` is "log" or "plain"."""
    if scale == "log":
        return np.log(values)
    return -values if metric in HIGHER_IS_BETTER else values


def from_level(levels: np.ndarray, metric: str, scale: str) -> np.ndarray:
    """Levels as values of the metric again."""
    return np.exp(levels) if scale == "log" else to_level(levels, metric, scale)
