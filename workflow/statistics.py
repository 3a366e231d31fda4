"""How much faster an arm converges than another, with what confidence: pure functions of the long table of metrics.

Everything is *paired*: seed k of the candidate against seed k of the baseline. Every effect is an *advantage*,
positive where the candidate is better:

- a metric is taken as a *level*, lower is better: the log of a distance, minus a share (precision, recall). An
  advantage in level is that of the baseline minus that of the candidate;
- a time is the training images, or the training seconds, until the level, smoothed so that it never rises, comes to
  a threshold. An advantage in time is the log of the speed-up, time of the baseline over time of the candidate.

The primary endpoint is the advantage in level, averaged over the images that both arms cover.
"""

import bisect
import itertools
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy.optimize import brentq, isotonic_regression
from scipy.stats import binom, chi2, ncf
from scipy.stats import t as student_t

from diffusion import StudyError
from workflow.tables import HIGHER_IS_BETTER, SHARES, diverged

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
POWER = 0.8
# Shares of the way, in level, that the baseline goes from its first trained checkpoint to its last.
THRESHOLD_SHARES = (0.25, 0.5, 0.75)
PIVOT_DRAWS = 100_000
MOST_PLACED = 12  # censored pairs, of which every placement is tried: 2^12
MOST_SEEDS = 10_000

Values = TypeVar("Values", float, np.ndarray)

PAIR = ["study", "features", "metric", "baseline", "candidate"]
SPEEDUP_COLUMNS = [
    *PAIR, "primary", "scale", "quantity", "threshold", "seed", "of_baseline", "of_candidate", "effect", "low", "high",
    "pairs", "censored", "diverged_baseline", "diverged_candidate", "first_images", "last_images",
]  # fmt: skip


class Interval(NamedTuple):
    """An estimate between its bounds; a bound that is not known is infinite, an estimate NaN."""

    estimate: Any
    low: Any
    high: Any


# --- Intervals ----------------------------------------------------------------------------------------------


def t_interval(values: np.ndarray) -> Interval:
    """Mean over the last axis of values [..., S] with its 95% t-interval; one value has no bounds, none no mean."""
    values = np.asarray(values, float)
    size = values.shape[-1]
    if size == 0:
        return Interval(np.nan, -np.inf, np.inf)
    mean = values.mean(axis=-1)
    half = np.full_like(mean, np.inf)
    if size > 1:
        half = student_t.ppf(1 - TAIL, size - 1) * values.std(axis=-1, ddof=1) / np.sqrt(size)
    return Interval(mean, mean - half, mean + half)


def censored_interval(low: np.ndarray, high: np.ndarray) -> Interval:
    """95% interval of the typical value of S values of which only bounds may be known: low <= value <= high, each [S].

    Exact values (low = high) give the t-interval of their mean. Otherwise each bound has an error of 2.5% of its own:

    - A side to which some value is open: the bound of the sign test, which a value may pass by any distance. It is an
      order statistic, and infinite for fewer than six values.
    - The side to which all are closed, while `open` values are open to the other: it rests on the S - open values next
      to it, their mean moved outwards by a multiple of their standard deviation. The multiple is the quantile of
      (mean - mu) / sd of as many outermost values of normal samples of size S, a pivot, as for samples censored at one
      end (Lawless 2003, Statistical models and methods for lifetime data, ch. 5). Open values may lie among them: of
      all places they can have, the worst counts. The bound is concave in each: the ends of its range are enough.
      With fewer than two values left, or more than twelve open ones, this too is the bound of the sign test.

    The estimate is the mean of exact values, otherwise the median where that is known.
    """
    low, high = np.asarray(low, float), np.asarray(high, float)
    if (low == high).all():
        return t_interval(low)
    median = np.median(low) if np.median(low) == np.median(high) else np.nan
    return Interval(median, _lower_bound(low, high), -_lower_bound(-high, -low))


