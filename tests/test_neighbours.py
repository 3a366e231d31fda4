"""Metrics of neighbourhoods against brute force, torch-fidelity and SciPy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from made import correlated

import diffusion.evaluation.neighbours as neighbours
from diffusion.evaluation.neighbours import memorised, neighbour_radii, precision_recall


def test_precision_and_recall_by_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    rng = np.random.default_rng(0)
    fake = rng.standard_normal((60, 3)).astype(np.float32)
    real = 2 * rng.standard_normal((50, 3)).astype(np.float32)

    def covered(points, centres):
        radius = [np.sort(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([(np.linalg.norm(centres - p, axis=1) <= radius).any() for p in points])

    estimates = precision_recall(fake, real, neighbour_radii(real))
    precision, recall = estimates["precision"], estimates["recall"]
    assert precision.value == pytest.approx(covered(fake, real)) and recall.value == pytest.approx(covered(real, fake))
    assert 0 < recall.value < precision.value
    assert precision.stderr == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / 60))


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
    estimates = precision_recall(fake, real, neighbour_radii(real))
    assert estimates["precision"].value == pytest.approx(expected[KEY_METRIC_PRECISION], abs=1e-6)
    assert estimates["recall"].value == pytest.approx(expected[KEY_METRIC_RECALL], abs=1e-6)


def test_a_collapsed_model_has_no_recall():
    real = correlated(2000, 32, seed=0)
    estimates = precision_recall(np.repeat(correlated(20, 32, seed=1), 100, axis=0), real, neighbour_radii(real))
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
