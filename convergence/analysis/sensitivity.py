"""The primary comparison repeated with other endpoints, metrics and averages of the weights: does it depend on them?"""

from collections.abc import Iterable, Mapping

import numpy as np

from convergence.analysis.comparison import THRESHOLD_SHARES, progress_thresholds, time_effect
from convergence.analysis.curves import mean_over_images
from convergence.analysis.effects import Unit, interval_in_unit, shown
from convergence.analysis.intervals import t_interval
from convergence.analysis.pairs import Pairs
from convergence.analysis.results import Comparison, Sensitivity
from convergence.analysis.wording import interval_text

PRIMARY = "average over images"  # the primary endpoint


def sensitivity(metrics: Iterable[Pairs], averages: Mapping[str, Iterable[Pairs]]) -> tuple[Sensitivity, ...]:
    """Returns the effects of the primary comparison's candidate by each endpoint, metric and feature extractor.

    The endpoints are three averages (over training images, over the log of training images, and over the last half of
    the training images), the level at the last checkpoint, and the training images until 25, 50 and 75% of the
    baseline's progress in level. With other averages of the weights, the endpoints are the average over training
    images and the last checkpoint.

    Args:
        metrics: runs of the baseline and this candidate, in each metric.
        averages: the same with other averages of the weights, by their names.
    """
    rows: list[Sensitivity] = []
    for pairs in metrics:
        rows += [_row(endpoint, pairs, levels) for endpoint, levels in endpoints(pairs).items()]
        for share, threshold in zip(THRESHOLD_SHARES, progress_thresholds(pairs), strict=False):
            effect = time_effect(pairs, threshold)
            name = f"images to {share:.0%} of the progress"
            interval = (effect.estimate, effect.low, effect.high)
            rows.append(Sensitivity(name, pairs.features, pairs.metric, effect.unit, *interval, effect.shown))
    for name, metrics_of_average in averages.items():
        for pairs in metrics_of_average:
            levels_of = endpoints(pairs)
            rows += [
                _row(f"{endpoint}, {name}", pairs, levels_of[endpoint]) for endpoint in (PRIMARY, "last checkpoint")
            ]
    return tuple(rows)


def changed_signs(primary: Comparison, rows: Iterable[Sensitivity]) -> list[str]:
    """Returns a sentence that names the averages of the weights with which the primary endpoint changes its sign."""
    prefix = f"{PRIMARY}, "
    changed = [
        f"{interval_text(row.estimate, row.low, row.high, row.unit)} with {row.endpoint.removeprefix(prefix)}"
        for row in rows
        if row.endpoint.startswith(prefix)
        and (row.features, row.metric) == (primary.features, primary.metric)
        and row.estimate * primary.average.estimate < 0
    ]
    return [f"The sign depends on the average of the weights: {'; '.join(changed)}."] if changed else []


def endpoints(pairs: Pairs) -> dict[str, np.ndarray]:
    """Returns the levels of each endpoint: endpoint -> [S, 2] of baseline and candidate, NaN for failed runs."""
    images, levels = pairs.images, pairs.levels
    half = np.unique(np.concatenate([[images[-1] / 2], images[images > images[-1] / 2]]))
    half = half[half >= images[0]]
    last_half = np.apply_along_axis(lambda level: np.interp(half, images, level), -1, levels)
    return {
        PRIMARY: pairs.means,
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
