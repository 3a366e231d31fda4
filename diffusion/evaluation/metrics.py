"""Distances between two sets of features, each with its standard error: functions of features alone.

Features are float32 [N, D], one row per image. The reference is held fixed: a standard error tells how much the value
would spread over other sets of N generated images, which is what sets the points of a curve apart.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import InputError

BLOCK = 256  # rows of a kernel or distance matrix in memory at once
MOMENT_ROWS = 4096  # features in float64 at once
COLUMNS = 512  # of a covariance at once
SMALL_EIGENVALUE = 1e-10  # of the largest: below, a root has lost too many digits
NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019
INFINITY_POINTS = 15  # as Chong and Forsyth 2020


class Estimate(NamedTuple):
    """A value and its standard error (NaN where none is known), and what is to be said about it."""

    value: float
    stderr: float = math.nan
    note: str = ""


class Gaussian(NamedTuple):
    """Mean [D] and a factor [min(N, D), D] of the covariance S, root^T root = S; both float64."""

    mean: Tensor
    root: Tensor


# Frechet distance


def fit_gaussian(features: np.ndarray | Tensor) -> Gaussian:
    """The Gaussian with the mean and covariance of features [N, D].

    Raises:
        InputError: there are fewer than two features, or NaN or infinite ones.
    """
    x = _checked(features)
    mean = x.mean(0, dtype=torch.float64)
    # A QR decomposition, block by block: a root of S itself would lose half of the digits.
    root = torch.zeros(0, x.shape[1], dtype=torch.float64)
    for centred in _centred(x, mean):
        root = torch.linalg.qr(torch.cat([root, centred]), mode="r").R
    return Gaussian(mean, root / math.sqrt(len(x) - 1))


def frechet(features: np.ndarray, reference: Gaussian) -> Estimate:
    """Frechet distance between a Gaussian fitted to features [N, D] and the reference, with its standard error.

    |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2): Dowson and Landau 1982, eq. 4. In features of
    `inception-v3-compat` this is the FID of Heusel et al. 2017, arXiv 1706.08500. All of it is float64.

    The distance is biased (it falls as N grows), so resampling the images with replacement, which leaves about 63% of
    them, spreads it too widely and off its centre. The standard error is that of the infinitesimal jackknife (Efron
    1982, ch. 6) instead: the standard deviation of the influences of the images, over sqrt(N). It is right where the
    distance stands out from its own noise; where both sets have the same distribution it is sqrt(2) too large.

    Raises:
        InputError: there are fewer than two features, NaN or infinite ones, or D is not that of the reference.
    """
    x = _checked(features)
    distance, influences = _frechet(x, reference, with_influences=True)
    return Estimate(distance, influences.std().item() / math.sqrt(len(x)))


def frechet_distance(features_a: np.ndarray | Tensor, features_b: np.ndarray | Tensor) -> float:
    """The distance of `frechet` between features [N, D] and [M, D], any N and M from 2.

    Raises:
        InputError: as `frechet`.
    """
    return _frechet(_checked(features_a), fit_gaussian(features_b))[0]


def frechet_infinity(features: np.ndarray, reference: Gaussian, rng: np.random.Generator) -> Estimate:
    """The Frechet distance that infinitely many images would have: Chong and Forsyth 2020, arXiv 1911.07023.

    A line in 1/n through the distances of 15 random subsets of n = N/2 ... N images, read at 1/n = 0. The bias is
    linear in 1/n only for covariances of full rank: N must exceed 2 D. The standard error is the infinitesimal
    jackknife's; an image counts as often as the fit's weights say.

    Args:
        features: [N, D].
        rng: chooses the subsets.
    """
    x = _checked(features)
    n = len(x)
    sizes = np.linspace(n // 2, n, INFINITY_POINTS).round().astype(int)
    subsets = [rng.permutation(n)[:size] for size in sizes]
    distances = [_frechet(x[subset], reference)[0] for subset in subsets[:-1]]
    distance, influences = _frechet(x, reference, with_influences=True)
    weights = np.linalg.pinv(np.stack([np.ones(len(sizes)), 1 / sizes], 1))[0]  # of each point in the intercept
    shares = np.zeros(n)
    for subset, weight in zip(subsets, weights, strict=True):
        shares[subset] += weight / len(subset)
    return Estimate(
        float(weights @ [*distances, distance]),
        float(np.linalg.norm(shares * influences.numpy())),
        f"extrapolated from {sizes[0]:,} to {n:,} samples",
    )


def _frechet(x: Tensor, reference: Gaussian, with_influences: bool = False) -> tuple[float, Tensor]:
    """The distance, and the influence [N] of each image on it, of mean zero (empty if not asked for).

    The last trace is the sum of the singular values s of A B^T, for any A, B with A^T A = S_1, B^T B = S_2. They are
    the roots of the eigenvalues of (A B^T)(A B^T)^T where N <= D, of B S_1 B^T otherwise; a root keeps half of the
    digits, so the smallest come from a singular value decomposition in the space of their eigenvectors.

    An image at x moves the distance in proportion to |x - m_1|^2 - (x - m_1)^T T (x - m_1) + 2 (m_1 - m_2)^T (x - m_1),
    T = B^T (B S_1 B^T)^(-1/2) B: the optimal transport from N(0, S_1) to N(0, S_2).

    Raises:
        InputError: features are of another dimension D than the reference.
    """
    if x.shape[1] != len(reference.mean):
        raise InputError(
            f"Features of {x.shape[1]} and {len(reference.mean)} dimensions cannot be compared: use one extractor."
        )
    n = len(x)
    mean = x.mean(0, dtype=torch.float64)
    shift, root = mean - reference.mean, reference.root
    low_rank = n <= x.shape[1]
    if low_rank:
        centred = x - mean
        cross = centred @ root.T / math.sqrt(n - 1)
        variance = centred.square().sum() / (n - 1)
        gram = cross @ cross.T
    else:
        covariance = _covariance(x, mean)
        variance = covariance.trace()
        gram = root @ covariance @ root.T
    traces = shift.square().sum() + variance + root.square().sum()
    if not with_influences:
        # Without vectors it takes half the time, and serves unless some value is too small.
        eigenvalues = torch.linalg.eigvalsh(gram)
        if eigenvalues[0] >= SMALL_EIGENVALUE * eigenvalues[-1]:
            return max((traces - 2 * eigenvalues.sqrt().sum()).item(), 0.0), x.new_empty(0)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    small = eigenvalues <= SMALL_EIGENVALUE * eigenvalues[-1]
    s, vectors, small_vectors = eigenvalues[~small].sqrt(), vectors[:, ~small], vectors[:, small]
    if low_rank:
        small_cross = small_vectors.T @ cross
    else:
        projection = root.T @ small_vectors / math.sqrt(n - 1)
        small_cross = torch.cat([c @ projection for c in _centred(x, mean)])
    nuclear_norm = s.sum() + torch.linalg.svdvals(small_cross).sum()
    distance = max((traces - 2 * nuclear_norm).item(), 0.0)
    if not with_influences:
        return distance, x.new_empty(0)
    if low_rank:
        transported = (n - 1) * vectors.square() @ s
    else:
        # Single precision: a standard error needs three digits, and this is the largest product.
        half_transport = (root.T @ (vectors / s.sqrt())).float()
        transported = torch.cat([(c.float() @ half_transport).square().sum(1) for c in _centred(x, mean)]).double()
    influences = torch.cat([c.square().sum(1) + 2 * c @ shift for c in _centred(x, mean)]) - transported
    return distance, influences - influences.mean()


def _checked(features: np.ndarray | Tensor) -> Tensor:
    x = torch.as_tensor(features).cpu()
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"A covariance needs features [N, D] with N >= 2, not {list(x.shape)}: sample more images.")
    if not x.isfinite().all():
        raise InputError("The features hold NaN or infinite numbers: check the images and the extractor's weights.")
    return x


def _centred(x: Tensor, mean: Tensor) -> Iterator[Tensor]:
    return (rows - mean for rows in x.split(MOMENT_ROWS))


def _covariance(x: Tensor, mean: Tensor) -> Tensor:
    """Unbiased covariance [D, D], float64, of which no copy of all features is made."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for centred in _centred(x, mean):
        # The upper triangle, by blocks of columns: 5/8 of the work at D = 2048.
        for first in range(0, x.shape[1], COLUMNS):
            columns = slice(first, first + COLUMNS)
            total[: columns.stop, columns].addmm_(centred[:, : columns.stop].T, centred[:, columns])
    return (total.triu() + total.triu(1).T) / (len(x) - 1)


