"""Comparison of two arms in one metric: how much better a candidate is, how much faster, and with what confidence.

All statistics are *paired*: seed k of the candidate is compared with seed k of the baseline. A metric is converted to a
*level*, for which lower is better: the log of a distance, or minus a share such as precision. Times are the training
images, or training seconds, until the level, smoothed so that it never increases, reaches a threshold.

The primary endpoint is the advantage in level, averaged over the training images that both arms cover.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from convergence.analysis.curves import from_level, log_speedup, mean_over_images, time_to_threshold, to_level
from convergence.analysis.effects import Effect, Quantity, Scale, decide
from convergence.analysis.intervals import Interval, censored_interval, t_interval
from convergence.analysis.power import noise_over_seeds
from convergence.analysis.results import Comparison
from convergence.errors import StudyError
from convergence.failures import failed
from convergence.tables import SHARES, check_curves
from diffusion.errors import InputError

# Thresholds, as fractions of the baseline's progress in level from its first trained checkpoint to its last.
THRESHOLD_SHARES = (0.25, 0.5, 0.75)

SPEEDUP_COLUMNS = [
    "study", "features", "metric", "baseline", "candidate", "primary", "scale", "quantity", "threshold", "seed",
    "of_baseline", "of_candidate", "effect", "low", "high", "pairs", "censored", "failed_baseline",
    "failed_candidate", "first_images", "last_images",
]  # fmt: skip


def compare(
    curves: pd.DataFrame,
    baseline: str,
    candidate: str,
    metric: str = "fd",
    thresholds: Iterable[float] | None = None,
) -> Comparison:
    """Compares two arms in one metric over training images.

    Example:
        >>> rows = [("a", 1000, 80.0), ("a", 2000, 60.0), ("b", 1000, 75.0), ("b", 2000, 50.0)]
        >>> curves = pd.DataFrame(rows, columns=["arm", "images", "value"])
        >>> print(compare(curves, baseline="a", candidate="b"))
        No difference shown between b and a in FID: -11.6% (no interval) on average over 1,000 to 2,000 training images,
        1 paired seed. Speed-up in images to FID 69.28: 1.23 (no interval). With one seed there is no interval, and
        nothing can be concluded.

    Args:
        curves: a row per run and checkpoint, with the columns `arm`, `images` (training images seen) and `value`.
            Optional columns are `seed`, `metric`, `features`, `study`, `seconds`, `n` (generated images) and `reason`
            ("diverged ..." or "collapsed ..." where a run has no value for this reason).
        baseline: an arm.
        candidate: the arm that is compared with it.
        metric: `fd`, `fd_infinity`, `kid`, `precision`, `recall` or `memorised`.
        thresholds: values of the metric at which speed-ups are measured; by default three values between the
            baseline's first and last trained checkpoint.

    Raises:
        StudyError: a column is missing or has invalid values, an arm or the metric is not in the table, the table has
            several studies or feature extractors, or no seed has values of both arms.
    """
    rows = check_curves(curves)
    for name, column in ((baseline, "arm"), (candidate, "arm"), (metric, "metric")):
        if name not in set(rows[column]):
            choices = ", ".join(rows[column].unique())
            raise StudyError(f"curves: the column {column} has no {name}: choose from {choices}")
    rows = rows[rows["metric"] == metric]
    for column in ("study", "features"):
        if rows[column].nunique() > 1:
            choices = ", ".join(rows[column].unique())
            raise StudyError(f"curves: the column {column} has several values ({choices}): select the rows of one")
    comparison = compare_pair(rows, baseline, candidate, thresholds, primary=True)
    if comparison is None:
        raise StudyError(f"curves: no seed has values of {metric} of both {baseline} and {candidate}")
    return comparison


def compare_study(metrics: pd.DataFrame, compare: Mapping[str, Any]) -> list[Comparison]:
    """Compares every candidate of a study with its baseline, in every metric and with every feature extractor.

    Args:
        metrics: the long table of metrics (`convergence.tables`) of one study.
        compare: `convergence.schema.Experiment.comparison`: `baseline`, `candidates`, `primary`, `thresholds` (of the
            primary metric) and `features` (of the primary comparison).
    """
    comparisons = []
    for (features, metric), rows in metrics.groupby(["features", "metric"], sort=False):
        is_main = features == compare["features"] and metric == compare["primary"]["metric"]
        for candidate in compare["candidates"]:
            comparison = compare_pair(
                rows,
                compare["baseline"],
                candidate,
                compare["thresholds"] if is_main else None,
                primary=is_main and candidate == compare["primary"]["candidate"],
            )
            if comparison is not None:
                comparisons.append(comparison)
    return comparisons


def compare_pair(
    rows: pd.DataFrame,
    baseline: str,
    candidate: str,
    thresholds: Iterable[float] | None = None,
    primary: bool = False,
) -> Comparison | None:
    """Compares two arms in one metric; returns None if no seed has values of both.

    If a run of a seed failed, the seed is left out of `average` and `final`, and counted; for times the run is one
    that never reaches a threshold. Values that are missing for another reason are left out one by one.

    Args:
        rows: the long table of one study, extractor and metric.
        baseline: an arm.
        candidate: another arm.
        thresholds: values of the metric. By default those at 1/4, 1/2 and 3/4 of the progress, in level, from the
            baseline's mean at the first trained checkpoint to its mean at the last, whatever the candidate does.
        primary: whether this is the primary comparison of the study.

    Raises:
        StudyError: the arms share no range of training images.
    """
    pairs = _pair_runs(rows, baseline, candidate)
    if pairs is None:
        return None
    if thresholds is None:
        thresholds = _default_thresholds(pairs)
    from_easy_to_hard = sorted(thresholds, key=lambda value: -to_level(value, pairs.metric, pairs.scale))
    axes: tuple[Quantity, Quantity] = ("images", "seconds")
    times = [_time_effect(pairs, axis, threshold) for threshold in from_easy_to_hard for axis in axes]
    return _comparison(pairs, rows, baseline, candidate, times, primary)


def compare_levels(rows: pd.DataFrame, baseline: str, candidate: str) -> Comparison | None:
    """Compares as `compare_pair`, without times; returns None also if the arms share no range of training images."""
    try:
        pairs = _pair_runs(rows, baseline, candidate)
    except InputError:  # a probe may lack any value
        pairs = None
    return _comparison(pairs, rows, baseline, candidate, []) if pairs else None


def speedup_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Returns comparisons as the table `speedup.csv`: for each effect a row per seed, then one over all seeds.

    The row over all seeds has no `seed`. `of_baseline` and `of_candidate` are the metric or the time, `effect` is the
    estimate; `convergence.analysis.effects.Effect` describes the columns.
    """
    rows = [
        # Both have a baseline and a candidate: arms, and values.
        vars(effect)
        | vars(comparison)
        | {"of_baseline": effect.baseline, "of_candidate": effect.candidate, "effect": effect.estimate}
        for comparison in comparisons
        for total in comparison.effects
        for effect in (*total.per_seed, total)
    ]
    return pd.DataFrame(rows, columns=SPEEDUP_COLUMNS).astype({"seed": "Int64"})


