"""Notes on a comparison: sentences about what its runs do not allow to conclude."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, norm, skew
from scipy.stats import t as student_t

from convergence.analysis.effects import Effect, Unit, in_unit, interval_in_unit
from convergence.analysis.intervals import t_interval
from convergence.analysis.pairs import Pairs
from convergence.analysis.power import POWER, detectable
from convergence.analysis.results import Comparison
from convergence.analysis.wording import count_text, effect_text, interval_text, number_text, size_text

ERROR_RATE = 0.05  # of the tests for outliers and skew in normal samples
MIN_SKEW_PAIRS = 5
# Estimates without the bias of the Frechet distance, which falls with the number of samples; the best one first.
UNBIASED = ("kid", "fd_infinity")
STILL_FALLING = 0.1  # decrease of the baseline over the last doubling of images that the verdict mentions


def outlier(values: np.ndarray) -> int | None:
    """Returns the index of the value that does not fit the others; None if all values fit.

    A value does not fit if it is outside the prediction interval of the other values for a normal distribution (the
    deleted t residual; Cook & Weisberg 1982, Residuals and influence in regression, ch. 2.2). The error rate over all
    values is 5%.

    Args:
        values: [S]; with fewer than three values, the result is None.
    """
    size = len(values)
    if size < 3:
        return None
    others = np.array([np.delete(values, index) for index in range(size)])
    with np.errstate(divide="ignore", invalid="ignore"):
        residuals = np.abs(values - others.mean(axis=1)) / (others.std(axis=1, ddof=1) * math.sqrt(1 + 1 / (size - 1)))
    index = int(residuals.argmax())  # residuals are NaN if all values are equal
    limit = student_t.ppf(1 - ERROR_RATE / (2 * size), size - 2)
    return index if residuals[index] > limit else None


def is_skewed(values: np.ndarray) -> bool:
    """Returns whether the skewness of values [S] is larger than in 95% of normal samples; False for fewer than five.

    The limit is 1.96 standard errors of the skewness of a normal sample (Cramér 1946, Mathematical methods of
    statistics, 29.3).
    """
    size = len(values)
    if size < MIN_SKEW_PAIRS or np.ptp(values) == 0:
        return False
    stderr = math.sqrt(6 * size * (size - 1) / ((size - 2) * (size + 1) * (size + 3)))
    return bool(abs(skew(values, bias=False)) > norm.ppf(1 - ERROR_RATE / 2) * stderr)


def notes_on(pairs: Pairs, average: Effect, images: Effect | None, is_conclusion: bool) -> tuple[str, ...]:
    """Returns the notes on a comparison, the most important first.

    Args:
        pairs: runs of the comparison.
        average: effect on the metric averaged over training images.
        images: effect on the training images until the primary threshold; None if there is no threshold.
        is_conclusion: whether the outcome of the comparison is a conclusion: neither "undecided" nor "identical".
    """
    notes = _few_pairs(average.pairs, is_conclusion)
    for arm, count in ((pairs.baseline, average.failed_baseline), (pairs.candidate, average.failed_candidate)):
        if count:
            notes.append(f"{count_text(count, 'run')} of {arm} of {len(pairs.seeds)} diverged or collapsed.")
    if images and np.isnan(images.estimate) and images.low == 0 and np.isposinf(images.high):
        notes.append(f"The images to {images.threshold:.4g} are unknown, because {_why_unknown(images)}.")
    if pairs.shortened:
        arm, seed = pairs.shortest
        notes.append(
            f"{arm} seed {seed} ends at {pairs.images[-1]:,.0f} training images: all runs are compared up to there, "
            f"although {count_text(pairs.shortened, 'run')} went on."
        )
    notes += _unusual(pairs, average.unit)
    falling = _decrease(pairs)
    if falling > STILL_FALLING:
        notes.append(
            f"The metric of {pairs.baseline} still falls by {100 * falling:.0f}% over the last doubling of images: the "
            "comparison holds for this stage of training."
        )
    return tuple(notes)


def bias_notes(primary: Comparison, comparisons: Sequence[Comparison]) -> list[str]:
    """Returns a sentence on whether an unbiased metric agrees with the Frechet distance."""
    if primary.metric != "fd":
        return []
    arms = (primary.features, primary.baseline, primary.candidate)
    others = {c.metric: c for c in comparisons if (c.features, c.baseline, c.candidate) == arms}
    unbiased = next((others[metric] for metric in UNBIASED if metric in others), None)
    name = primary.short_name
    if unbiased is None:
        return [f"{name} of a finite number of samples is biased upwards, so the true change may be larger."]
    ours, theirs = primary.average, unbiased.average
    if ours.shown == theirs.shown:
        agrees = "it agrees"
    elif (ours.estimate > 0) == (theirs.estimate > 0):
        agrees = "it has the same sign, but does not show the same"
    else:
        agrees = "it does not agree"
    change = f"the unbiased {unbiased.short_name} changes by {effect_text(theirs)}"
    return [f"{name} is biased upwards, which makes its changes too small; {change}: {agrees}."]


def power_notes(comparison: Comparison) -> list[str]:
    """Returns a sentence on the smallest difference that this number of seeds detects, if nothing is decided.

    There is no sentence below three pairs, from which the spread is hardly known.
    """
    pairs = comparison.average.pairs
    if pairs < 3 or comparison.outcome not in ("undecided", "interim"):
        return []
    smallest = size_text(detectable(comparison.noise.paired, pairs), comparison.scale)
    return [
        f"At this noise, {count_text(pairs, 'seed')} detect a difference of {smallest} with {100 * POWER:.0f}% power."
    ]


def _few_pairs(pairs: int, is_conclusion: bool) -> list[str]:
    if pairs == 0:
        return ["In every pair at least one run diverged or collapsed."]
    if pairs == 1:
        return ["One pair of runs gives no interval, so nothing can be concluded."]
    if pairs == 2 and is_conclusion:
        return ["The interval of two pairs extends 12.7 standard errors to each side: confirm with more seeds."]
    return []


def _why_unknown(images: Effect) -> str:
    """Returns why the pairs of runs give no factor of images."""
    times = np.array([(seed.baseline, seed.candidate) for seed in images.per_seed])
    if np.isnan(times).all():
        return "all runs reach it before their first checkpoint"
    if np.isposinf(times).all():
        return "no run reaches it"
    return "too few runs cross it between their checkpoints"


def _unusual(pairs: Pairs, unit: Unit) -> list[str]:
    """Returns notes about runs and pairs that do not fit the others, and about a skewed distribution of pairs."""
    means = pairs.means
    notes = []
    for arm, levels in zip((pairs.baseline, pairs.candidate), means.T, strict=True):
        sound = np.flatnonzero(~np.isnan(levels))
        if (index := outlier(levels[sound])) is not None:
            others = np.delete(levels[sound], index)
            distance = float(levels[sound][index] - others.mean())
            change = number_text(in_unit(distance, distance, unit, pairs.metric)[0], unit)
            notes.append(f"{arm} seed {pairs.seeds[sound[index]]} is unlike the other runs of its arm ({change}).")
    used = np.flatnonzero(~np.isnan(means).any(axis=1))
    differences = means[used, 1] - means[used, 0]
    index = outlier(differences)
    if index is None and not is_skewed(differences):
        return notes
    lower = int((differences < 0).sum())
    p = binomtest(lower, len(differences)).pvalue
    text = "The pairs are skewed" if index is None else f"The pair of seed {pairs.seeds[used[index]]} is an outlier"
    text += f": {lower} of {len(differences)} pairs are better (sign test p = {p:.2g})"
    if index is not None:
        interval = interval_in_unit(t_interval(np.delete(differences, index)), unit, pairs.metric)
        text += f"; without it the average is {interval_text(*interval, unit)}"
    return [*notes, text + "."]


def _decrease(pairs: Pairs) -> float:
    """Returns the relative decrease of the baseline's mean over the last doubling of images; NaN if unknown."""
    levels = pairs.levels[~pairs.failed[:, 0], 0]
    half = pairs.images[-1] / 2
    if pairs.scale != "ratio" or not len(levels) or pairs.images[0] > half:
        return math.nan
    mean = levels.mean(axis=0)
    return float(-np.expm1(mean[-1] - np.interp(math.log(half), np.log(pairs.images), mean)))
