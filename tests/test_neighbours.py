"""Metrics of neighbourhoods against brute force, torch-fidelity and SciPy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from made import correlated

import diffusion.evaluation.neighbours as neighbours
from diffusion.evaluation.neighbours import fidelity_and_diversity, memorised, neighbour_radii


def by_definition(fake: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The four metrics of float64 features, from all differences between rows."""
    (f, r), k = (z.astype(np.float64) for z in (fake, real)), 3
    near = np.linalg.norm(f[:, None] - r, axis=2)
    f_radii, r_radii = (np.sort(np.linalg.norm(z[:, None] - z, axis=2), axis=1)[:, k] for z in (f, r))
    within = near <= r_radii
    return {
        "precision": np.mean([row.any() for row in within]),
        "recall": np.mean([(column <= f_radii).any() for column in near.T]),
        "density": sum(row.sum() for row in within) / (k * len(fake)),
        "coverage": np.mean([column.any() for column in within.T]),
    }


def measured(fake: np.ndarray, real: np.ndarray) -> dict[str, float]:
    estimates = fidelity_and_diversity(fake, real, neighbour_radii(real))
    return {name: estimate.value for name, estimate in estimates.items()}


def normal(n: int, m: int, scale: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(size * rng.standard_normal((count, 3))).astype(np.float32) for count, size in ((n, 1), (m, scale))]