def _lower_bound(low: np.ndarray, high: np.ndarray) -> float:
    size, open_above = len(low), int(np.isposinf(high).sum())
    if np.isneginf(low).any() or size - open_above < 2 or open_above > MOST_PLACED:
        rank = int(binom.ppf(TAIL, size, 0.5)) - 1
        return np.sort(low)[rank] if rank >= 0 else -np.inf
    ends = [(a,) if a == b else (a, b) for a, b in zip(low, high, strict=True)]
    lowest = np.sort(list(itertools.product(*ends)))[:, : size - open_above]
    return (lowest.mean(axis=1) - _pivot_quantile(size, open_above) * lowest.std(axis=1, ddof=1)).min()


@cache
def _pivot_quantile(size: int, without: int) -> float:
    """Quantile 1 - TAIL of mean / sd of all but the largest `without` values of normal samples of a size, simulated."""
    values = np.sort(np.random.default_rng(0).standard_normal((PIVOT_DRAWS, size)))[:, : size - without]
    return float(np.quantile(values.mean(axis=1) / values.std(axis=1, ddof=1), 1 - TAIL))


# --- Curves -------------------------------------------------------------------------------------------------


def falling(level: np.ndarray) -> np.ndarray:
    """The nearest curves that never rise: least-squares isotonic fits of [..., K] over the last axis.

    Neighbours that rise are pooled to their mean (Barlow et al. 1972, Statistical inference under order restrictions),
    so noise does not decide when a curve comes to a level for good: unsmoothed, the last of many noisy visits is late,
    by more where checkpoints lie close. A curve that falls as it is stays as it is. NaN, which only follows values,
    stays.
    """
    return np.apply_along_axis(_falling, -1, np.asarray(level, float))


def _falling(level: np.ndarray) -> np.ndarray:
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
    level, axis = np.broadcast_arrays(falling(level), axis)
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


def speedup_table(metrics: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Every comparison that the studies declare: `speedup.csv`.

    Args:
        metrics: the long table of metrics (`workflow.tables`).
        comparisons: study -> its section `compare` (baseline, candidates, primary, thresholds) with `features`, the
            extractor of the primary comparison.

    Returns:
        For each pair, metric and quantity a row per seed, then one over all seeds (seed empty). Quantities: `average`
        and `final` (advantage in level), `images` and `seconds` (log speed-up at `threshold`). `effect`, `low` and
        `high` are advantages: natural logs for times and where `scale` is "log". The low and high of a seed bound what
        is censored; those over all seeds are the 95% interval. `of_baseline` and `of_candidate` are the metric or the
        time (inf: never there, empty: there before the first trained checkpoint).
    """
    tables = []
    for study, compare in comparisons.items():
        for (features, metric), rows in metrics[metrics["study"] == study].groupby(["features", "metric"], sort=False):
            main = features == compare["features"] and metric == compare["primary"]["metric"]
            for candidate in compare["candidates"]:
                table = compare_pair(rows, compare["baseline"], candidate, compare["thresholds"] if main else None)
                tables.append(table.assign(primary=main and candidate == compare["primary"]["candidate"]))
    return _joined(tables)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of comparisons, any of which may be empty, as one."""
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True)[SPEEDUP_COLUMNS] if filled else pd.DataFrame(columns=SPEEDUP_COLUMNS)


