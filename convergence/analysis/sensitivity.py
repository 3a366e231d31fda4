"""The primary comparison repeated with other endpoints and metrics: does the conclusion depend on their choice?"""

from collections.abc import Iterable

import numpy as np

from convergence.analysis.comparison import THRESHOLD_SHARES, progress_thresholds, time_effect
from convergence.analysis.curves import mean_over_images
from convergence.analysis.effects import Unit, interval_in_unit, shown
from convergence.analysis.intervals import t_interval
from convergence.analysis.pairs import Pairs
from convergence.analysis.results import Sensitivity


def sensitivity(metrics: Iterable[Pairs]) -> tuple[Sensitivity, ...]:
    """Returns the effects of the primary comparison's candidate by each endpoint, metric and feature extractor.

    The endpoints are three averages (over training images, over the log of training images, and over the last half of
    the training images), the level at the last checkpoint, and the training images until 25, 50 and 75% of the
    baseline's progress in level.

    Args:
        metrics: runs of the baseline and this candidate, in each metric.
    """
    rows: list[Sensitivity] = []
    for pairs in metrics:
        rows += [_row(endpoint, pairs, levels) for endpoint, levels in endpoints(pairs).items()]
        for share, threshold in zip(THRESHOLD_SHARES, progress_thresholds(pairs), strict=False):
            effect = time_effect(pairs, threshold)
            name = f"images to {share:.0%} of the progress"
            interval = (effect.estimate, effect.low, effect.high)
            rows.append(Sensitivity(name, pairs.features, pairs.metric, effect.unit, *interval, effect.shown))
    return tuple(rows)


def endpoints(pairs: Pairs) -> dict[str, np.ndarray]:
    """Returns the levels of each endpoint: endpoint -> [S, 2] of baseline and candidate, NaN for failed runs."""
    images, levels = pairs.images, pairs.levels
    half = np.unique(np.concatenate([[images[-1] / 2], images[images > images[-1] / 2]]))
    half = half[half >= images[0]]
    last_half = np.apply_along_axis(lambda level: np.interp(half, images, level), -1, levels)
    return {
        "average over images": pairs.means,
        "average over log images": mean_over_images(levels, np.log(images)),
        "average over the last half": mean_over_images(last_half, half),
        "last checkpoint": levels[..., -1],
    }


def _row(endpoint: str, pairs: Pairs, levels: np.ndarray) -> Sensitivity:
    unit: Unit = "percent" if pairs.scale == "ratio" else "difference"
    difference = levels[:, 1] - levels[:, 0]
    interval = t_interval(difference[~np.isnan(difference)])
    result = shown(float(interval.low), float(interval.high), *map(int, pairs.failed.sum(axis=0)))
    printed = interval_in_unit(interval, unit, pairs.metric)
    return Sensitivity(endpoint, pairs.features, pairs.metric, unit, *printed, result)
