"""The part of the noise of a comparison that comes from the finite number of samples.

Both arms and all checkpoints of a seed are sampled from the same latents. The influence of sample i on the difference
of a pair is therefore a weighted sum of its influences on all values of the pair. The variance of these sums over i,
divided by N, is the variance of the difference over other latents (infinitesimal jackknife, Efron 1982, ch. 6). The
rest of the variance between pairs comes from the seeds.
"""

import numpy as np

from convergence.analysis.curves import mean_over_images


def sampling_sd(influences: np.ndarray, images: np.ndarray) -> float:
    """Returns the standard deviation, over other latents, of a paired difference in average level, pooled over S seeds.

    Args:
        influences: influences of the N samples on the levels of the baseline and of the candidate at K checkpoints,
            [S, 2, K, N]. Each seed has its own latents.
        images: training images [K].
    """
    of_difference = mean_over_images(np.moveaxis(influences[:, 1] - influences[:, 0], 1, 2), images)  # [S, N]
    return float(np.sqrt(of_difference.var(axis=1).mean() / of_difference.shape[1]))
