"""Metrics against closed forms, torch-fidelity, scipy, brute force; the extractor against its raw self."""

import hashlib
import logging
import math
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

import diffusion.evaluation as evaluation
from diffusion import StudyError
from diffusion.evaluation import (
    LITE0,
    EfficientNetLite0,
    Reference,
    evaluate,
    extract_features,
    fold_batch_norms,
    frechet_distance,
    load_extractor,
    load_reference,
    make_reference,
    reference_key,
)


def correlated(n: int, d: int, seed: int) -> np.ndarray:
    """Features [n, d] float32 with a mean, and a spectrum over three decades as real features have."""
    mixing = np.random.default_rng(99).standard_normal((d, d)) * np.logspace(0, -3, d)[:, None]
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ mixing + rng.random(d)).astype(np.float32)


def scenes(n: int, seed: int, size: int = 32) -> np.ndarray:
    """Images uint8 [n, size, size, 3]: a coloured disc and a bar on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((n, size, size, 3), np.uint8)
    for image in images:
        colours = rng.random((3, 3))
        canvas = colours[0] * (x * rng.random() + y * rng.random())[..., None]
        canvas[(x - rng.random()) ** 2 + (y - rng.random()) ** 2 < 0.06] = colours[1]
        canvas[np.abs(x - rng.random()) < 0.05] = colours[2]
        image[:] = (canvas.clip(0, 1) * 255).round()
    return images


def reference_of(features: np.ndarray) -> Reference:
    mean, root = evaluation._moments(features)
    return Reference(features, mean.numpy(), root.numpy(), {})


def values(features: np.ndarray, reference: Reference, *metrics: str) -> list[float]:
    return [row.value for row in evaluate(features, reference, metrics)]


@pytest.fixture(scope="module")
def extractor():
    return load_extractor(LITE0, "cpu")


@pytest.fixture(scope="module")
def real():
    return scenes(48, seed=0)


@pytest.fixture(scope="module")
def real_features(real, extractor):
    return extract_features(real, extractor)


# Frechet distance


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 64), (40, 300, 64), (300, 40, 64), (40, 30, 64)])
def test_fd_agrees_with_torch_fidelity(n, m, d):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a, b = correlated(n, d, seed=0), 1.3 * correlated(m, d, seed=1) + np.float32(0.2)
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert values(a, reference_of(b), "fd") == [pytest.approx(expected, rel=1e-6)]


def test_fd_agrees_with_the_matrix_square_root():
    a, b = correlated(500, 20, seed=0).astype(float), correlated(400, 20, seed=1).astype(float) * 1.5
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    expected = mean + np.trace(s_a + s_b - 2 * scipy.linalg.sqrtm(s_a @ s_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [30, 500])
def test_fd_closed_forms(n):
    x = correlated(n, 100, seed=0).astype(np.float64)
    assert frechet_distance(x, x) < 1e-6
    assert frechet_distance(x, x + 0.1) == pytest.approx(0.01 * 100, rel=1e-9)
    expected = np.square(x.mean(0)).sum() + x.var(0, ddof=1).sum()
    assert frechet_distance(x, 2 * x) == pytest.approx(expected, rel=1e-9)


def test_fd_of_features_that_never_vary():
    x = correlated(300, 40, seed=0)
    x[:, ::2] = 1.0
    assert frechet_distance(x, x) < 1e-6


def test_fd_is_symmetric_and_ignores_order():
    a, b = correlated(50, 64, seed=0), correlated(200, 64, seed=1)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(a))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, shuffled), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4)), "N >= 2"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "4 and 3 dimensions"),
        (np.full((5, 4), np.nan), np.zeros((5, 4)), "NaN"),
    ],
)
def test_fd_refuses(a, b, told):
    with pytest.raises(StudyError, match=told):
        frechet_distance(a, b)


# Extractors


@pytest.mark.parametrize(("size", "kernel", "stride"), [(224, 3, 2), (56, 5, 2), (14, 5, 2), (28, 5, 1)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    generator = torch.Generator().manual_seed(0)
    conv = evaluation._SameConv2d(2, 3, kernel, stride)
    x = torch.randn(1, 2, size, size, generator=generator)
    total = (math.ceil(size / stride) - 1) * stride + kernel - size
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, stride=stride))


def test_lite0_recognises_a_photograph(extractor):
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = np.asarray(Image.open(file).convert("RGB"))
    side = min(photograph.shape[:2])
    top = (photograph.shape[0] - side) // 2
    features = extract_features(photograph[None, top : top + side, :side], extractor)
    assert extractor._fc(torch.from_numpy(features)).argmax() == 652  # ImageNet: military uniform


def test_folding_keeps_the_features(real):
    net = EfficientNetLite0().eval()
    net.load_state_dict(torch.load(evaluation.lite0_weights(), weights_only=True))
    images = torch.from_numpy(real[:4]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = net(images)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fold_batch_norms(net).modules())
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batches_or_storage(real, real_features, extractor, tmp_path):
    np.save(tmp_path / "images.npy", real)
    stored = np.load(tmp_path / "images.npy", mmap_mode="r")
    indices = [5, 40, 7, 8, 9]
    features = extract_features(stored, extractor, batch_size=3, indices=indices)
    assert features.dtype == np.float32 and features.shape == (5, 1280)
    np.testing.assert_allclose(features, real_features[indices], rtol=1e-4, atol=1e-4)


def test_features_of_no_image(real, extractor):
    assert extract_features(real[:0], extractor).shape == (0, 1280)


@pytest.mark.parametrize("images", [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)])
def test_features_refuse_other_images(images, extractor):
    with pytest.raises(StudyError, match="uint8"):
        extract_features(images, extractor)


def test_features_are_computed_without_tf32(real):
    class Precision(nn.Linear):
        def forward(self, x):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            return super().forward(x.float().mean((2, 3)))

    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    extract_features(real[:1], Precision(3, 1))
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_progress_is_logged(real, extractor, monkeypatch, caplog):
    monkeypatch.setattr(evaluation, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "diffusion.evaluation"):
        extract_features(real[:4], extractor, batch_size=2)
    assert [record.getMessage().split(" images")[0] for record in caplog.records] == [
        "features of 2/4",
        "features of 4/4",
    ]


def test_altered_weights_are_refused(monkeypatch):
    monkeypatch.setattr(evaluation, "LITE0_SHA256", "0" * 64)
    with pytest.raises(StudyError, match="sha256"):
        load_extractor(LITE0, "cpu")


def test_lite0_does_without_torch_fidelity():
    program = """if True:
        import sys, numpy as np
        from diffusion.evaluation import evaluate, extract_features, load_extractor, make_reference
        images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
        reference = make_reference(images, "efficientnet-lite0", 4, "", "cpu")
        features = extract_features(images, load_extractor("efficientnet-lite0", "cpu"))
        assert evaluate(features, reference, ["fd"])[0].value < 1e-6
        assert not {"torch_fidelity", "torchvision", "scipy"} & sys.modules.keys()
    """
    root = Path(evaluation.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def test_registered_extractors_of_torch_fidelity(real):
    import torch_fidelity

    class Pixels(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            if name == "pixels-offline":
                raise urllib.error.URLError("no route")
            self.scale = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.mean((2, 3), dtype=torch.float32) * self.scale,)

        @staticmethod
        def get_provided_features_list():
            return ("mean",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "mean"

    for name in ("pixels", "pixels-offline"):
        torch_fidelity.register_feature_extractor(name, Pixels)
    extractor = load_extractor("pixels", "cpu")
    expected = real.mean((1, 2)) / 2
    np.testing.assert_allclose(extract_features(real, extractor), expected, rtol=1e-5)
    assert extractor.identity["extractor"] == "pixels/mean"
    with pytest.raises(StudyError, match="'pixels-offline' could not be loaded.*no route"):
        load_extractor("pixels-offline", "cpu")
    with pytest.raises(StudyError, match="'pixel'.*efficientnet-lite0, inception-v3-compat"):
        load_extractor("pixel", "cpu")


# The reference


def test_reference_survives_saving(real, real_features, extractor, tmp_path):
    sha256 = hashlib.sha256(real.tobytes()).hexdigest()
    reference = make_reference(real, LITE0, 12, sha256, "cpu")
    chosen = np.sort(np.random.default_rng(0).permutation(len(real))[:12])
    np.testing.assert_allclose(reference.features, real_features[chosen], rtol=1e-4, atol=1e-4)
    covariance = np.cov(reference.features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(reference.root.T @ reference.root, covariance, atol=1e-9)

    path = tmp_path / "reference.npz"
    reference.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = load_reference(path, reference_key(extractor, sha256, 12))
    assert again.key == reference.key
    assert again.key["extractor"] == LITE0 and again.key["weights_sha256"] == evaluation.LITE0_SHA256
    for name in ("features", "mean", "root"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reference, name))

    changed = real.copy()
    changed[0, 0, 0, 0] ^= 1
    for key, told in [
        (reference_key(extractor, hashlib.sha256(changed.tobytes()).hexdigest(), 12), "dataset_sha256"),
        (reference_key(extractor, sha256, 13), "count is 12, not 13"),
        (reference_key(extractor, sha256, 12, seed=1), "seed"),
        (reference.key | {"extractor": "inception-v3-compat/2048"}, "extractor"),
        (reference.key | {"more": "1"}, "more"),
    ]:
        with pytest.raises(StudyError, match=told):
            load_reference(path, key)


def test_damaged_references_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(StudyError, match="does not exist"):
        load_reference(path, {})
    reference_of(correlated(20, 8, seed=0)).save(path)
    load_reference(path, {})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for damaged in (b"", whole[: len(whole) // 2], b"\0" * len(whole), bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(StudyError, match="damaged"):
            load_reference(path, {})


@pytest.mark.parametrize("count", [0, 49])
def test_reference_needs_enough_images(real, count):
    with pytest.raises(StudyError, match=f"{count} images cannot be drawn from 48"):
        make_reference(real, LITE0, count, "", "cpu")


# Metrics


def test_distances_grow_with_damage(real, real_features, extractor):
    reference = reference_of(real_features)
    noise = np.random.default_rng(0).standard_normal(real.shape)
    damaged = [(real + level * noise).clip(0, 255).astype(np.uint8) for level in (8, 60)]
    rows = [
        values(x, reference, "fd", "kid") for x in (real_features, *(extract_features(d, extractor) for d in damaged))
    ]
    fd, kid = zip(*rows, strict=True)
    assert fd[0] < 1e-6 and fd[0] < fd[1] < fd[2]
    assert kid[0] < kid[1] < kid[2]


def test_kid_is_the_unbiased_cubic_mmd():
    x, y = correlated(40, 16, seed=0).astype(float), correlated(40, 16, seed=1).astype(float) + 0.3
    within = [(a @ b / 16 + 1) ** 3 for z in (x, y) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
    between = [(a @ b / 16 + 1) ** 3 for a in x for b in y]
    expected = np.sum(within) / (40 * 39) - 2 * np.mean(between)
    (kid,) = values(x.astype(np.float32), reference_of(y.astype(np.float32)), "kid")
    assert kid == pytest.approx(expected, rel=1e-3)


def test_kid_draws_its_subsets_from_the_seed():
    features, reference = correlated(50, 8, seed=0), reference_of(correlated(30, 8, seed=1))
    first, again, other = (evaluate(features, reference, ["kid"], seed)[0].value for seed in (1, 1, 2))
    assert first == again != other


def test_precision_and_recall_by_brute_force():
    rng = np.random.default_rng(0)
    fake, real = (
        rng.standard_normal((60, 3)).astype(np.float32),
        2 * rng.standard_normal((50, 3)).astype(np.float32),
    )

    def covered(points, centres):
        radius = [np.sort(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([(np.linalg.norm(centres - p, axis=1) <= radius).any() for p in points])

    precision, recall = values(fake, reference_of(real), "precision", "recall")
    assert precision == pytest.approx(covered(fake, real)) and recall == pytest.approx(covered(real, fake))
    assert 0 < recall < precision


def test_a_collapsed_model_has_precision_without_recall():
    real = correlated(400, 8, seed=0)
    precision, recall = values(np.repeat(real[:20], 20, axis=0), reference_of(real), "precision", "recall")
    assert precision > 0.95 and recall < 0.2


def test_rows_come_in_the_order_asked_for(capsys):
    x = correlated(30, 8, seed=0)
    rows = evaluate(x, reference_of(x), ["recall", "kid", "fd", "precision"])
    assert [row.metric for row in rows] == ["recall", "kid", "fd", "precision"]
    assert all(row.n == 30 and row.reason == "" and math.isnan(row.stderr) for row in rows)
    assert rows[0].value == rows[3].value == 1 and rows[1].value < 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("n", "reasons"),
    [
        (0, ["no samples"] * 3),
        (1, ["needs 2 images, got 1 and 30 real ones"] * 2 + ["needs 4 images, got 1 and 30 real ones"]),
        (3, ["", "", "needs 4 images, got 3 and 30 real ones"]),
    ],
)
def test_a_set_too_small_says_so(n, reasons):
    rows = evaluate(correlated(n, 8, seed=0), reference_of(correlated(30, 8, seed=1)), ["fd", "kid", "recall"])
    assert [row.reason for row in rows] == reasons
    assert [math.isnan(row.value) for row in rows] == [bool(reason) for reason in reasons]
    assert all(row.n == n for row in rows)


def test_evaluate_refuses():
    x = correlated(30, 8, seed=0)
    with pytest.raises(StudyError, match="'fid'.*fd, kid, precision, recall"):
        evaluate(x, reference_of(x), ["fid"])
    with pytest.raises(StudyError, match="do not fit"):
        evaluate(x[:, :7], reference_of(x), ["kid"])
    with pytest.raises(StudyError, match="infinite"):
        evaluate(np.where(x > x.max() - 1e-6, np.inf, x), reference_of(x), ["precision"])
