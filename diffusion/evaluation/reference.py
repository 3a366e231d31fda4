"""Evaluation of generated images against real images.

The features and statistics of the real images are computed once and stored as a `Reference`. Each reference has a key.
The key contains everything that determines the numbers of the reference, such as hashes of the dataset and of the
extractor's weights.
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
from torch import Tensor

from diffusion.data.arrays import split
from diffusion.errors import FileError, InputError
from diffusion.evaluation.extractors import Extractor, device_of, extract_features, full_precision
from diffusion.evaluation.metrics import (
    Estimate,
    Gaussian,
    fit_gaussian,
    frechet,
    frechet_infinity,
    kernel_distance,
    mean_kernel,
)
from diffusion.evaluation.neighbours import NEIGHBOURS, fidelity_and_diversity, memorised, neighbour_radii
from diffusion.files import atomic_write

SUBSETS_SEED = 0  # seed of the subsets of "fd_infinity"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Features of M real images, and statistics of these features that the metrics need."""

    features: np.ndarray
    """Features, float32 [M, D]."""
    mean: np.ndarray
    """Mean of the fitted `Gaussian`, float64 [D]."""
    root: np.ndarray
    """Root of the covariance of the fitted `Gaussian`, float64 [min(M, D), D]."""
    radii: np.ndarray
    """`neighbour_radii` of the features, float32 [M]. NaN if there are too few images."""
    kernel: float
    """`mean_kernel` of the features."""
    held_out_distances: np.ndarray
    """Distance from the features of each held-out image to the nearest row of `features`, float32 [H].

    Empty if no images are held out, or if the reference consists of the held-out images.
    """
    key: dict[str, Any]
    """Names and hashes that determine the numbers of this reference. See `reference_key`."""

    @property
    def gaussian(self) -> Gaussian:
        """Gaussian fitted to the features."""
        return Gaussian(torch.from_numpy(self.mean), torch.from_numpy(self.root))

    def save(self, path: str | Path) -> None:
        """Writes the reference to an npz file. If writing fails, no incomplete file remains."""
        with atomic_write(Path(path)) as file:
            np.savez(file, **{**vars(self), "key": json.dumps(self.key)})


@full_precision()
def reference_of(
    features: np.ndarray,
    key: dict[str, Any],
    held_out_features: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Reference:
    """Computes a reference from the features of real images.

    Args:
        features: features, float32 [M, D], M at least 2.
        key: names and hashes that determine the features. See `reference_key`.
        held_out_features: features of held-out images, float32 [H, D]. The metric "memorised" needs these features.
        device: device that computes the statistics.

    Raises:
        InputError: if there are fewer than two images, or if a value is NaN or infinite.
    """
    x = torch.from_numpy(features).to(device)
    mean, root = (moment.cpu().numpy() for moment in fit_gaussian(x))
    radii = np.full(len(x), np.nan, np.float32) if len(x) <= NEIGHBOURS else neighbour_radii(x)
    if held_out_features is None:
        distances = np.zeros(0, np.float32)
    else:
        distances = neighbour_radii(torch.from_numpy(held_out_features).to(device), x, k=1)
    return Reference(features, mean, root, radii, mean_kernel(x), distances, key)


def reference_key(
    extractor: Extractor,
    dataset_sha256: str,
    part: str = "train",
    held_out: int = 0,
    count: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the names, hashes and numbers that determine a reference.

    Args:
        extractor: feature extractor.
        dataset_sha256: SHA-256 digest of the pixels of the dataset.
        part: "train" for the training images, or "held_out" for the images that are held out from training. See
            `diffusion.data.arrays.split`.
        held_out: number of images that are held out.
        count: number of images that are drawn at random from the part. If None, all images of the part are used.
        seed: seed of this random draw.
    """
    images = {"dataset_sha256": dataset_sha256, "part": part, "held_out": held_out, "count": count, "seed": seed}
    return images | extractor.identity


def make_reference(images: np.ndarray, extractor: Extractor, key: dict[str, Any]) -> Reference:
    """Computes a reference: the features of some images of a dataset, and the statistics of these features.

    The device of the extractor computes both.

    Args:
        images: all images of the dataset, uint8 [N, H, W, 3].
        extractor: feature extractor.
        key: result of `reference_key`. The entries `part`, `held_out`, `count` and `seed` select the images.

    Raises:
        InputError: if the selected part has fewer than two images or fewer than `count`, or if the images have another
            shape or dtype.
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
    return reference_of(features, key, held_out_features, device_of(extractor))


def load_reference(path: str | Path, expected_key: dict[str, Any]) -> Reference:
    """Loads a reference from a file.

    Args:
        path: file that `Reference.save` wrote.
        expected_key: key that the reference must have.

    Raises:
        FileError: if the file is missing or damaged, or has another key.
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
    """Value of one metric."""

    metric: str
    """Name of the metric."""
    value: float
    """Value; NaN if the metric cannot be computed."""
    stderr: float
    """Standard error; NaN if the standard error is not known."""
    n: int
    """Number of generated images."""
    reason: str
    """Why the value or its standard error is missing, or how the value was obtained; "" if there is nothing to say."""
    influences: np.ndarray
    """Influence of each generated image on the value, float32 [N]; NaN if the influences are not known."""


class _Computation(NamedTuple):
    """Metrics that are computed together."""

    metrics: tuple[str, ...]
    obstacle: Callable[[int, Reference], str]
    """Function that returns why the metrics cannot be computed, or "".

    The arguments are the number of generated images and the reference.
    """
    compute: Callable[[Tensor, Reference], dict[str, Estimate]]
    """Function that returns a dict from names of metrics to estimates.

    The arguments are the features of generated images, [N, D], on the device that computes, and the reference.
    """


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
        ("precision", "recall", "density", "coverage"),
        _needs_images(NEIGHBOURS + 1),
        lambda features, reference: fidelity_and_diversity(features, reference.features, reference.radii),
    ),
    _Computation(
        ("memorised",),
        _needs_held_out,
        lambda features, reference: {
            "memorised": memorised(features, reference.features, reference.held_out_distances)
        },
    ),
]


@full_precision()
def evaluate(
    features: np.ndarray, reference: Reference, metrics: Sequence[str], device: torch.device | str = "cpu"
) -> list[MetricRow]:
    """Computes metrics that compare generated images with a reference.

    Args:
        features: features of the generated images, float32 [N, D]; [0, D] if the run diverged.
        reference: reference of real images.
        metrics: names of metrics: "fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage" or
            "memorised". See `diffusion.evaluation.metrics` and `diffusion.evaluation.neighbours`.
        device: device that computes the metrics.

    Returns:
        one row per metric, in the order of `metrics`. If a metric cannot be computed, for example from too few images,
        its value is NaN and the row states the reason. Standard errors hold only for images that are independent of the
        reference. Therefore, the standard errors are NaN if both sets are the same.

    Raises:
        InputError: if a metric is unknown, if the features and the reference differ in D, or if a value is NaN or
            infinite.
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
    x = torch.from_numpy(features).to(device)
    estimates: dict[str, Estimate] = {}
    for computation in _COMPUTATIONS:
        if not set(computation.metrics) & set(metrics):
            continue
        reason = computation.obstacle(n, reference) if n else "no samples"
        if reason:
            estimates |= dict.fromkeys(computation.metrics, Estimate(math.nan, note=reason))
        else:
            estimates |= computation.compute(x, reference)
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
