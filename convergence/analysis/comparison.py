"""How much faster an arm converges than another, with what confidence: pure functions of the long table of metrics.

Everything is *paired*: seed k of the candidate against seed k of the baseline. Every effect is an *advantage*,
positive where the candidate is better:

- a metric is taken as a *level*, lower is better: the log of a distance, minus a share (precision, recall). An
  advantage in level is that of the baseline minus that of the candidate;
- a time is the training images, or the training seconds, until the level, smoothed so that it never rises, comes to
  a threshold. An advantage in time is the log of the speed-up, time of the baseline over time of the candidate.

The primary endpoint is the advantage in level, averaged over the images that both arms cover.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from convergence.analysis.curves import average, from_level, log_speedup, time_to_threshold, to_level
from convergence.analysis.intervals import Interval, censored_interval, t_interval
from convergence.errors import StudyError
from convergence.tables import SHARES, diverged
from diffusion.errors import InputError

# Shares of the way, in level, that the baseline goes from its first trained checkpoint to its last.
THRESHOLD_SHARES = (0.25, 0.5, 0.75)

PAIR = ["study", "features", "metric", "baseline", "candidate"]
SPEEDUP_COLUMNS = [
    *PAIR, "primary", "scale", "quantity", "threshold", "seed", "of_baseline", "of_candidate", "effect", "low", "high",
    "pairs", "censored", "diverged_baseline", "diverged_candidate", "first_images", "last_images",
]  # fmt: skip


def speedup_table(metrics: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Every comparison that the studies declare: `speedup.csv`.

    Args:
        metrics: the long table of metrics (`convergence.tables`).
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
    except InputError:
        pairs = None
    if pairs is None:
        return pd.DataFrame(columns=SPEEDUP_COLUMNS)
    return _about(pairs, rows, baseline, candidate, _compare_levels(pairs))


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