class _Pairs(NamedTuple):
    """The runs of S seeds in two arms, over the training images that all of them cover."""

    metric: str
    scale: Scale
    seeds: list[int]
    runs: list[tuple[pd.DataFrame, pd.DataFrame]]
    """Rows of the baseline and of the candidate for each seed, with the column `level`."""
    images: np.ndarray
    """[K] training images of the trained checkpoints of any run."""
    levels: np.ndarray
    """[S, 2, K], linear in images between the checkpoints of a run."""
    failed: np.ndarray
    """[S, 2] whether a run diverged or collapsed."""


def _pair_runs(rows: pd.DataFrame, baseline: str, candidate: str) -> _Pairs | None:
    """Pairs the runs of one metric by seed; returns None if there is no pair.

    Raises:
        StudyError: the runs share no range of training images.
    """
    rows = rows[rows["arm"].isin([baseline, candidate]) & (rows["value"].notna() | failed(rows))]
    metric = "".join(rows["metric"].unique())
    scale: Scale = "plain" if metric in SHARES or (rows["value"] <= 0).any() else "log"
    rows = rows.assign(level=to_level(rows["value"], metric, scale)).sort_values("images")
    runs = {key: run for key, run in rows.groupby(["arm", "seed"]) if (run["images"] > 0).any()}
    seeds = sorted(seed for arm, seed in runs if arm == baseline and (candidate, seed) in runs)
    if not seeds:
        return None
    pairs = [(runs[baseline, seed], runs[candidate, seed]) for seed in seeds]
    checkpoints = [run["images"] for pair in pairs for run in pair]
    first = max(images[images > 0].min() for images in checkpoints)
    last = min(images.max() for images in checkpoints)
    if first > last:
        raise StudyError(
            f"Study '{rows['study'].iloc[0]}': {baseline} and {candidate} share no range of training images, so they "
            "cannot be compared: give them checkpoints over the same images."
        )
    pairs = [(base[base["images"] <= last], cand[cand["images"] <= last]) for base, cand in pairs]
    grid = np.unique(np.concatenate([[first, last], *(images[images.between(first, last)] for images in checkpoints)]))
    levels = np.array([[np.interp(grid, run["images"], run["level"]) for run in pair] for pair in pairs])
    has_failed = np.array([[run["level"].isna().any() for run in pair] for pair in pairs])
    return _Pairs(metric, scale, seeds, pairs, grid, levels, has_failed)


