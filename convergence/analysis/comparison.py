"""Comparison of two arms in one metric: how much better a candidate is, how much faster, and with what confidence.

All statistics are *paired*: seed k of the candidate is compared with seed k of the baseline. Values of a metric are
converted to *levels*, for which lower is better: the log of FD, KID itself, precision with a minus sign. The time of a
run is the number of training images until its level reaches a threshold. For this purpose, the level is smoothed so
that it never increases.

The primary endpoint is the difference between the levels of the two arms, averaged over training images.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from convergence.analysis.cost import Cost
from convergence.analysis.curves import (
    from_level,
    isotonic_fit,
    log_factor,
    mean_over_images,
    time_to_threshold,
    to_level,
)
from convergence.analysis.decision import Outcome, decide
from convergence.analysis.effects import Effect, Quantity, Unit, in_unit, interval_in_unit, shown
from convergence.analysis.intervals import Interval, censored_interval, sum_interval, t_interval, t_test
from convergence.analysis.notes import notes_on
from convergence.analysis.pairs import Pairs, pair_runs
from convergence.analysis.power import noise_over_seeds
from convergence.analysis.results import Comparison, Role
from convergence.analysis.sampling_noise import noise_of_samples
from convergence.errors import StudyError
from convergence.schema import DEFAULT_MARGIN
from convergence.tables import HIGHER_IS_BETTER, check_curves

# Thresholds of tables, as fractions of the baseline's progress in level from its first trained checkpoint to its last.
THRESHOLD_SHARES = (0.25, 0.5, 0.75)
# Digits to which the primary threshold is rounded, to the side that is easier to reach.
THRESHOLD_DIGITS = 4
MARGIN_PERCENT = float(DEFAULT_MARGIN.removesuffix("%"))
ROUNDING = 1e-12
# Differences in level below this are rounding errors.
NO_DIFFERENCE = 1e-9

EFFECT_COLUMNS = [
    "study", "features", "metric", "baseline", "candidate", "role", "quantity", "threshold", "unit", "seed",
    "of_baseline", "of_candidate", "estimate", "low", "high", "shown", "p_value", "p_holm", "pairs", "censored",
    "failed_baseline", "failed_candidate", "first_images", "last_images",
]  # fmt: skip


def compare(
    curves: pd.DataFrame,
    baseline: str,
    candidate: str,
    metric: str = "fd",
    thresholds: Iterable[float] | None = None,
    margin: float | None = None,
) -> Comparison:
    """Compares two arms (training schemes) by their curves of one metric over training images.

    Example:
        >>> rows = [("a", 1000, 80.0), ("a", 2000, 60.0), ("b", 1000, 75.0), ("b", 2000, 50.0)]
        >>> curves = pd.DataFrame(rows, columns=["arm", "images", "value"])
        >>> print(compare(curves, baseline="a", candidate="b"))
        Undecided between b and a: FID -11.6% on average (no interval). One pair of runs gives no interval, so nothing
        can be concluded. The metric of a still falls by 25% over the last doubling of images: the comparison holds for
        this stage of training.

    Args:
        curves: a row per run and checkpoint. Required columns are `arm`, `images` (training images seen so far) and
            `value`. Optional columns are `seed`, `metric`, `features`, `study`, `n` (number of generated images) and
            `reason`, which states why a value is missing: "diverged ..." or "collapsed ..." for a failed run.
        baseline: name of the arm to compare with.
        candidate: name of the arm to judge.
        metric: `fd`, `fd_infinity`, `kid`, `precision`, `recall`, `density`, `coverage` or `memorised`.
        thresholds: values of the metric. For each value, the arms are compared in the training images that they need to
            reach the value. The middle value is the primary threshold, which decides whether the candidate is faster.
            By default, the primary threshold is the best value that all runs reach, except failed runs.
        margin: largest change of the average metric that counts as no change: in percent for `fd` and `fd_infinity`
            (default 2), in units of the metric for the others (no default).

    Raises:
        StudyError: a column is missing or has invalid values, an arm or the metric is not in the table, the table has
            several studies or feature extractors, no seed has values of both arms, or the arms share no range of
            training images.
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
    pairs = pair_runs(rows, baseline, candidate)
    if pairs is None:
        raise StudyError(
            f"curves: no seed has {metric} values of both {baseline} and {candidate}: add rows of a common seed"
        )
    return compare_pairs(pairs, thresholds, margin, role="primary")