# Kernel distance


def mean_kernel(features: np.ndarray) -> float:
    """Mean of the cubic kernel (x.y / D + 1)^3 over pairs of different images among features [N, D], N >= 2."""
    x = torch.from_numpy(features)
    total = sum(_kernel(rows, x).sum(dtype=torch.float64) for rows in x.split(BLOCK))
    return ((total - _own_kernel(x).sum()) / (len(x) * (len(x) - 1))).item()


def kernel_distance(features: np.ndarray, reference: np.ndarray, reference_kernel: float) -> Estimate:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3: Binkowski et al. 2018, arXiv 1801.01401.

    In features of `inception-v3-compat` this is the KID. It is the unbiased estimate from all pairs of features [N, D]
    and reference [M, D], to which a mean over random subsets only adds noise. `reference_kernel` is the reference's
    `mean_kernel`.

    As a function of the generated images it is a U-statistic of h_ij = k(x_i, x_j) - g_i - g_j, with g_i the mean of
    k(x_i, .) over the reference. Its variance is estimated without bias from the pairs of pairs without a common image
    (as Sutherland 2019, arXiv 1906.02104): (4 sum_i r_i^2 - 2 sum_ij h_ij^2) / (N (N-1) (N-2) (N-3)) for centred h with
    row sums r_i. The standard error needs N >= 4; an estimate below 0 counts as 0.
    """
    x, y = torch.from_numpy(features), torch.from_numpy(reference)
    n = len(x)
    g = torch.cat([_kernel(rows, y).mean(1, dtype=torch.float64) for rows in x.split(BLOCK)])
    own = _own_kernel(x) - 2 * g
    sums, squares = torch.empty(n, dtype=torch.float64), 0.0
    for first in range(0, n, BLOCK):
        rows = slice(first, first + BLOCK)
        h = _kernel(x[rows], x).double().sub_(g[rows, None]).sub_(g)
        sums[rows] = h.sum(1) - own[rows]
        squares += torch.linalg.vector_norm(h).square().item()
    u = sums.sum().item() / (n * (n - 1))
    if n < 4:
        return Estimate(u + reference_kernel)
    # With u taken off, h has mean zero, and sums of squares lose n (n - 1) u^2.
    squares -= own.square().sum().item() + n * (n - 1) * u**2
    centred_sums = sums - (n - 1) * u
    variance = (4 * centred_sums.square().sum().item() - 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3))
    return Estimate(u + reference_kernel, math.sqrt(max(variance, 0.0)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _own_kernel(x: Tensor) -> Tensor:
    """k(x_i, x_i) [N], float64."""
    return (torch.linalg.vecdot(x, x) / x.shape[1] + 1).pow(3).double()


# Nearest neighbours


def neighbour_radii(features: np.ndarray, others: np.ndarray | None = None, k: int = NEIGHBOURS) -> np.ndarray:
    """Distance [N] of each of features [N, D] to its k-th nearest among `others` [M, D], by default its own fellows.

    M is at least k, N at least k + 1 among fellows.
    """
    x = torch.from_numpy(features)
    y = x if others is None else torch.from_numpy(others)
    rank = k + (others is None)  # the nearest of its own set is itself
    return torch.cat([torch.cdist(rows, y).kthvalue(rank).values for rows in x.split(BLOCK)]).numpy()


def precision_recall(features: np.ndarray, reference: np.ndarray, reference_radii: np.ndarray) -> dict[str, Estimate]:
    """Improved precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991, with k = 3.

    Precision is the share of features [N, D] within the radius of a reference image, recall the share of reference
    [M, D] within the radius of a feature. `reference_radii` [M] are the reference's `neighbour_radii`. Precision has
    the standard error of a share; recall, whose balls are random themselves, has none.
    """
    x, y, y_radii = (torch.from_numpy(array) for array in (features, reference, reference_radii))
    x_radii = torch.from_numpy(neighbour_radii(features))
    precise, recalled = [], torch.zeros(len(y), dtype=torch.bool)
    for rows, radii in zip(x.split(BLOCK), x_radii.split(BLOCK), strict=True):
        distances = torch.cdist(rows, y)
        precise.append((distances <= y_radii).any(1))
        recalled |= (distances <= radii[:, None]).any(0)
    precision = torch.cat(precise).double().mean().item()
    return {
        "precision": Estimate(precision, math.sqrt(precision * (1 - precision) / len(x))),
        "recall": Estimate(recalled.double().mean().item()),
    }


def memorised(features: np.ndarray, training: np.ndarray, held_out_distances: np.ndarray) -> Estimate:
    """Probability that a sample lies nearer to its nearest training image than a held-out image does to its own.

    1/2 where the model generalises, 1 where it copies; below 1/2 its samples stray from the data. The Mann-Whitney
    statistic of Meehan et al. 2020, arXiv 2004.05675, over the whole space, for features [N, D], training [M, D] and
    the distances [H] of the held-out images. The standard error is that of a mean over the samples.
    """
    distances = neighbour_radii(features, training, k=1)
    ordered = np.sort(held_out_distances)
    # A tie counts half.
    below, up_to = (np.searchsorted(ordered, distances, side) for side in ("left", "right"))
    placements = 1 - (below + up_to) / 2 / len(ordered)
    return Estimate(float(placements.mean()), float(placements.std(ddof=1) / math.sqrt(len(placements))))
