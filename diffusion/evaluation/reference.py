"""Evaluates generated images against real ones.

Everything that the metrics need of the real images is computed once, as a `Reference`. Its key names all that
determines its numbers.
"""

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.data.arrays import split
from diffusion.errors import FileError, InputError
from diffusion.evaluation.extractors import Extractor, extract_features
from diffusion.evaluation.metrics import (
    NEIGHBOURS,
    Estimate,
    Gaussian,
    fit_gaussian,
    frechet,
    frechet_infinity,
    kernel_distance,
    mean_kernel,
    memorised,
    neighbour_radii,
    precision_recall,
)
from diffusion.files import atomic_write

SUBSETS_SEED = 0  # seed of the subsets of "fd_infinity"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the metrics need of M real images."""

    features: np.ndarray
    """float32 [M, D]."""
    mean: np.ndarray
    """Mean of the fitted `Gaussian`, float64 [D]."""
    root: np.ndarray
    """Root of the covariance of the fitted `Gaussian`, float64 [min(M, D), D]."""
    radii: np.ndarray
    """`neighbour_radii` of the features, float32 [M]; NaN if there are too few images."""
    kernel: float
    """`mean_kernel` of the features."""
    held_out_distances: np.ndarray
    """Distance of each held-out image to the nearest of the features, float32 [H]; empty if no images are held out,
    or if the reference consists of the held-out images."""
    key: dict[str, Any]
    """Names and hashes that determine these numbers: see `reference_key`."""

    @property
    def gaussian(self) -> Gaussian:
        """The fitted Gaussian."""
        return Gaussian(torch.from_numpy(self.mean), torch.from_numpy(self.root))

    def save(self, path: str | Path) -> None:
        """Write the reference to an npz file; after an error there is no file."""
        with atomic_write(Path(path)) as file:
            np.savez(file, **{**vars(self), "key": json.dumps(self.key)})


def reference_of(features: np.ndarray, key: dict[str, Any], held_out_features: np.ndarray | None = None) -> Reference:
    """Compute a reference from the features of its images.

    Args:
        features: float32 [M, D], M at least 2.
        key: What determines the features: see `reference_key`.
        held_out_features: Features of held-out images, float32 [H, D], which "memorised" needs.

    Raises:
        InputError: There are fewer than two images, or values that are NaN or infinite.
    """
    mean, root = fit_gaussian(features)
    too_few = len(features) <= NEIGHBOURS
    radii = np.full(len(features), np.nan, np.float32) if too_few else neighbour_radii(features)
    if held_out_features is None:
        distances = np.zeros(0, np.float32)
    else:
        distances = neighbour_radii(held_out_features, features, k=1)
    return Reference(features, mean.numpy(), root.numpy(), radii, mean_kernel(features), distances, key)


def reference_key(
    extractor: Extractor,
    dataset_sha256: str,
    part: str = "train",
    held_out: int = 0,
    count: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the names, hashes and numbers that determine a reference.

    Args:
        extractor: The feature extractor.
        dataset_sha256: sha256 of the pixels of the dataset.
        part: "train" for the training images, "held_out" for the images held out from training: see
            `diffusion.data.arrays.split`.
        held_out: Number of images that are held out.
        count: Number of images that are drawn at random from the part; None uses all.
        seed: Seed of that draw.
    """
    images = {"dataset_sha256": dataset_sha256, "part": part, "held_out": held_out, "count": count, "seed": seed}
    return images | extractor.identity


def make_reference(images: np.ndarray, extractor: Extractor, key: dict[str, Any]) -> Reference:
    """Compute the reference: the features of some images of a dataset, and their statistics.

    Args:
        images: The dataset, uint8 [N, H, W, 3].
        extractor: The feature extractor.
        key: The result of `reference_key`: its entries `part`, `held_out`, `count` and `seed` select the images.

    Raises:
        InputError: The selected part has fewer than two images, or fewer than `count`; or the images have another
            shape or type.
    """
    training, held_out = split(len(images), key["held_out"])
    indices = training if key["part"] == "train" else held_out
    count = len(indices) if key["count"] is None else key["count"]
    if not 2 <= count <= len(indices):
        raise InputError(
            f"{count} reference images cannot be drawn from the {len(indices)} images of the part {key['part']}: "
            f"choose a number from 2 to {len(indices)}, or change held_out"
        )
    # Sorted, so that the file is read in order.
    drawn = np.sort(np.random.default_rng(key["seed"]).permutation(indices)[:count])
    features = extract_features(images, extractor, indices=drawn)
    needs_held_out = key["part"] == "train" and len(held_out)
    held_out_features = extract_features(images, extractor, indices=held_out) if needs_held_out else None
    return reference_of(features, key, held_out_features)


def load_reference(path: str | Path, expected_key: dict[str, Any]) -> Reference:
    """Load a reference.

    Args:
        path: File that `Reference.save` wrote.
        expected_key: The key that the reference must have.

    Raises:
        FileError: The file is missing or damaged, or has another key.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in dataclasses.fields(Reference)}
        reference = Reference(**arrays | {"kernel": float(arrays["kernel"]), "key": json.loads(str(arrays["key"]))})
    except FileNotFoundError as error:
        raise FileError(path, "does not exist") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise FileError(path, f"is damaged ({error})") from error
    differing = sorted(
        name for name in expected_key | reference.key if expected_key.get(name) != reference.key.get(name)
    )
    if differing:
        differences = "; ".join(
            f"{name} is {reference.key.get(name)}, not {expected_key.get(name)}" for name in differing
        )
        raise FileError(path, f"was computed with other settings ({differences})")
    return reference


