"""Whether a run failed: it diverged (numbers are not finite) or collapsed (it is worse than an untrained net)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FAILURES = ("diverged", "collapsed")
"""The first word of each reason that `failure` returns."""
UNTRAINED_MSE = 1.0  # the untrained net predicts 0, and the mean square of epsilon is 1
STANDARD_ERRORS = 5  # by which mse must be larger: a short segment measures it with noise
MIN_DEVIATION = 1.0  # grey levels; samples with a smaller standard deviation are nearly equal


def failure(facts: Mapping[str, Any], samples: np.ndarray, images: np.ndarray) -> str:
    """Returns why a run failed if this checkpoint is its last, or "".

    A run diverged if its loss, a weight or a sample is not finite. It collapsed if its unweighted mse since the
    checkpoint before is above that of an untrained net, or if its samples are all nearly equal: their standard
    deviation per pixel is below 1 grey level, and below a tenth of that of the dataset.

    Args:
        facts: Of the checkpoint: `step`, `diverged` and, if it was trained, `mse` and `mse_images` (the images that
            `mse` is the mean of).
        samples: uint8 [N, H, W, 3], as `diffusion.checkpoints.sample_checkpoint` returns them.
        images: Some images of the dataset, uint8 [M, H, W, 3].
    """
    step, mse = facts["step"], facts.get("mse")
    if facts["diverged"] is not None:
        return f"diverged at step {facts['diverged']}"
    if not len(samples):
        return f"diverged at step {step} (samples are not finite)"
    if mse is not None:
        standard_error = math.sqrt(2 / (facts["mse_images"] * samples[0].size))
        if mse > UNTRAINED_MSE + STANDARD_ERRORS * standard_error:
            return f"collapsed at step {step} (mse {mse:.3g}, an untrained net has {UNTRAINED_MSE:g})"
    deviation = _deviation(samples)
    if len(samples) > 1 and deviation < min(MIN_DEVIATION, _deviation(images) / 10):
        return f"collapsed at step {step} (samples differ by {deviation:.2g} grey levels)"
    return ""


def _deviation(images: np.ndarray) -> float:
    """Returns the standard deviation over images, averaged over pixels; row by row, to need less memory."""
    return float(np.mean([images[:, row].std(axis=0).mean() for row in range(images.shape[1])]))