def lattice(n: int, m: int) -> list[np.ndarray]:
    """Points of a small grid: distances are exact in float32, many are equal, and many points are repeated."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, size, (count, 2)).astype(np.float32) for count, size in ((n, 6), (m, 9))]


@pytest.mark.parametrize("rows", [1, 7, 60, 256])
@pytest.mark.parametrize(
    "sets", [normal(60, 50, 2), normal(20, 24, 1), normal(4, 300, 1), normal(300, 40, 0.5), lattice(90, 70)]
)
def test_metrics_are_those_of_the_definition(monkeypatch, sets, rows):
    monkeypatch.setattr(neighbours, "BLOCK", rows)
    found = measured(*sets)
    assert found == pytest.approx(by_definition(*sets), rel=1e-12)
    assert found["precision"] > 0 and 0 < found["coverage"] < 1


@pytest.mark.parametrize("rows", [7, 256])
def test_stderrs_are_those_of_a_proportion_a_mean_and_the_jackknife(monkeypatch, rows):
    monkeypatch.setattr(neighbours, "BLOCK", rows)
    fake, real = normal(60, 50, 2)
    radii, n = neighbour_radii(real), len(fake)
    estimates = fidelity_and_diversity(fake, real, radii)
    precision = estimates["precision"].value
    assert estimates["precision"].stderr == pytest.approx(math.sqrt(precision * (1 - precision) / n))
    assert math.isnan(estimates["recall"].stderr) and estimates["recall"].influences is None
    others = [fidelity_and_diversity(np.delete(fake, i, axis=0), real, radii) for i in range(n)]
    for name in ("precision", "density", "coverage"):
        without = np.array([other[name].value for other in others])
        np.testing.assert_allclose(estimates[name].influences, (n - 1) * (without.mean() - without), atol=1e-12)
    for name in ("density", "coverage"):
        without = np.array([other[name].value for other in others])
        jackknife = math.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
        assert estimates[name].stderr == pytest.approx(jackknife) and jackknife > 0


@pytest.mark.parametrize(
    ("n", "shift", "scale", "largest"), [(30, 0, 1, 1.15), (100, 0.5, 0.7, 1.3), (150, 0, 1, 1.6), (400, 0, 1, 1.9)]
)
def test_stderrs_are_the_standard_deviations_over_sets(n, shift, scale, largest):
    """That of coverage is never too small, and too large where most images are covered."""
    rng, roots = np.random.default_rng(0), np.logspace(0, -1.5, 16)
    real = rng.standard_normal((150, 16)) * roots
    radii = neighbour_radii(real)
    sets = [
        fidelity_and_diversity((scale * rng.standard_normal((n, 16)) + shift) * roots, real, radii) for _ in range(200)
    ]
    ratios = {}
    for name in ("density", "coverage"):
        values, errors = (np.array([estimates[name][i] for estimates in sets]) for i in (0, 1))
        ratios[name] = math.sqrt(np.square(errors).mean()) / values.std(ddof=1)
    assert ratios["density"] == pytest.approx(1, abs=0.15) and 0.9 < ratios["coverage"] < largest


@pytest.mark.parametrize("n", [20, 300])
def test_a_set_covers_itself(n):
    x = correlated(n, 32, seed=0)
    x[:5] = x[5]
    found = measured(x, x)
    assert found["precision"] == found["recall"] == found["coverage"] == 1 and found["density"] >= 1


@pytest.mark.parametrize("n", [250, 500])
def test_equal_distributions_have_the_expected_coverage_and_density(n):
    m, rng = 500, np.random.default_rng(0)
    values = [measured(rng.standard_normal((n, 4)), rng.standard_normal((m, 4))) for _ in range(40)]
    uncovered = math.comb(m - 1, 3) / math.comb(m + n - 1, 3)
    assert np.mean([value["coverage"] for value in values]) == pytest.approx(1 - uncovered, abs=0.01)
    assert np.mean([value["density"] for value in values]) == pytest.approx(1, abs=0.03)


def test_a_missing_mode_halves_coverage_but_not_precision():
    modes = np.repeat([[0.0], [100.0]], 300, axis=0)
    rng = np.random.default_rng(0)
    real, fake = (rng.standard_normal((600, 4)) + modes for _ in range(2))
    both, one = measured(fake, real), measured(fake[:300].repeat(2, axis=0), real)
    assert one["coverage"] == measured(fake[:300], real[:300])["coverage"] / 2
    assert one["coverage"] == pytest.approx(both["coverage"] / 2, abs=0.02) and both["coverage"] > 0.8
    assert one["precision"] == pytest.approx(both["precision"], abs=0.02) and both["precision"] > 0.8


def test_outliers_do_not_raise_coverage():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((300, 8)), rng.standard_normal((300, 8)) + 2.5
    far = 1000 * rng.standard_normal((100, 8))
    clean, generated = measured(fake, real), measured(np.concatenate([fake, far]), real)
    assert 0 < clean["coverage"] < 0.5 and generated["coverage"] == clean["coverage"]
    assert generated["density"] == pytest.approx(clean["density"] * 300 / 400)
    # The radius of a real outlier contains all generated images.
    real_outlier = measured(fake, np.concatenate([real, np.full((1, 8), 1000)]))
    assert clean["precision"] < 0.5 and real_outlier["precision"] == 1
    assert real_outlier["coverage"] == pytest.approx((300 * clean["coverage"] + 1) / 301)
    assert real_outlier["density"] == pytest.approx(clean["density"] + 1 / 3)


@pytest.mark.parametrize("rows", [7, 1000])
def test_radii_of_float32_features_agree_with_float64_also_between_duplicates(monkeypatch, rows):
    monkeypatch.setattr(neighbours, "BLOCK", rows)
    x = correlated(60, 64, seed=0)
    x[1:5] = x[0]  # the radius of these five is zero
    x[10:13] = x[9] * np.float32(1 + 1e-6)
    exact = np.sort(np.linalg.norm(x[:, None].astype(np.float64) - x, axis=2), axis=1)[:, 3]
    radii, lengths = neighbour_radii(x), np.linalg.norm(x, axis=1)
    apart = exact > 0.1 * lengths
    assert 40 < apart.sum() < 60 and exact[~apart].max() < 1e-5 * lengths.max()
    np.testing.assert_allclose(radii[apart], exact[apart], rtol=1e-5)
    assert (radii[~apart] < 1e-3 * lengths[~apart]).all()


@pytest.mark.parametrize(("n", "m"), [(60, 50), (20, 26), (26, 20), (20, 25), (300, 40)])
def test_distances_are_those_of_torch(n, m):
    x, y = (torch.from_numpy(correlated(count, 33, seed=count)) for count in (n, m))
    expected = torch.cat([torch.cdist(rows, y) for rows in x.split(neighbours.BLOCK)])
    assert torch.equal(torch.cat(list(neighbours._distances(x, y))), expected)


def test_precision_and_recall_agree_with_torch_fidelity():
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    fake, real = correlated(1500, 32, seed=0) * np.float32(0.9), correlated(1200, 32, seed=1)
    expected = prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), verbose=False)
    estimates = fidelity_and_diversity(fake, real, neighbour_radii(real))
    assert estimates["precision"].value == pytest.approx(expected[KEY_METRIC_PRECISION], abs=1e-6)
    assert estimates["recall"].value == pytest.approx(expected[KEY_METRIC_RECALL], abs=1e-6)


def test_a_collapsed_model_has_no_recall():
    real = correlated(2000, 32, seed=0)
    estimates = fidelity_and_diversity(np.repeat(correlated(20, 32, seed=1), 100, axis=0), real, neighbour_radii(real))
    assert estimates["recall"].value < 0.01 < estimates["precision"].value


def test_memorised_distinguishes_copies_from_new_images():
    rng = np.random.default_rng(0)
    training, held_out, fresh = (rng.standard_normal((n, 8)).astype(np.float32) for n in (500, 200, 300))
    distances = neighbour_radii(held_out, training, k=1)
    brute = np.array([np.linalg.norm(training - x, axis=1).min() for x in held_out])
    np.testing.assert_allclose(distances, brute, rtol=1e-4)
    copied = memorised(training[:100] + np.float32(1e-3), training, distances)
    assert copied.value > 0.99
    new = memorised(fresh, training, distances)
    assert abs(new.value - 0.5) < 4 * new.stderr < 0.2
    assert memorised(5 * fresh, training, distances).value < 0.2
    # As SciPy computes it, including ties.
    tied = memorised(held_out, training, distances)
    assert tied.value == pytest.approx(0.5)
    u = scipy.stats.mannwhitneyu(distances, neighbour_radii(fresh, training, k=1)).statistic
    assert new.value == pytest.approx(u / (200 * 300))