# Metrics


class MetricRow(NamedTuple):
    """The value of one metric."""

    metric: str
    """Name of the metric."""
    value: float
    """NaN if it cannot be computed."""
    stderr: float
    """Standard error; NaN if it is not known."""
    n: int
    """Number of generated images."""
    reason: str
    """Why there is no value; with a value, how it was obtained if a reader needs to know."""
    influences: np.ndarray
    """Influence of each generated image on the value, float32 [N]; NaN if it is not known."""


class _Computation(NamedTuple):
    """Metrics that are computed together."""

    metrics: tuple[str, ...]
    obstacle: Callable[[int, Reference], str]
    """Maps the number of generated images and the reference to the reason why the metrics cannot be computed, or ""."""
    compute: Callable[[np.ndarray, Reference], dict[str, Estimate]]
    """Maps features [N, D] and the reference to the estimates by name of the metric."""


def _needs_images(minimum: int) -> Callable[[int, Reference], str]:
    def obstacle(n: int, reference: Reference) -> str:
        m = len(reference.features)
        return "" if min(n, m) >= minimum else f"needs {minimum} images, got {n} and {m} real ones"

    return obstacle


def _needs_full_rank(n: int, reference: Reference) -> str:
    dimensions = reference.features.shape[1]
    # The smallest set of the fit contains half of the images.
    return "" if n // 2 > dimensions else f"needs more than {2 * dimensions + 1:,} images, got {n:,}"


def _needs_held_out(n: int, reference: Reference) -> str:
    if not len(reference.held_out_distances):
        return "needs held-out images, and the training images as the reference"
    return _needs_images(2)(n, reference)


_COMPUTATIONS = [
    _Computation(
        ("fd",),
        _needs_images(2),
        lambda features, reference: {"fd": frechet(features, reference.gaussian)},
    ),
    _Computation(
        ("fd_infinity",),
        _needs_full_rank,
        lambda features, reference: {
            "fd_infinity": frechet_infinity(features, reference.gaussian, np.random.default_rng(SUBSETS_SEED))
        },
    ),
    _Computation(
        ("kid",),
        _needs_images(2),
        lambda features, reference: {"kid": kernel_distance(features, reference.features, reference.kernel)},
    ),
    _Computation(
        ("precision", "recall"),
        _needs_images(NEIGHBOURS + 1),
        lambda features, reference: precision_recall(features, reference.features, reference.radii),
    ),
    _Computation(
        ("memorised",),
        _needs_held_out,
        lambda features, reference: {
            "memorised": memorised(features, reference.features, reference.held_out_distances)
        },
    ),
]


def evaluate(features: np.ndarray, reference: Reference, metrics: Sequence[str]) -> list[MetricRow]:
    """Compute metrics of generated images against a reference.

    Args:
        features: float32 [N, D]; [0, D] if the run diverged.
        reference: The real images.
        metrics: Of "fd", "fd_infinity", "kid", "precision", "recall" and "memorised": see
            `diffusion.evaluation.metrics`.

    Returns:
        A row per metric, in the order of `metrics`. If there are too few images for a metric, its value is NaN and
        the row states the reason. The standard errors hold for a set that is independent of the reference, so they
        are NaN if both sets are the same.

    Raises:
        InputError: A metric is unknown, the features and the reference differ in D, or a value is NaN or infinite.
    """
    known = [name for computation in _COMPUTATIONS for name in computation.metrics]
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise InputError(f"metrics: '{unknown[0]}' is unknown: choose from {', '.join(known)}")
    n = len(features)
    if n and features.shape[1:] != reference.features.shape[1:]:
        raise InputError(
            f"the features have {features.shape[1]} numbers per image, but those of the reference have "
            f"{reference.features.shape[1]}: use the same extractor for both"
        )
    if not np.isfinite(features).all():
        raise InputError("features contain NaN or infinite values: check the images and the weights of the extractor")
    estimates: dict[str, Estimate] = {}
    for computation in _COMPUTATIONS:
        if not set(computation.metrics) & set(metrics):
            continue
        reason = computation.obstacle(n, reference) if n else "no samples"
        if reason:
            estimates |= dict.fromkeys(computation.metrics, Estimate(math.nan, note=reason))
        else:
            estimates |= computation.compute(features, reference)
    if np.array_equal(features, reference.features):
        unknown_error = "no standard error: both sets are the same"
        estimates = {
            name: estimate if math.isnan(estimate.value) else Estimate(estimate.value, note=unknown_error)
            for name, estimate in estimates.items()
        }

    def row(name: str) -> MetricRow:
        value, stderr, note, influences = estimates[name]
        known = np.full(n, math.nan) if influences is None else influences
        return MetricRow(name, value, stderr, n, note, known.astype(np.float32))

    return [row(name) for name in metrics]
