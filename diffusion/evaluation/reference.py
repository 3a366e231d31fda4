"""Evaluation of generated images against real ones, by features that are extracted once per set.

The side of the real images is prepared once as a `Reference`, whose key names all that determines its numbers.
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
from diffusion.errors import InputError
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

SUBSETS_SEED = 0  # of the subsets that "fd_infinity" is extrapolated from


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the metrics need of the real images.

    features: float32 [M, D]. mean: float64 [D] and root: float64 [min(M, D), D], the fitted `Gaussian`. radii: float32
    [M], see `neighbour_radii`. kernel: their `mean_kernel`. held_out_distances: float32 [H], from each held-out image
    to the nearest of the features; empty where nothing is held out, or where the reference is what is held out. key:
    the names and hashes that determine these numbers, see `reference_key`.
    """

    features: np.ndarray
    mean: np.ndarray
    root: np.ndarray
    radii: np.ndarray
    kernel: float
    held_out_distances: np.ndarray
    key: dict[str, Any]

    @property
    def gaussian(self) -> Gaussian:
        """Mean [D] and root of the covariance [R, D], float64."""
        return Gaussian(torch.from_numpy(self.mean), torch.from_numpy(self.root))

    def save(self, path: str | Path) -> None:
        """Writes the reference to an npz file, whole or not at all."""
        with atomic_write(Path(path)) as file:
            np.savez(file, **{**vars(self), "key": json.dumps(self.key)})


def reference_of(features: np.ndarray, key: dict[str, Any], held_out_features: np.ndarray | None = None) -> Reference:
    """The reference that consists of features [M, D], and those of held-out images, [H, D], which tell copies.

    Raises:
        InputError: there are fewer than two features.
    """
    mean, root = fit_gaussian(features)
    few = len(features) <= NEIGHBOURS
    radii = np.full(len(features), np.nan, np.float32) if few else neighbour_radii(features)
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
    """What determines the numbers of a reference: the images, which of them, and the extractor.

    Args:
        part: "train" takes the images that training sees, "held_out" those kept from it: see `diffusion.data.arrays.split`.
        held_out: how many are kept.
        count: so many of that part, the first of a permutation drawn from seed; None takes all.
    """
    which = {"dataset_sha256": dataset_sha256, "part": part, "held_out": held_out, "count": count, "seed": seed}
    return which | extractor.identity


def make_reference(images: np.ndarray, extractor: Extractor, key: dict[str, Any]) -> Reference:
    """The reference of images uint8 [N, H, W, 3] that its `reference_key` describes.

    Raises:
        InputError: that part has fewer images than `count`, or than two; or as `extract_features` does.
    """
    training, kept = split(len(images), key["held_out"])
    indices = training if key["part"] == "train" else kept
    count = len(indices) if key["count"] is None else key["count"]
    if not 2 <= count <= len(indices):
        raise InputError(
            f"A reference of {count} images cannot be drawn from {len(indices)} ({key['part']}): ask for 2 to "
            f"{len(indices)} in evaluate.reference_images, or change dataset.held_out."
        )
    # Sorted: read in the order of the file.
    chosen = np.sort(np.random.default_rng(key["seed"]).permutation(indices)[:count])
    features = extract_features(images, extractor, indices=chosen)
    # Copies are told from new images by the images that training did not see.
    tells_copies = key["part"] == "train" and len(kept)
    held_out_features = extract_features(images, extractor, indices=kept) if tells_copies else None
    return reference_of(features, key, held_out_features)