def _default_thresholds(pairs: _Pairs) -> np.ndarray:
    """Returns values between the baseline's first and last checkpoint; none if all runs of the baseline failed."""
    complete = ~pairs.failed[:, 0]
    if not complete.any():
        return np.array([])
    start, end = pairs.levels[complete, 0][:, [0, -1]].mean(axis=0)
    return from_level(start + np.array(THRESHOLD_SHARES) * (end - start), pairs.metric, pairs.scale)


def _comparison(
    pairs: _Pairs, rows: pd.DataFrame, baseline: str, candidate: str, times: list[Effect], primary: bool = False
) -> Comparison:
    means = mean_over_images(pairs.levels, pairs.images)  # [S, 2]
    average = _level_effect(pairs, "average", means)
    final = _level_effect(pairs, "final", pairs.levels[..., -1])
    study, features, metric = (rows[name].iloc[0] for name in ("study", "features", "metric"))
    return Comparison(
        study=study,
        features=features,
        metric=metric,
        baseline=baseline,
        candidate=candidate,
        primary=primary,
        scale=pairs.scale,
        first_images=pairs.images[0].item(),
        last_images=pairs.images[-1].item(),
        seeds=tuple(map(int, pairs.seeds)),
        effects=(average, final, *times),
        noise=noise_over_seeds(means),
        outcome=decide(average.low, average.high, average.failed_baseline, average.failed_candidate),
    )


def _level_effect(pairs: _Pairs, quantity: Quantity, levels: np.ndarray) -> Effect:
    """Returns an advantage in level, from levels [S, 2] that are NaN for runs that failed."""
    advantage = levels[:, 0] - levels[:, 1]
    used = ~np.isnan(advantage)
    mean = levels[used].mean(axis=0) if used.any() else np.full(2, np.nan)
    values = from_level(np.vstack([levels, mean]), pairs.metric, pairs.scale)
    return _effect(pairs, quantity, np.nan, values, (advantage, advantage), t_interval(advantage[used]))


def _time_effect(pairs: _Pairs, axis: Quantity, threshold: float) -> Effect:
    """Returns the log speed-up at a threshold, which is a value of the metric."""
    level = to_level(threshold, pairs.metric, pairs.scale)
    times = np.array([[time_to_threshold(run["level"], run[axis], level) for run in pair] for pair in pairs.runs])
    low, high = log_speedup(tuple(times[:, 0].T), tuple(times[:, 1].T))
    seen = np.where(times[..., 0] == 0, np.nan, times[..., 1])  # [S, 2]
    mean = np.exp(np.log(seen).mean(axis=0))
    values = np.vstack([seen, np.where(np.isfinite(mean), mean, np.nan)])
    return _effect(pairs, axis, float(threshold), values, (low, high), censored_interval(low, high))


def _effect(
    pairs: _Pairs,
    quantity: Quantity,
    threshold: float,
    values: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    interval: Interval,
) -> Effect:
    """Returns an effect over all seeds with those of each seed.

    Args:
        pairs: the runs.
        quantity: what is compared.
        threshold: a value of the metric, or NaN.
        values: [S + 1, 2] of both arms, for each seed and over all seeds.
        bounds: lower and upper bounds [S] of the advantages.
        interval: the interval over all seeds.
    """
    low, high = bounds
    used, censored = ~np.isnan(low), low < high

    def effect(
        values: np.ndarray, interval: Interval, used: int, censored: int, failed: np.ndarray, **of_seeds: Any
    ) -> Effect:
        return Effect(
            quantity=quantity,
            threshold=threshold,
            baseline=float(values[0]),
            candidate=float(values[1]),
            estimate=float(interval.estimate),
            low=float(interval.low),
            high=float(interval.high),
            pairs=int(used),
            censored=int(censored),
            failed_baseline=int(failed[0]),
            failed_candidate=int(failed[1]),
            **of_seeds,
        )

    intervals = map(Interval, np.where(censored, np.nan, low), low, high)
    columns = zip(values[:-1], intervals, used, censored, pairs.failed, pairs.seeds, strict=True)
    per_seed = tuple(effect(*row, seed=int(seed)) for *row, seed in columns)
    return effect(values[-1], interval, used.sum(), censored.sum(), pairs.failed.sum(axis=0), per_seed=per_seed)