def compare_pair(
    rows: pd.DataFrame, baseline: str, candidate: str, thresholds: Iterable[float] | None = None
) -> pd.DataFrame:
    """One pair of arms in one metric, as in `speedup_table`; no rows where no seed has values of both.

    A seed of which either run diverged is left out of `average` and `final`, and counted; in times it stays, as a run
    that never reaches a threshold. Values that are missing for another reason are left out one by one.

    Args:
        rows: the long table of one study, extractor and metric.
        thresholds: values of the metric. Without them, those at 1/4, 1/2 and 3/4 of the way, in level, from the
            baseline's mean at the first trained checkpoint to its mean at the last. The candidate has no say in them.

    Raises:
        StudyError: the arms share no range of training images.
    """
    pairs = _paired(rows, baseline, candidate)
    if pairs is None:
        return pd.DataFrame(columns=SPEEDUP_COLUMNS)
    whole = ~pairs.lost[:, 0]
    if not thresholds:
        start, end = pairs.levels[whole, 0][:, [0, -1]].mean(axis=0) if whole.any() else (np.nan, np.nan)
        thresholds = from_level(start + np.array(THRESHOLD_SHARES) * (end - start), pairs.metric, pairs.scale)
    by_difficulty = sorted(thresholds, key=lambda value: -to_level(value, pairs.metric, pairs.scale))
    times = [_compare_times(pairs, axis, threshold) for threshold in by_difficulty for axis in ("images", "seconds")]
    return _about(pairs, rows, baseline, candidate, [*_compare_levels(pairs), *times])


def compare_levels(rows: pd.DataFrame, baseline: str, candidate: str) -> pd.DataFrame:
    """As `compare_pair`, without times; empty if runs share no range of images, since a probe may lack any value."""
    try:
        pairs = _paired(rows, baseline, candidate)
    except StudyError:
        pairs = None
    if pairs is None:
        return pd.DataFrame(columns=SPEEDUP_COLUMNS)
    return _about(pairs, rows, baseline, candidate, _compare_levels(pairs))


def changes(probes: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any] | None]) -> pd.DataFrame:
    """What each candidate changes in each metric of the probes: as `speedup_table`, with the column `timesteps`
    ("0-99", "all") for its `features`.

    Args:
        probes: `reports/mechanism.csv`.
        comparisons: study -> its `baseline` and `candidates`; None where nothing is compared.
    """
    tables = [
        compare_levels(rows.rename(columns={"timesteps": "features"}), compare["baseline"], candidate)
        for study, compare in comparisons.items()
        if compare
        for _, rows in probes[probes["study"] == study].groupby(["timesteps", "metric"], sort=False)
        for candidate in compare["candidates"]
    ]
    return _joined(tables).rename(columns={"features": "timesteps"})


class _Pairs(NamedTuple):
    """The runs of S seeds in two arms, over the images that all of them cover."""

    metric: str
    scale: str
    seeds: list[int]
    runs: list[tuple[pd.DataFrame, pd.DataFrame]]
    """Of each seed the baseline's and the candidate's rows, with their `level`."""
    grid: np.ndarray
    """[K] images of the trained checkpoints of any run."""
    levels: np.ndarray
    """[S, 2, K], between the checkpoints of a run linear in images."""
    lost: np.ndarray
    """[S, 2] which runs diverged."""


def _paired(rows: pd.DataFrame, baseline: str, candidate: str) -> _Pairs | None:
    """The pairs of one metric, None if there is none.

    Raises:
        StudyError: they share no range of training images.
    """
    rows = rows[rows["arm"].isin([baseline, candidate]) & (rows["value"].notna() | diverged(rows))]
    metric = "".join(rows["metric"].unique())
    scale = "plain" if metric in SHARES or (rows["value"] <= 0).any() else "log"
    rows = rows.assign(level=to_level(rows["value"], metric, scale)).sort_values("images")
    runs = {key: run for key, run in rows.groupby(["arm", "seed"]) if (run["images"] > 0).any()}
    seeds = sorted(seed for arm, seed in runs if arm == baseline and (candidate, seed) in runs)
    if not seeds:
        return None
    pairs = [(runs[baseline, seed], runs[candidate, seed]) for seed in seeds]
    images = [run["images"] for pair in pairs for run in pair]
    first, last = max(of[of > 0].min() for of in images), min(of.max() for of in images)
    if first > last:
        raise StudyError(
            f"Study '{rows['study'].iloc[0]}': {baseline} and {candidate} share no range of training images, so they "
            "cannot be compared: give them checkpoints over the same images."
        )
    pairs = [tuple(run[run["images"] <= last] for run in pair) for pair in pairs]
    grid = np.unique(np.concatenate([[first, last], *(of[of.between(first, last)] for of in images)]))
    levels = np.array([[np.interp(grid, run["images"], run["level"]) for run in pair] for pair in pairs])
    lost = np.array([[run["level"].isna().any() for run in pair] for pair in pairs])
    return _Pairs(metric, scale, seeds, pairs, grid, levels, lost)