def compare_pairs(
    pairs: Pairs,
    thresholds: Iterable[float] | None = None,
    margin: float | None = None,
    role: Role = "secondary",
    costs: Mapping[str, Cost] | None = None,
) -> Comparison:
    """Compares two arms in one metric.

    A failed run is one that diverged or collapsed. The seed of a failed run is left out of the effects `average` and
    `final`, which state the number of failed runs. In the effects on training images, a failed run counts as a run that
    never reaches a threshold. If a value is missing for another reason, only this value is left out.

    Args:
        pairs: runs of both arms.
        thresholds: values of the metric; the middle one is the primary threshold. By default, the primary threshold is
            the best value that all runs reach, except failed runs. The other thresholds are then at 1/4, 1/2 and 3/4 of
            the baseline's progress, which is the change of the baseline's mean level from the first trained to the last
            checkpoint.
        margin: margin of equivalence, in the unit of the effect `average`; by default 2% for FD, none for metrics that
            are compared by differences.
        role: role of the comparison in its study.
        costs: arm -> its training cost. Hours are compared if the costs of both arms are known.
    """
    values, primary = _thresholds(pairs, thresholds)
    times = {value: time_effect(pairs, value) for value in values}
    images = None if primary is None else times[primary]
    hours = []
    if images and costs and {pairs.baseline, pairs.candidate} <= costs.keys():
        hours = [_in_hours(images, costs[pairs.baseline], costs[pairs.candidate])]
    if margin is None and pairs.scale == "ratio":
        margin = MARGIN_PERCENT
    means = pairs.means
    average = _level_effect(pairs, "average", means)
    final = _level_effect(pairs, "final", pairs.levels[..., -1])
    differences = _known(means[:, 1] - means[:, 0])
    _, low, high = t_interval(differences, confidence=0.9)  # two one-sided tests at 5%
    average_90 = in_unit(float(low), float(high), average.unit, pairs.metric)
    within_margin = margin is not None and -margin <= average_90[0] and average_90[1] <= margin
    outcome = _outcome(pairs, average, final, images, within_margin)
    return Comparison(
        study=pairs.study,
        features=pairs.features,
        metric=pairs.metric,
        baseline=pairs.baseline,
        candidate=pairs.candidate,
        role=role,
        scale=pairs.scale,
        first_images=pairs.images[0].item(),
        last_images=pairs.images[-1].item(),
        seeds=tuple(pairs.seeds),
        effects=(average, final, *times.values(), *hours),
        primary_threshold=math.nan if primary is None else primary,
        margin=margin,
        average_90=average_90,
        within_margin=within_margin,
        outcome=outcome,
        cross_images=_last_crossing(pairs),
        p_holm=math.nan,
        noise=replace(noise_over_seeds(means), samples=noise_of_samples(pairs)),
        notes=notes_on(pairs, average, images, is_conclusion=outcome not in ("undecided", "identical")),
    )