def load_reference(path: str | Path, expected_key: dict[str, Any]) -> Reference:
    """Reads a reference.

    Raises:
        InputError: it is missing, damaged, or of a key other than expected.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in dataclasses.fields(Reference)}
        reference = Reference(**arrays | {"kernel": float(arrays["kernel"]), "key": json.loads(str(arrays["key"]))})
    except FileNotFoundError as error:
        raise InputError(f"There is no reference {path}: run the same command again, which makes it.") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"The reference {path} is damaged ({error}): delete it and run the same command again."
        ) from error
    differing = sorted(
        name for name in expected_key | reference.key if expected_key.get(name) != reference.key.get(name)
    )
    if differing:
        told = "; ".join(f"{name} is {reference.key.get(name)}, not {expected_key.get(name)}" for name in differing)
        raise InputError(
            f"The reference {path} was made for something else ({told}): delete it and run the same command again."
        )
    return reference


class MetricRow(NamedTuple):
    """One metric of `n` generated images, with its standard error (NaN where none is known).

    A value that could not be computed is NaN and `reason` says why; with a value, `reason` says what it rests on.
    """

    metric: str
    value: float
    stderr: float
    n: int
    reason: str


def _both_sides(fewest: int) -> Callable[[int, Reference], str]:
    def reason(n: int, reference: Reference) -> str:
        m = len(reference.features)
        return "" if min(n, m) >= fewest else f"needs {fewest} images, got {n} and {m} real ones"

    return reason


def _full_rank(n: int, reference: Reference) -> str:
    dimensions = reference.features.shape[1]
    # Half of the images is the smallest set that the line is fitted to.
    return "" if n // 2 > dimensions else f"needs more than {2 * dimensions + 1:,} images, got {n:,}"


def _holds_out(n: int, reference: Reference) -> str:
    if not len(reference.held_out_distances):
        return "needs dataset.held_out, and the reference train"
    return _both_sides(2)(n, reference)


Compute = Callable[[np.ndarray, Reference], dict[str, Estimate]]

# (the metrics that are computed at once; why they cannot be: n, reference -> reason; how: features, reference -> them)
_METRICS: list[tuple[tuple[str, ...], Callable[[int, Reference], str], Compute]] = [
    (("fd",), _both_sides(2), lambda x, of: {"fd": frechet(x, of.gaussian)}),
    (
        ("fd_infinity",),
        _full_rank,
        lambda x, of: {"fd_infinity": frechet_infinity(x, of.gaussian, np.random.default_rng(SUBSETS_SEED))},
    ),
    (("kid",), _both_sides(2), lambda x, of: {"kid": kernel_distance(x, of.features, of.kernel)}),
    (
        ("precision", "recall"),
        _both_sides(NEIGHBOURS + 1),
        lambda x, of: precision_recall(x, of.features, of.radii),
    ),
    (("memorised",), _holds_out, lambda x, of: {"memorised": memorised(x, of.features, of.held_out_distances)}),
]


def evaluate(features: np.ndarray, reference: Reference, metrics: Sequence[str]) -> list[MetricRow]:
    """The metrics of generated features [N, D] against a reference.

    They are "fd", "fd_infinity", "kid", "precision", "recall" and "memorised": see
    `diffusion.evaluation.metrics`. A set too small for a metric, or empty because its run diverged, gives a row with the value
    NaN and the reason.

    Raises:
        InputError: a metric is unknown, D is not that of the reference, or features are NaN or infinite.
    """
    known = [name for names, *_ in _METRICS for name in names]
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise InputError(f"evaluate.metrics names '{unknown[0]}', which is no metric: choose from {', '.join(known)}.")
    n = len(features)
    if n and features.shape[1:] != reference.features.shape[1:]:
        raise InputError(
            f"Features of shape {list(features.shape)} do not fit a reference of shape "
            f"{list(reference.features.shape)}: delete the older of the two and run the same command again."
        )
    if not np.isfinite(features).all():
        raise InputError("The features hold NaN or infinite numbers: check the images and the extractor's weights.")
    estimates: dict[str, Estimate] = {}
    for names, why_not, compute in _METRICS:
        if not set(names) & set(metrics):
            continue
        reason = why_not(n, reference) if n else "no samples"
        if reason:
            estimates |= dict.fromkeys(names, Estimate(math.nan, note=reason))
        else:
            estimates |= compute(features, reference)
    return [MetricRow(name, estimates[name].value, estimates[name].stderr, n, estimates[name].note) for name in metrics]
