"""The part of the noise of a comparison that comes from the finite number N of generated samples.

Both arms and all checkpoints of a seed are sampled from the same latents. The influence of a sample on a value is its
effect on this value to first order. So the influence of sample i on the difference of a pair is a weighted sum of the
influences of sample i on all values of the pair. The variance of these sums over i, divided by N, is the variance of
the difference over other draws of the latents (infinitesimal jackknife, Efron 1982, ch. 6). The rest of the variance
between pairs comes from the seeds.
"""

import numpy as np
import pandas as pd

from convergence.analysis.curves import mean_over_images, to_level
from convergence.analysis.pairs import Pairs


def noise_of_samples(pairs: Pairs) -> float:
    """Returns the standard deviation of the paired difference in average level that comes from the samples.

    The result is NaN if every pair has a failed run, or if a run has no column `influences` (an array [N] per row).
    """
    complete = [pair for pair, failed in zip(pairs.runs, pairs.failed, strict=True) if not failed.any()]
    if not complete or not all(_has_influences(run) for pair in complete for run in pair):
        return np.nan
    return sampling_sd(np.array([[_on_levels(run, pairs) for run in pair] for pair in complete]), pairs.images)


def _has_influences(run: pd.DataFrame) -> bool:
    """Returns whether the influences of a run are known, which are those of the first measured average only."""
    return "influences" in run and not any(isinstance(value, float) for value in run["influences"])


def sampling_sd(influences: np.ndarray, images: np.ndarray) -> float:
    """Returns the standard deviation, over other latents, of a paired difference in average level, pooled over S seeds.

    Args:
        influences: [S, 2, K, N] influences of the N samples on the levels of the baseline and of the candidate at K
            checkpoints. Each seed has its own latents.
        images: training images [K] of the checkpoints.
    """
    of_difference = mean_over_images(np.moveaxis(influences[:, 1] - influences[:, 0], 1, 2), images)  # [S, N]
    return float(np.sqrt(of_difference.var(axis=1).mean() / of_difference.shape[1]))


def _on_levels(run: pd.DataFrame, pairs: Pairs) -> np.ndarray:
    """Returns the influences [K, N] of the samples on the levels of a run, at the training images of `pairs`."""
    values = run["value"].to_numpy()
    slopes = 1 / values if pairs.scale == "ratio" else to_level(np.ones(len(run)), pairs.metric, pairs.scale)
    # Levels are interpolated linearly, so their influences are, too.
    weights = [np.interp(pairs.images, run["images"], checkpoint) for checkpoint in np.diag(slopes)]
    return np.transpose(weights) @ np.stack(run["influences"].to_list())