def _about(
    pairs: _Pairs, rows: pd.DataFrame, baseline: str, candidate: str, tables: list[pd.DataFrame]
) -> pd.DataFrame:
    """One table of the quantities of a pair, which says what they are about."""
    about = {name: rows[name].iloc[0] for name in ("study", "features", "metric")}
    about |= {"baseline": baseline, "candidate": candidate, "primary": False, "scale": pairs.scale}
    about |= {"first_images": pairs.grid[0], "last_images": pairs.grid[-1]}
    return pd.concat(tables, ignore_index=True).assign(**about)[SPEEDUP_COLUMNS]


def _compare_levels(pairs: _Pairs) -> list[pd.DataFrame]:
    """Advantages in level, on average and at the end."""
    of_average, of_end = average(pairs.levels, pairs.grid), pairs.levels[..., -1]
    return [_advantage(pairs, "average", of_average), _advantage(pairs, "final", of_end)]


def _advantage(pairs: _Pairs, quantity: str, levels: np.ndarray) -> pd.DataFrame:
    """An advantage in level; `levels` [S, 2], NaN for runs that diverged."""
    advantage = levels[:, 0] - levels[:, 1]
    used = ~np.isnan(advantage)
    mean = levels[used].mean(axis=0) if used.any() else np.full(2, np.nan)
    values = from_level(np.vstack([levels, mean]), pairs.metric, pairs.scale)
    return _table(pairs, quantity, np.nan, values, (advantage, advantage), t_interval(advantage[used]))


def _compare_times(pairs: _Pairs, axis: str, threshold: float) -> pd.DataFrame:
    """Speed-ups at a threshold, a value of the metric; `axis` is "images" or "seconds"."""
    level = to_level(threshold, pairs.metric, pairs.scale)
    times = np.array([[time_to_threshold(run["level"], run[axis], level) for run in pair] for pair in pairs.runs])
    low, high = log_speedup(tuple(times[:, 0].T), tuple(times[:, 1].T))
    seen = np.where(times[..., 0] == 0, np.nan, times[..., 1])  # [S, 2]
    mean = np.exp(np.log(seen).mean(axis=0))
    values = np.vstack([seen, np.where(np.isfinite(mean), mean, np.nan)])
    return _table(pairs, axis, threshold, values, (low, high), censored_interval(low, high))


def _table(
    pairs: _Pairs,
    quantity: str,
    threshold: float,
    values: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    over_seeds: Interval,
) -> pd.DataFrame:
    """A row per seed and one over all seeds. `values` [S + 1, 2] are of both arms, `bounds` [S] of the advantages."""
    low, high = bounds
    used, censored, lost = ~np.isnan(low), low < high, pairs.lost.astype(int)
    return pd.DataFrame(
        {
            "quantity": quantity,
            "threshold": threshold,
            "seed": pd.array([*pairs.seeds, None], dtype="Int64"),
            "of_baseline": values[:, 0],
            "of_candidate": values[:, 1],
            "effect": [*np.where(censored, np.nan, low), over_seeds.estimate],
            "low": [*low, over_seeds.low],
            "high": [*high, over_seeds.high],
            "pairs": [*used.astype(int), used.sum()],
            "censored": [*censored.astype(int), censored.sum()],
            "diverged_baseline": [*lost[:, 0], lost[:, 0].sum()],
            "diverged_candidate": [*lost[:, 1], lost[:, 1].sum()],
        }
    )


