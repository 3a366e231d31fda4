"""Metrics of the distances between images in feature space.

The conventions are those of `diffusion.evaluation.metrics`.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion.evaluation.metrics import BLOCK, Estimate, Features, on_one_device, to_numpy

FEW_ROWS = 25  # between so few rows, torch.cdist subtracts the rows from each other
NEIGHBOURS = 3  # k in Kynkaanniemi et al. 2019


def neighbour_radii(features: Features, others: Features | None = None, k: int = NEIGHBOURS) -> np.ndarray:
    """Returns the distance from each row of features to its k-th nearest neighbour.

    Args:
        features: features, [N, D].
        others: candidates for the neighbours, [M, D] with M >= k. If None, the candidates for a row are the other rows
            of `features` (N > k).
        k: which neighbour: 1 is the nearest.

    Returns:
        distances, float32 [N].
    """
    x, y = on_one_device(features, features if others is None else others)
    rank = k + (others is None)  # within one set, the nearest row is the row itself
    radii = [distances.topk(rank, largest=False).values[:, -1] for distances in _distances(x, y)]
    return to_numpy(torch.cat(radii))


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yields the distances from each block of rows of x to all rows of y, [rows, M].

    The values are those of `torch.cdist`, which would copy y for each block. Between many rows, they follow from one
    matrix product, |a - b|^2 = -2 a.b + |a|^2 + |b|^2, so their absolute error is up to about 1e-3 |a|.
    """
    others = torch.cat([y, torch.ones_like(y[:, :1]), y.square().sum(1, keepdim=True)], 1)
    for rows in x.split(BLOCK):
        if max(len(rows), len(y)) <= FEW_ROWS:
            yield torch.cdist(rows, y)
        else:
            own = torch.cat([rows.mul(-2), rows.square().sum(1, keepdim=True), torch.ones_like(rows[:, :1])], 1)
            yield (own @ others.T).clamp_min_(0).sqrt_()


def fidelity_and_diversity(features: Features, reference: Features, reference_radii: Features) -> dict[str, Estimate]:
    """Returns precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al.
    2020, arXiv 2002.09797), all with k = 3.

    The radius of an image is the distance to its third nearest neighbour in its own set.

    - Precision is the fraction of generated images that are within the radius of at least one reference image.
    - Recall is the fraction of reference images that are within the radius of at least one generated image.
    - Density is the mean number of reference images within whose radius a generated image is, divided by k. The mean is
      about 1 if both sets have the same distribution, and can be larger.
    - Coverage is the fraction of reference images that have at least one generated image within their radius. If both
      sets have the same distribution, the expected value is 1 - C(M - 1, k) / C(M + N - 1, k): 7/8 for N = M.

    Naeem et al. recommend k = 5, for which the last value is 31/32. Here, all four metrics have the same radii.

    The standard errors of precision and density are those of means over the generated images. That of coverage is the
    standard error of the jackknife: 1.0 to 1.8 times the true value in simulations, most where coverage is near 1. The
    standard error of recall is not known, because the radii of the generated images are random, too.

    Args:
        features: features of generated images, [N, D] with N > 3.
        reference: features of reference images, [M, D].
        reference_radii: `neighbour_radii` of the reference, [M].

    Returns:
        a dict with the estimates "precision", "recall", "density" and "coverage".
    """
    x, y, x_radii, y_radii = on_one_device(features, reference, neighbour_radii(features), reference_radii)
    n = len(x)
    hits, recalled = [], torch.zeros_like(y_radii, dtype=torch.bool)
    covering, last_covering = (torch.zeros_like(y_radii, dtype=torch.int64) for _ in range(2))
    for first, distances, radii in zip(range(0, n, BLOCK), _distances(x, y), x_radii.split(BLOCK), strict=True):
        within = distances <= y_radii
        hits.append(within.sum(1))
        covering += within.sum(0)
        last_covering = torch.where(within.any(0), first + within.byte().argmax(0), last_covering)
        recalled |= (distances <= radii[:, None]).any(0)
    counts = torch.cat(hits)
    precise, density = (counts > 0).double(), counts.double() / NEIGHBOURS
    precision = precise.mean().item()
    # Without an image, coverage loses the reference images that only this image covers.
    lost = torch.bincount(last_covering[covering == 1], minlength=n).double() / len(y)
    return {
        "precision": Estimate(
            precision, math.sqrt(precision * (1 - precision) / n), influences=to_numpy(precise - precision)
        ),
        "recall": Estimate(recalled.double().mean().item()),
        "density": _with_stderr(density.mean(), density - density.mean()),
        "coverage": _with_stderr((covering > 0).double().mean(), (n - 1) * (lost - lost.mean())),
    }


def _with_stderr(value: Tensor, influences: Tensor) -> Estimate:
    """Returns a value with the standard error that follows from the influences of the images, [N]."""
    stderr = influences.std().item() / math.sqrt(len(influences))
    return Estimate(value.item(), stderr, influences=to_numpy(influences))


def memorised(features: Features, training: Features, held_out_distances: np.ndarray) -> Estimate:
    """Returns the probability that a generated image is closer to the training images than a held-out image is.

    Both images are compared by the distance to the nearest training image in feature space. The probability is the
    Mann-Whitney statistic of Meehan et al. 2020, arXiv 2004.05675, over the whole feature space. The value is 1/2 if
    the model generalises, and 1 if the model copies training images. Below 1/2, the generated images are farther from
    the training images than the held-out images are. The standard error is that of a mean over the generated images.

    Args:
        features: features of generated images, [N, D].
        training: features of training images, [M, D].
        held_out_distances: distance from each held-out image to the nearest training image, [H].
    """
    distances = neighbour_radii(features, training, k=1)
    ordered = np.sort(held_out_distances)
    # Ties count 1/2.
    below, up_to = (np.searchsorted(ordered, distances, side) for side in ("left", "right"))
    placements = 1 - (below + up_to) / 2 / len(ordered)
    value, stderr = placements.mean(), placements.std(ddof=1) / math.sqrt(len(placements))
    return Estimate(float(value), float(stderr), influences=placements - value)
