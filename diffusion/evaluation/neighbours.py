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


def precision_recall(features: Features, reference: Features, reference_radii: Features) -> dict[str, Estimate]:
    """Returns improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) with k = 3.

    The radius of an image is the distance to its third nearest neighbour in its own set. Precision is the fraction of
    generated images that are within the radius of at least one reference image. Recall is the fraction of reference
    images that are within the radius of at least one generated image.

    The standard error of precision is that of a proportion. The standard error of recall is not known, because the
    radii of the generated images are random, too.

    Args:
        features: features of generated images, [N, D] with N > 3.
        reference: features of reference images, [M, D].
        reference_radii: `neighbour_radii` of the reference, [M].

    Returns:
        a dict with the estimates "precision" and "recall".
    """
    x, y, x_radii, y_radii = on_one_device(features, reference, neighbour_radii(features), reference_radii)
    precise, recalled = [], torch.zeros_like(y_radii, dtype=torch.bool)
    for distances, radii in zip(_distances(x, y), x_radii.split(BLOCK), strict=True):
        precise.append((distances <= y_radii).any(1))
        recalled |= (distances <= radii[:, None]).any(0)
    hits = torch.cat(precise).double()
    precision = hits.mean().item()
    return {
        "precision": Estimate(
            precision, math.sqrt(precision * (1 - precision) / len(x)), influences=to_numpy(hits - precision)
        ),
        "recall": Estimate(recalled.double().mean().item()),
    }


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
