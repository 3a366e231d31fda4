"""The runs of two arms, paired by seed, over the training images that all of these runs cover."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from convergence.analysis.curves import mean_over_images, to_level
from convergence.analysis.effects import Scale
from convergence.errors import StudyError
from convergence.failures import failed
from convergence.tables import DIFFERENCES, metric_name


class Pairs(NamedTuple):
    """The runs of two arms with S common seeds, over the training images that all of these runs cover.

    A level is a value of the metric on a scale where lower is better, such as the log of FD.
    """

    study: str
    features: str
    metric: str
    baseline: str
    candidate: str
    scale: Scale
    seeds: list[int]
    runs: list[tuple[pd.DataFrame, pd.DataFrame]]
    """Tables (baseline, candidate) of each seed: rows of the long table of metrics, with the added column `level`."""
    images: np.ndarray
    """Training images [K] at which any of the runs has a trained checkpoint, within the range that all runs cover."""
    levels: np.ndarray
    """Levels [S, 2, K] of baseline and candidate. Between the checkpoints of a run, they are linear in training
    images."""
    failed: np.ndarray
    """Whether each run diverged or collapsed, [S, 2]."""
    shortened: int
    """Number of runs with checkpoints after the end of the range that all runs cover."""
    shortest: tuple[str, int]
    """(arm, seed) of a run whose last checkpoint is the end of the range that all runs cover."""

    @property
    def means(self) -> np.ndarray:
        """Levels averaged over training images, [S, 2]; NaN for failed runs."""
        return mean_over_images(self.levels, self.images)


def pair_runs(rows: pd.DataFrame, baseline: str, candidate: str) -> Pairs | None:
    """Pairs the runs of one metric by seed; returns None if no seed has runs of both arms.

    Args:
        rows: the long table of metrics (`convergence.tables`) of one study, feature extractor and metric. Values that
            are not finite count as missing.
        baseline: name of the arm to compare with.
        candidate: name of the arm to judge.

    Raises:
        StudyError: the runs share no range of training images.
    """
    rows = rows[rows["arm"].isin([baseline, candidate]) & (np.isfinite(rows["value"].astype(float)) | failed(rows))]
    if rows.empty:
        return None
    study, features, metric = (rows[name].iloc[0] for name in ("study", "features", "metric"))
    scale: Scale = "difference" if metric in DIFFERENCES or (rows["value"] <= 0).any() else "ratio"
    rows = rows.assign(level=to_level(rows["value"], metric, scale)).sort_values("images")
    runs = {key: run for key, run in rows.groupby(["arm", "seed"]) if (run["images"] > 0).any()}
    seeds = sorted(seed for arm, seed in runs if arm == baseline and (candidate, seed) in runs)
    if not seeds:
        return None
    pairs = [(runs[baseline, seed], runs[candidate, seed]) for seed in seeds]
    checkpoints = {(arm, seed): runs[arm, seed]["images"] for seed in seeds for arm in (baseline, candidate)}
    first = max(images[images > 0].min() for images in checkpoints.values())
    shortest = min(checkpoints, key=lambda run: checkpoints[run].max())
    last = checkpoints[shortest].max()
    if first > last:
        raise StudyError(
            f"Study '{study}': {baseline} and {candidate} share no range of training images with values of "
            f"{metric_name(features, metric)}, so they cannot be compared: give them checkpoints over the same images."
        )
    pairs = [(base[base["images"] <= last], cand[cand["images"] <= last]) for base, cand in pairs]
    within = [images[images.between(first, last)] for images in checkpoints.values()]
    grid = np.unique(np.concatenate([[first, last], *within]))
    return Pairs(
        study=study,
        features=features,
        metric=metric,
        baseline=baseline,
        candidate=candidate,
        scale=scale,
        seeds=[int(seed) for seed in seeds],
        runs=pairs,
        images=grid,
        levels=np.array([[np.interp(grid, run["images"], run["level"]) for run in pair] for pair in pairs]),
        failed=np.array([[run["level"].isna().any() for run in pair] for pair in pairs]),
        shortened=sum(int(images.max() > last) for images in checkpoints.values()),
        shortest=shortest,
    )