def over_seeds(table: pd.DataFrame, quantity: str, threshold: float = np.nan) -> pd.Series:
    """The row over all seeds of a quantity, in the rows of one comparison.

    Raises:
        IndexError: there is none.
    """
    rows = table[(table["quantity"] == quantity) & table["seed"].isna()]
    return rows[(rows["threshold"] == threshold) | (rows["threshold"].isna() & np.isnan(threshold))].iloc[0]


def middle_threshold(table: pd.DataFrame) -> float:
    """The threshold that stands for all in one comparison: the middle one, the easier of two; NaN without any."""
    thresholds = table["threshold"].dropna().unique()  # from easy to hard
    return float(thresholds[(len(thresholds) - 1) // 2]) if len(thresholds) else np.nan


# --- Verdict and noise floor --------------------------------------------------------------------------------


def verdict(average: Mapping[str, Any]) -> str:
    """ "faster", "slower" or "no difference shown", of the row of `average` over all seeds.

    The interval decides, but never in favour of the arm of which more runs diverged.
    """
    if average["low"] > 0 and average["diverged_candidate"] <= average["diverged_baseline"]:
        return "faster"
    if average["high"] < 0 and average["diverged_baseline"] <= average["diverged_candidate"]:
        return "slower"
    return "no difference shown"


def power(effect: float, sd: float, pairs: int) -> float:
    """Chance that the two-sided 5% paired t-test shows an advantage `effect`, when paired differences have this `sd`.

    t squared is F with 1 and pairs - 1 degrees of freedom and noncentrality pairs (effect / sd)^2.

    Args:
        pairs: 2 or more.
    """
    if sd == 0:
        return 1.0
    quantile = student_t.ppf(1 - TAIL, pairs - 1)
    return float(ncf.sf(quantile**2, 1, pairs - 1, pairs * (effect / sd) ** 2))


def detectable(sd: float, pairs: int) -> float:
    """The smallest advantage that so many pairs show with 80% power; infinite for one pair."""
    if pairs < 2:
        return np.inf
    return sd * brentq(lambda ratio: power(ratio, 1, pairs) - POWER, 1e-3, 1e3) if sd else 0.0


def seeds_needed(effect: float, sd: float) -> int:
    """The fewest pairs that show an advantage `effect` with 80% power, at least 2.

    Raises:
        StudyError: that takes more than 10,000.
    """
    counts = range(2, MOST_SEEDS + 1)
    found = bisect.bisect_left(counts, True, key=lambda pairs: power(effect, sd, pairs) >= POWER)
    if found == len(counts):
        raise StudyError(f"An effect of {effect:.2g} takes more than {MOST_SEEDS:,} seeds: name a larger one.")
    return counts[found]


def cautious_sd(sd: float, pairs: int) -> float:
    """The standard deviation that the true one is below with 80% confidence, given that of so many pairs.

    To plan from a pilot by its own sd gives too few seeds more often than not (Browne 1995, On the use of a pilot
    sample for sample size determination, Statistics in Medicine 14).

    Args:
        pairs: 2 or more.
    """
    return sd * float(np.sqrt((pairs - 1) / chi2.ppf(1 - POWER, pairs - 1)))


class Noise(NamedTuple):
    """Standard deviations over seeds of the level averaged over images; NaN for fewer than two pairs."""

    between: float
    """Of the runs of one arm, both arms pooled."""
    paired: float
    """Of the paired differences."""


def noise_floor(table: pd.DataFrame) -> Noise:
    """The noise of one comparison, from its rows of `average` in `speedup_table`."""
    of_seeds = table[(table["quantity"] == "average") & table["seed"].notna() & table["effect"].notna()]
    if len(of_seeds) < 2:
        return Noise(np.nan, np.nan)
    values = of_seeds[["of_baseline", "of_candidate"]].to_numpy(float)
    levels = np.log(values) if (of_seeds["scale"] == "log").all() else values
    return Noise(float(np.sqrt(levels.var(axis=0, ddof=1).mean())), float(of_seeds["effect"].std(ddof=1)))
