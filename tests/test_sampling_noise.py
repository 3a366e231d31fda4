"""The noise of a comparison that comes from the samples: the jackknife against simulations that sample again."""

import math

import numpy as np
import pandas as pd
import pytest
from metric_tables import compare_rows

from convergence.analysis.curves import mean_over_images, to_level
from convergence.analysis.results import Noise
from convergence.analysis.sampling_noise import sampling_sd
from convergence.tables import DIFFERENCES, read_influences
from diffusion.errors import FileError
from diffusion.evaluation.reference import evaluate, reference_of
from diffusion.files import save_npy

IMAGES = np.array([1000.0, 2000.0, 4000.0])
D = 8


def nets(seed: int) -> np.ndarray:
    """Linear nets, [2, K, D, D]: features = latents @ net. Both arms approach the identity, the candidate later."""
    noise = np.random.default_rng(seed).standard_normal((2, len(IMAGES), D, D))
    distance = np.array([[0.8, 0.5, 0.3], [0.9, 0.6, 0.35]])[..., None, None]
    return np.eye(D) * (1 - distance / 2) + distance * noise / np.sqrt(D) / 2


def measure(nets: np.ndarray, latents: np.ndarray, reference, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels [2, K] and the influences of the samples on them, [2, K, N]."""
    scale = "difference" if metric in DIFFERENCES else "ratio"
    rows = [[evaluate(np.float32(latents @ net), reference, [metric])[0] for net in arm] for arm in nets]
    values = np.array([[row.value for row in arm] for arm in rows])
    influences = np.array([[row.influences for row in arm] for arm in rows])
    slope = 1 / values if scale == "ratio" else to_level(np.ones_like(values), metric, scale)
    return to_level(values, metric, scale), influences * slope[..., None]


@pytest.mark.parametrize("metric", ["fd", "kid", "precision", "density", "coverage"])
def test_the_part_of_the_samples_is_the_spread_over_other_latents(metric):
    rng = np.random.default_rng(0)
    reference = reference_of(rng.standard_normal((500, D)).astype(np.float32), {})
    seeds = [nets(seed) for seed in (1, 2)]
    differences, estimates = [], []
    for _ in range(60):
        measured = [measure(net, rng.standard_normal((100, D)), reference, metric) for net in seeds]
        levels = np.array([levels for levels, _ in measured])
        differences.append(mean_over_images(levels[:, 1] - levels[:, 0], IMAGES))
        estimates.append(sampling_sd(np.array([influences for _, influences in measured]), IMAGES))
    truth = np.sqrt(np.var(differences, axis=0, ddof=1).mean())
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(truth, rel=0.25)
    # The noise of one arm is larger: a part of it cancels in the difference.
    alone = np.array([influences for _, influences in measured])
    alone[:, 0] = 0
    assert sampling_sd(alone, IMAGES) > truth


def table(influences: np.ndarray) -> pd.DataFrame:
    """FD of two seeds at three checkpoints; `influences` are on the FD, [seeds, arms, checkpoints, N]."""
    values = {"base": [[90, 60, 40], [92, 58, 41]], "cand": [[95, 66, 45], [94, 60, 47]]}
    rows = [
        {"study": "s", "features": "f", "metric": "fd", "arm": arm, "seed": seed, "step": k + 1, "images": images,
         "value": values[arm][seed][k], "reason": "", "influences": influences[seed, a, k]}
        for a, arm in enumerate(values) for seed in (0, 1) for k, images in enumerate(IMAGES)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_comparison_has_the_noise_of_its_samples():
    influences = np.random.default_rng(0).standard_normal((2, 2, 3, 50))
    rows = table(influences)
    noise = compare_rows(rows).noise
    values = rows["value"].to_numpy().reshape(2, 2, 3).swapaxes(0, 1)  # [seeds, arms, checkpoints]
    on_levels = influences / values[..., None]
    assert noise.samples == pytest.approx(sampling_sd(on_levels, IMAGES))
    # Checkpoints of one arm alone, and a failed pair.
    later = rows[(rows["arm"] == "base") | (rows["step"] != 2)]
    on_levels[:, 1, 1] = (2 * on_levels[:, 1, 0] + on_levels[:, 1, 2]) / 3  # at 2000 images, between 1000 and 4000
    assert compare_rows(later).noise.samples == pytest.approx(sampling_sd(on_levels, IMAGES))
    rows.loc[(rows["seed"] == 1) & (rows["step"] == 3) & (rows["arm"] == "cand"), ["value", "reason"]] = (
        math.nan,
        "diverged",
    )
    one = sampling_sd(influences[:1] / values[:1, ..., None], IMAGES)
    assert compare_rows(rows).noise.samples == pytest.approx(one)
    assert math.isnan(compare_rows(rows.drop(columns="influences")).noise.samples)
    assert math.isnan(compare_rows(rows.assign(value=math.nan, reason="diverged")).noise.samples)


def test_the_rest_of_the_noise_comes_from_the_seeds():
    assert Noise((1.0, 1.0), 0.5, 0.3).seeds == pytest.approx(0.4)
    assert Noise((1.0, 1.0), 0.3, 0.5).seeds == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.unlink(), "is damaged"),
        (lambda path: save_npy(path, np.zeros((2, 5))), r"it is float64 \[2, 5\], not float32 \[2, 5\]"),
        (lambda path: save_npy(path, np.zeros((2, 4), np.float32)), r"float32 \[2, 4\], not float32 \[2, 5\]"),
    ],
)
def test_damaged_influences_are_reported(tmp_path, change, message):
    path = tmp_path / "influences.npy"
    expected = np.arange(10, dtype=np.float32).reshape(2, 5)
    save_npy(path, expected)
    np.testing.assert_array_equal(read_influences(path, 2, 5), expected)
    change(path)
    with pytest.raises(FileError, match=message):
        read_influences(path, 2, 5)


def test_a_checkpoint_without_samples_has_no_influences(tmp_path):
    save_npy(tmp_path / "influences.npy", np.zeros((2, 0), np.float32))
    assert [len(row) for row in read_influences(tmp_path / "influences.npy", 2, 0)] == [0, 0]
