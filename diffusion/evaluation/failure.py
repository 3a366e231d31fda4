"""Detection of failed runs: runs that diverged (values are not finite) or collapsed (worse than an untrained net)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FAILURES = ("diverged", "collapsed")
"""Possible first words of the reason that `failure` returns."""
STANDARD_ERRORS = 5  # by which mse must be larger: a short segment measures it with noise
MIN_DEVIATION = 1.0  # grey levels; samples with a smaller standard deviation are nearly equal


def failure(facts: Mapping[str, Any], samples: np.ndarray, images: np.ndarray, untrained_mse: float = 1.0) -> str:
    """Returns the reason why a run has failed at a checkpoint, or "" if the run has not failed there.

    If this checkpoint is the last of the run, the whole run has failed. A run diverged if the loss, a weight or a
    sample is not finite. A run collapsed if one of these conditions holds:

    - The unweighted mse, averaged over the steps since the previous checkpoint, is above that of an untrained net
      by more than 5 standard errors.
    - The samples are nearly equal: the standard deviation over samples, averaged over pixels, is below 1 grey level,
      and below a tenth of the same quantity for the dataset.

    Args:
        facts: facts of the checkpoint: `step`, and `diverged` (the step at which training diverged, or None). After
            step 0, also `mse` and `mse_images`, the number of images over which `mse` is averaged.
        samples: samples, uint8 [N, H, W, 3], as `diffusion.checkpoints.sample_checkpoint` returns them. N is 0 if a
            value of a sample is not finite.
        images: some images of the dataset, uint8 [M, H, W, 3].
        untrained_mse: mse of a net whose output is 0, as an untrained net has it (`NoisePath.untrained_mse`); 1 if the
            net predicts epsilon.
    """
    step, mse = facts["step"], facts.get("mse")
    if facts["diverged"] is not None:
        return f"diverged at step {facts['diverged']}"
    if not len(samples):
        return f"diverged at step {step} (samples are not finite)"
    if mse is not None:
        standard_error = math.sqrt(2 / (facts["mse_images"] * samples[0].size))
        if mse > untrained_mse * (1 + STANDARD_ERRORS * standard_error):
            return f"collapsed at step {step} (mse {mse:.3g}, an untrained net has at most {untrained_mse:g})"
    deviation = _deviation(samples)
    if len(samples) > 1 and deviation < min(MIN_DEVIATION, _deviation(images) / 10):
        return f"collapsed at step {step} (samples differ by {deviation:.2g} grey levels)"
    return ""


def _deviation(images: np.ndarray) -> float:
    """Returns the standard deviation over images, averaged over pixels. Computing row by row needs less memory."""
    return float(np.mean([images[:, row].std(axis=0).mean() for row in range(images.shape[1])]))