def effects_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Returns comparisons as the table `effects.csv`: for each effect, a row per seed and then a row over all seeds.

    The row over all seeds has no value in the column `seed`. `of_baseline` and `of_candidate` are the values of the two
    arms: the metric, the training images or the hours. `convergence.analysis.effects.Effect` describes the other
    columns.
    """
    rows = [
        # Both have a baseline and a candidate: arms, and values.
        vars(effect) | vars(comparison) | {"of_baseline": effect.baseline, "of_candidate": effect.candidate}
        for comparison in comparisons
        for total in comparison.effects
        for effect in (*total.per_seed, total)
    ]
    return pd.DataFrame(rows, columns=EFFECT_COLUMNS).astype({"seed": "Int64"})


def progress_thresholds(pairs: Pairs) -> list[float]:
    """Returns the values of the metric at 1/4, 1/2 and 3/4 of the baseline's progress.

    The progress is the change of the baseline's mean level from its first trained to its last checkpoint. The list is
    empty if all runs of the baseline failed.
    """
    complete = ~pairs.failed[:, 0]
    if not complete.any():
        return []
    start, end = pairs.levels[complete, 0][:, [0, -1]].mean(axis=0)
    levels = start + np.array(THRESHOLD_SHARES) * (end - start)
    return [float(value) for value in from_level(levels, pairs.metric, pairs.scale)]


def _thresholds(pairs: Pairs, declared: Iterable[float] | None) -> tuple[list[float], float | None]:
    """Returns the thresholds, from easy to hard, and the primary one; None if all runs failed and none is declared."""

    def from_easy_to_hard(values: Iterable[float]) -> list[float]:
        return sorted({*values}, key=lambda value: -to_level(value, pairs.metric, pairs.scale))

    values = from_easy_to_hard(declared or ())
    if values:
        return values, values[(len(values) - 1) // 2]
    primary = _reached_by_all(pairs)
    if primary is None:
        return [], None
    return from_easy_to_hard([primary, *progress_thresholds(pairs)]), primary


def _reached_by_all(pairs: Pairs) -> float | None:
    """Returns the best value of the metric that all runs reach, except failed runs; None if all runs failed.

    The value is rounded to the side that is easier to reach, so that reports print the value that was used.
    """
    ends = [
        isotonic_fit(run["level"].to_numpy())[-1]
        for pair, has_failed in zip(pairs.runs, pairs.failed, strict=True)
        for run, run_failed in zip(pair, has_failed, strict=True)
        if not run_failed
    ]
    if not ends:
        return None
    value = float(from_level(np.array(max(ends)), pairs.metric, pairs.scale))
    if value == 0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - THRESHOLD_DIGITS)
    round_to = math.floor if pairs.metric in HIGHER_IS_BETTER else math.ceil
    slack = ROUNDING if round_to is math.floor else -ROUNDING  # exp(log(100)) is above 100
    return float(f"{round_to(value / digit * (1 + slack)) * digit:.{THRESHOLD_DIGITS + 1}g}")


def _outcome(pairs: Pairs, average: Effect, final: Effect, images: Effect | None, within_margin: bool) -> Outcome:
    if np.ptp(pairs.levels, axis=1).max() < NO_DIFFERENCE:  # never true if a run failed: its levels are NaN
        return "identical"
    same = within_margin and average.failed_baseline == average.failed_candidate
    return decide(average.shown, final.shown, images.shown if images else "not shown", same)


def _last_crossing(pairs: Pairs) -> float:
    """Returns the training images at which the arm that is better on average last becomes worse; NaN if never."""
    used = ~pairs.failed.any(axis=1)
    if not used.any():
        return math.nan
    difference = (pairs.levels[used, 1] - pairs.levels[used, 0]).mean(axis=0)
    lead = np.sign(mean_over_images(difference, pairs.images)) * difference
    changes = np.flatnonzero((lead[:-1] > 0) & (lead[1:] < 0))
    if not len(changes):
        return math.nan
    left = changes[-1]
    share = difference[left] / (difference[left] - difference[left + 1])
    return float(np.exp(np.interp(share, (0, 1), np.log(pairs.images[[left, left + 1]]))))


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _level_effect(pairs: Pairs, quantity: Quantity, levels: np.ndarray) -> Effect:
    """Returns the effect on levels [S, 2] of S seeds of baseline and candidate, which are NaN for failed runs."""
    difference = levels[:, 1] - levels[:, 0]
    used = ~np.isnan(difference)
    mean = levels[used].mean(axis=0) if used.any() else np.full(2, np.nan)
    values = from_level(np.vstack([levels, mean]), pairs.metric, pairs.scale)
    unit: Unit = "percent" if pairs.scale == "ratio" else "difference"
    known = difference[used]
    bounds = (difference, difference)
    return _effect(pairs, quantity, np.nan, unit, values, bounds, t_interval(known), t_test(known))


def time_effect(pairs: Pairs, threshold: float) -> Effect:
    """Returns the effect on the training images until the metric reaches the value `threshold`."""
    level = to_level(threshold, pairs.metric, pairs.scale)
    times = np.array([[time_to_threshold(run["level"], run["images"], level) for run in pair] for pair in pairs.runs])
    low, high = log_factor(tuple(times[:, 0].T), tuple(times[:, 1].T))
    seen = np.where(times[..., 0] == 0, np.nan, times[..., 1])  # [S, 2]
    mean = np.exp(np.log(seen).mean(axis=0))
    values = np.vstack([seen, np.where(np.isfinite(mean), mean, np.nan)])
    return _effect(
        pairs, "images", float(threshold), "factor", values, (low, high), censored_interval(low, high), math.nan
    )


def _in_hours(images: Effect, baseline: Cost, candidate: Cost) -> Effect:
    """Converts an effect on training images to hours.

    The interval over all seeds contains the noise of the images and of the costs. The effect of one seed has no
    interval, only bounds.
    """
    with np.errstate(divide="ignore"):
        factor = Interval(*np.log([images.estimate, images.low, images.high]))
    ratio, (log_baseline, low, high) = candidate.log_ratio, baseline.log_ratio
    parts = [factor, ratio, Interval(-log_baseline, -high, -low)]
    if images.seed is not None:
        parts[1:] = [Interval(*[part.estimate] * 3) for part in parts[1:]]
    estimate, low, high = map(float, np.exp(sum_interval(parts)))
    return replace(
        images,
        quantity="hours",
        baseline=images.baseline * baseline.seconds_per_1000_images / 3.6e6,
        candidate=images.candidate * candidate.seconds_per_1000_images / 3.6e6,
        estimate=estimate,
        low=low,
        high=high,
        shown=shown(low - 1, high - 1, images.failed_baseline, images.failed_candidate),
        per_seed=tuple(_in_hours(seed, baseline, candidate) for seed in images.per_seed),
    )


def _effect(
    pairs: Pairs,
    quantity: Quantity,
    threshold: float,
    unit: Unit,
    values: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    interval: Interval,
    p_value: float,
) -> Effect:
    """Returns the effect over all seeds, which contains the effect of each seed.

    Args:
        pairs: runs of both arms.
        quantity: name of the quantity that is compared.
        threshold: a value of the metric; NaN if the quantity has no threshold.
        unit: unit of the printed effect.
        values: [S + 1, 2] values of the baseline and of the candidate: a row per seed, then a row over all seeds.
        bounds: lower and upper bounds [S] of the differences in level.
        interval: interval of the difference in level over all seeds.
        p_value: p-value over all seeds.
    """
    low, high = bounds
    used, censored = ~np.isnan(low), low < high

    def effect(
        values: np.ndarray, interval: Interval, used: int, censored: int, failed: np.ndarray, **of_seeds: Any
    ) -> Effect:
        printed = interval_in_unit(interval, unit, pairs.metric)
        return Effect(
            quantity=quantity,
            threshold=threshold,
            unit=unit,
            baseline=float(values[0]),
            candidate=float(values[1]),
            **printed._asdict(),
            shown=shown(float(interval.low), float(interval.high), *map(int, failed)),
            pairs=int(used),
            censored=int(censored),
            failed_baseline=int(failed[0]),
            failed_candidate=int(failed[1]),
            **of_seeds,
        )

    intervals = map(Interval, np.where(censored, np.nan, low), low, high)
    columns = zip(values[:-1], intervals, used, censored, pairs.failed, pairs.seeds, strict=True)
    per_seed = tuple(effect(*row, seed=seed, p_value=math.nan) for *row, seed in columns)
    failures = pairs.failed.sum(axis=0)
    totals = (values[-1], interval, int(used.sum()), int(censored.sum()), failures)
    return effect(*totals, p_value=p_value, per_seed=per_seed)
