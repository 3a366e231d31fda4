"""References and their keys; the rows of an evaluation: order, reasons, errors."""

import hashlib
import math

import numpy as np
import pytest
import torch
from made import correlated
from torch import nn

import diffusion.evaluation.weights as weights
from diffusion.data.arrays import split
from diffusion.errors import FileError, InputError
from diffusion.evaluation.extractors import extract_features
from diffusion.evaluation.metrics import mean_kernel
from diffusion.evaluation.neighbours import neighbour_radii
from diffusion.evaluation.reference import evaluate, load_reference, make_reference, reference_key, reference_of
from diffusion.evaluation.weights import LITE0


def values(features: np.ndarray, reference, *metrics: str) -> list[float]:
    return [row.value for row in evaluate(features, reference, metrics)]


class Pixels(nn.Module):
    """A fast extractor: 12 features per image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.identity = {"extractor": "pixels", "weights_sha256": "1", "resize": "none", "normalisation": "none"}

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) * self.scale


# The reference


def test_a_saved_reference_is_loaded_only_with_its_key(real, real_features, extractor, tmp_path):
    sha256 = hashlib.sha256(real.tobytes()).hexdigest()
    reference = make_reference(real, extractor, reference_key(extractor, sha256, count=12))
    chosen = np.sort(np.random.default_rng(0).permutation(len(real))[:12])
    np.testing.assert_allclose(reference.features, real_features[chosen], rtol=1e-4, atol=1e-4)
    covariance = np.cov(reference.features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(reference.root.T @ reference.root, covariance, atol=1e-9)
    np.testing.assert_array_equal(reference.radii, neighbour_radii(reference.features))
    assert reference.kernel == mean_kernel(reference.features) and len(reference.held_out_distances) == 0

    path = tmp_path / "reference.npz"
    reference.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = load_reference(path, reference_key(extractor, sha256, count=12))
    assert again.key == reference.key and again.kernel == reference.kernel
    assert again.key["extractor"] == LITE0 and again.key["weights_sha256"] == weights.LITE0_SHA256
    for name in ("features", "mean", "root", "radii", "held_out_distances"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reference, name))

    changed = real.copy()
    changed[0, 0, 0, 0] ^= 1
    for key, difference in [
        (reference_key(extractor, hashlib.sha256(changed.tobytes()).hexdigest(), count=12), "dataset_sha256"),
        (reference_key(extractor, sha256, count=13), "count is 12, not 13"),
        (reference_key(extractor, sha256), "count is 12, not None"),
        (reference_key(extractor, sha256, count=12, seed=1), "seed"),
        (reference_key(extractor, sha256, count=12, held_out=4), "held_out"),
        (reference_key(extractor, sha256, "held_out", count=12), "part is train, not held_out"),
        (reference.key | {"extractor": "inception-v3-compat/2048"}, "extractor"),
        (reference.key | {"weights_sha256": "0" * 64}, "weights_sha256"),
        (reference.key | {"normalisation": "(x - 128) / 128"}, "normalisation"),
        (reference.key | {"more": "1"}, "more"),
    ]:
        with pytest.raises(FileError, match=f"^{path}: .*{difference}") as caught:
            load_reference(path, key)
        assert caught.value.path == path


def test_references_of_the_training_and_of_the_held_out_images(real):
    training, held_out = split(len(real), 10)
    assert sorted([*training, *held_out]) == list(range(48)) and len(held_out) == 10
    assert set(held_out) < set(split(len(real), 11)[1])
    pixels = Pixels()
    all_features = extract_features(real, pixels)
    unseen = make_reference(real, pixels, reference_key(pixels, "", "held_out", held_out=10))
    np.testing.assert_array_equal(unseen.features, all_features[held_out])
    assert len(unseen.held_out_distances) == 0
    seen = make_reference(real, pixels, reference_key(pixels, "", held_out=10))
    np.testing.assert_array_equal(seen.features, all_features[training])
    np.testing.assert_array_equal(
        seen.held_out_distances, neighbour_radii(all_features[held_out], all_features[training], k=1)
    )
    (row,) = evaluate(seen.features[:20], seen, ["memorised"])
    assert row.value > 0.95 and row.reason == ""
    (row,) = evaluate(seen.features[:20], unseen, ["memorised"])
    assert math.isnan(row.value) and "needs held-out images" in row.reason


def test_damaged_references_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(FileError, match="reference.npz: does not exist"):
        load_reference(path, {})
    reference_of(correlated(20, 8, seed=0), {}).save(path)
    load_reference(path, {})
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 1
    for damaged in (b"", content[: len(content) // 2], b"\0" * len(content), bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="reference.npz: is damaged"):
            load_reference(path, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "^0 reference images cannot be drawn from the 48 .*choose a number from 2 to 48"),
        ({"count": 49}, "^49 reference images cannot be drawn from the 48 "),
        ({"count": 40, "held_out": 10}, "^40 reference images cannot be drawn from the 38 "),
        ({"part": "held_out", "held_out": 1}, "^1 reference images cannot be drawn from the 1 .*change held_out"),
        ({"held_out": 48}, "held_out is 48.*lower"),
    ],
)
def test_a_reference_needs_enough_images(real, arguments, message):
    with pytest.raises(InputError, match=message):
        make_reference(real, Pixels(), reference_key(Pixels(), "", **arguments))


# The rows


def test_distances_grow_with_damage(real, real_features, extractor):
    reference = reference_of(real_features, {})
    noise = np.random.default_rng(0).standard_normal(real.shape)
    damaged = [(real + level * noise).clip(0, 255).astype(np.uint8) for level in (8, 60)]
    rows = [
        values(x, reference, "fd", "kid") for x in (real_features, *(extract_features(d, extractor) for d in damaged))
    ]
    fd, kid = zip(*rows, strict=True)
    assert fd[0] < 1e-6 and fd[0] < fd[1] < fd[2]
    assert kid[0] < kid[1] < kid[2]


def test_rows_are_in_the_order_of_the_metrics(capsys):
    x = correlated(30, 8, seed=0)
    near = reference_of(x + np.float32(1e-4), {})
    rows = evaluate(x, near, ["recall", "fd_infinity", "kid", "fd", "precision"])
    assert [row.metric for row in rows] == ["recall", "fd_infinity", "kid", "fd", "precision"]
    assert all(row.n == 30 for row in rows)
    unknown_error = "no standard error: the estimate of the variance is not positive"
    assert [row.reason for row in rows] == ["", "extrapolated from 15 to 30 samples", unknown_error, "", ""]
    assert [math.isnan(row.stderr) for row in rows] == [True, False, True, False, False]
    assert rows[0].value == rows[4].value == 1 and rows[2].value < 0
    assert capsys.readouterr() == ("", "")


def test_a_set_compared_with_itself_has_no_standard_errors():
    x = correlated(30, 8, seed=0)
    rows = {
        row.metric: row for row in evaluate(x, reference_of(x, {}), ["fd", "kid", "precision", "recall", "coverage"])
    }
    assert all(math.isnan(row.stderr) for row in rows.values())
    assert rows["fd"].value == pytest.approx(0, abs=1e-6) and rows["precision"].value == rows["coverage"].value == 1
    assert {row.reason for row in rows.values()} == {"no standard error: both sets are the same"}


def test_equal_features_give_equal_rows():
    x, reference = correlated(40, 8, seed=0), reference_of(correlated(30, 8, seed=1), {})
    every = ["fd", "fd_infinity", "kid", "precision", "density", "coverage"]
    rows, again = (evaluate(x, reference, every) for _ in range(2))
    assert [row[:-1] for row in rows] == [row[:-1] for row in again]
    np.testing.assert_array_equal([row.influences for row in rows], [row.influences for row in again])


@pytest.mark.parametrize(
    ("n", "reasons"),
    [
        (0, ["no samples"] * 5),
        (
            1,
            [
                *["needs 2 images, got 1 and 30 real ones"] * 2,
                *["needs 4 images, got 1 and 30 real ones"] * 2,
                "needs more than 17 images, got 1",
            ],
        ),
        (3, ["", "", *["needs 4 images, got 3 and 30 real ones"] * 2, "needs more than 17 images, got 3"]),
        (17, ["", "", "", "", "needs more than 17 images, got 17"]),
        (18, ["", "", "", "", "extrapolated from 9 to 18 samples"]),
    ],
)
def test_a_set_too_small_for_a_metric_has_a_reason(n, reasons):
    reference = reference_of(correlated(30, 8, seed=1), {})
    rows = evaluate(correlated(n, 8, seed=0), reference, ["fd", "kid", "recall", "coverage", "fd_infinity"])
    assert [row.reason for row in rows] == reasons
    missing = [bool(reason) and not reason.startswith("extrapolated") for reason in reasons]
    assert [math.isnan(row.value) for row in rows] == missing
    assert all(row.n == n for row in rows)


def test_a_small_reference_has_no_recall():
    rows = evaluate(correlated(30, 8, seed=0), reference_of(correlated(3, 8, seed=1), {}), ["fd", "recall"])
    assert rows[0].reason == "" and rows[1].reason == "needs 4 images, got 30 and 3 real ones"


def test_evaluate_refuses_unknown_metrics_and_unfit_features():
    x = correlated(30, 8, seed=0)
    with pytest.raises(
        InputError, match="^metrics: 'fid' is unknown: choose from fd, fd_infinity, kid, precision, recall, density"
    ):
        evaluate(x, reference_of(x, {}), ["fid"])
    with pytest.raises(InputError, match="the features have 7 .*the reference have 8: use the same extractor"):
        evaluate(x[:, :7], reference_of(x, {}), ["kid"])
    with pytest.raises(InputError, match="^features .*infinite"):
        evaluate(np.where(x > x.max() - 1e-6, np.inf, x), reference_of(x, {}), ["precision"])
