"""Metrics against closed forms, torch-fidelity, SciPy and brute force; standard errors against simulations."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from made import correlated

import diffusion.evaluation.metrics as metrics
from diffusion.errors import InputError
from diffusion.evaluation.metrics import (
    fit_gaussian,
    frechet,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    mean_kernel,
)
from diffusion.evaluation.neighbours import fidelity_and_diversity, memorised, neighbour_radii

# Frechet distance


def test_the_standard_error_of_equal_images_is_zero():
    """All images have the same influence."""
    reference = fit_gaussian(correlated(50, 4, seed=0))
    estimate = frechet(np.tile(correlated(1, 4, seed=1), (10, 1)), reference)
    assert estimate.value > 0 and estimate.stderr == 0


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 64), (40, 300, 64), (300, 40, 64), (40, 30, 64)])
def test_fd_agrees_with_torch_fidelity(n, m, d):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a, b = correlated(n, d, seed=0), 1.3 * correlated(m, d, seed=1) + np.float32(0.2)
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, fit_gaussian(b)).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-6)])
@pytest.mark.parametrize("steepness", [0.0, 1.0])
def test_fd_agrees_with_the_matrix_square_root_in_float64(steepness, dtype, tolerance):
    # A steep spectrum needs the branch with eigenvectors, a flat one does not.
    rng, scales = np.random.default_rng(3), np.logspace(0, -3 * steepness, 20)
    a, b = rng.standard_normal((500, 20)) * scales, 1.5 * rng.standard_normal((400, 20)) * scales
    b[:, 1] += 0.5 * b[:, 0]
    features = [z.astype(dtype) for z in (a, b)]
    a, b = (z.astype(np.float64) for z in features)
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    expected = mean + np.trace(s_a + s_b - 2 * scipy.linalg.sqrtm(s_a @ s_b).real)
    assert frechet_distance(*features) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("n", [30, 500])
def test_fd_closed_forms(n):
    x = correlated(n, 100, seed=0).astype(np.float64)
    assert frechet_distance(x, x) < 1e-6
    assert frechet_distance(x, x + 0.1) == pytest.approx(0.01 * 100, rel=1e-9)
    expected = np.square(x.mean(0)).sum() + x.var(0, ddof=1).sum()
    assert frechet_distance(x, 2 * x) == pytest.approx(expected, rel=1e-9)


def test_fd_of_constant_features():
    x = correlated(300, 40, seed=0)
    x[:, ::2] = 1.0
    assert frechet_distance(x, x) < 1e-6


def test_fd_is_symmetric_and_independent_of_the_order():
    a, b = correlated(50, 64, seed=0), correlated(200, 64, seed=1)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(a))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, shuffled), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4)), "N >= 2"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "4 and 3 dimensions"),
        (np.full((5, 4), np.nan), np.zeros((5, 4)), "NaN"),
    ],
)
def test_fd_refuses_unfit_features(a, b, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(a, b)


def test_fd_of_a_collapsed_set_is_exact():
    collapsed, y = np.repeat(correlated(20, 64, seed=0), 10, axis=0), correlated(300, 64, seed=1)
    a, b = (x.astype(np.float64) for x in (collapsed, y))
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + sum(np.square(c).sum() for c in centred) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fd_accumulates_in_blocks(monkeypatch):
    a, b = correlated(150, 32, seed=0), fit_gaussian(correlated(200, 32, seed=1))
    expected = frechet(a, b)
    monkeypatch.setattr(metrics, "MOMENT_ROWS", 7)
    assert frechet(a, b)[:2] == pytest.approx(expected[:2], rel=1e-5)


# Standard error of the Frechet distance


def spread(n: int, reference, shift: float, scale: float, sets: int = 150) -> tuple[float, float, float]:
    """Standard deviation of the distance over sets of n images; its estimates by `frechet` and by the bootstrap."""
    rng = np.random.default_rng(0)
    roots = np.logspace(0, -1.5, len(reference.mean))
    estimates, resampled = [], []
    for index in range(sets):
        x = (scale * rng.standard_normal((n, len(roots))) + shift) * roots
        estimates.append(frechet(x, reference))
        if index < 10:
            again = [frechet_distance_to(x[rng.integers(0, n, n)], reference) for _ in range(20)]
            resampled.append(np.var(again, ddof=1))
    values, errors = (np.array([estimate[i] for estimate in estimates]) for i in (0, 1))
    return values.std(ddof=1), math.sqrt(np.square(errors).mean()), math.sqrt(np.mean(resampled))


def frechet_distance_to(x, reference) -> float:
    return frechet(x, reference).value


@pytest.mark.parametrize("n", [3, 8, 24, 48, 200])
def test_fd_stderr_is_the_standard_deviation_over_sets(n):
    roots = np.logspace(0, -1.5, 32)
    reference = fit_gaussian(np.random.default_rng(1).standard_normal((2000, 32)) * roots)
    truth, stderr, _ = spread(n, reference, shift=0.5, scale=1.3)
    assert stderr == pytest.approx(truth, rel=0.2)


def test_fd_of_two_images_has_no_stderr():
    value, stderr, *_ = frechet(correlated(2, 8, seed=0), fit_gaussian(correlated(30, 8, seed=1)))
    assert value > 0 and math.isnan(stderr)


def test_fd_stderr_for_equal_distributions():
    roots = np.logspace(0, -1.5, 32)
    reference = fit_gaussian(np.random.default_rng(1).standard_normal((2000, 32)) * roots)
    truth, stderr, bootstrap = spread(64, reference, shift=0, scale=1)
    # It is too large by sqrt(2) at most; the bootstrap is too large by more than 2.
    assert truth < stderr < 1.6 * truth and bootstrap > 2 * truth


def test_fd_stderr_equals_that_of_the_jackknife():
    # A skewed distribution correlates the influences of an image on the mean and on the covariance.
    x = np.random.default_rng(0).exponential(1, (800, 4))
    reference = fit_gaussian(np.random.default_rng(1).exponential(0.4, (400, 4)))
    without = np.array([frechet_distance_to(np.delete(x, i, axis=0), reference) for i in range(len(x))])
    jackknife = math.sqrt((len(x) - 1) / len(x) * np.square(without - without.mean()).sum())
    assert frechet(x, reference).stderr == pytest.approx(jackknife, rel=0.05)


def test_the_full_and_the_low_rank_form_agree():
    x, y = correlated(50, 20, seed=0).astype(float), correlated(90, 20, seed=1).astype(float)
    full = frechet(x, fit_gaussian(y))
    wide = [np.pad(z, ((0, 0), (0, 60))) for z in (x, y)]
    low_rank = frechet(wide[0], fit_gaussian(wide[1]))
    assert full[:2] == pytest.approx(low_rank[:2], rel=1e-6)


# FD-infinity


def test_fd_infinity_is_the_limit_of_many_images():
    roots = np.logspace(0, -1.5, 8)
    rng = np.random.default_rng(0)

    def draw(n):
        return (1.3 * rng.standard_normal((n, 8)) + 0.3) * roots

    reference = fit_gaussian(rng.standard_normal((4000, 8)) * roots)
    truth = frechet(draw(200_000), reference).value
    estimates = [frechet_infinity(draw(60), reference, np.random.default_rng(0)) for _ in range(200)]
    plain = np.mean([frechet(draw(60), reference).value for _ in range(200)])
    values = np.array([estimate.value for estimate in estimates])
    error = values.std(ddof=1) / math.sqrt(200)
    assert abs(values.mean() - truth) < 3 * error < plain - truth
    assert math.sqrt(np.mean([e.stderr**2 for e in estimates])) == pytest.approx(values.std(ddof=1), rel=0.2)
    assert estimates[0].note == "extrapolated from 30 to 60 samples"


# Kernel distance


def cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def test_kid_is_the_unbiased_cubic_mmd(monkeypatch):
    x, y = correlated(40, 16, seed=0).astype(float), correlated(30, 16, seed=1).astype(float) + 0.3
    within = [cubic(z, z)[~np.eye(len(z), dtype=bool)].mean() for z in (x, y)]
    expected = sum(within) - 2 * cubic(x, y).mean()
    estimate = kernel_distance(x, y, mean_kernel(y))
    assert estimate.value == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert kernel_distance(x, y, mean_kernel(y))[:2] == pytest.approx(estimate[:2], rel=1e-9)


def test_kid_agrees_with_torch_fidelity():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    x, y = correlated(60, 16, seed=0), correlated(60, 16, seed=1) + np.float32(0.2)
    expected = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=1, kid_subset_size=60, verbose=False
    )
    assert kernel_distance(x, y, mean_kernel(y)).value == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-4)


def test_kid_variance_by_brute_force():
    x, y = correlated(7, 5, seed=0).astype(float), correlated(30, 5, seed=1).astype(float)
    g = cubic(x, y).mean(1)
    h = cubic(x, x) - g[:, None] - g
    pairs = [h[i, j] for i, j in itertools.permutations(range(7), 2)]
    disjoint = [h[i, j] * h[k, m] for i, j, k, m in itertools.permutations(range(7), 4)]
    variance = np.mean(pairs) ** 2 - np.mean(disjoint)
    assert variance > 0
    assert kernel_distance(x, y, mean_kernel(y)).stderr == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kid_stderr_is_the_standard_deviation_over_sets(shift):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((300, 8))
    kernel = mean_kernel(y)
    estimates = [kernel_distance(rng.standard_normal((50, 8)) + shift, y, kernel) for _ in range(400)]
    values, errors = (np.array([estimate[i] for estimate in estimates]) for i in (0, 1))
    errors = np.nan_to_num(errors)  # without an estimate where that of the variance is negative
    assert math.sqrt(np.square(errors).mean()) == pytest.approx(values.std(ddof=1), rel=0.12)


def test_kid_without_a_positive_variance_has_no_stderr():
    x = correlated(40, 8, seed=0)
    value, stderr, note, _ = kernel_distance(x, x[::-1].copy(), mean_kernel(x))
    assert value < 0 and math.isnan(stderr) and "variance is not positive" in note


@pytest.mark.parametrize("n", [2, 3])
def test_kid_of_fewer_than_four_images_has_no_stderr(n):
    y = correlated(30, 8, seed=1)
    value, stderr, *_ = kernel_distance(correlated(n, 8, seed=0), y, mean_kernel(y))
    assert math.isfinite(value) and math.isnan(stderr)


def test_kernels_of_float32_features_agree_with_float64(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    x, y = correlated(200, 64, seed=0), correlated(300, 64, seed=1) + np.float32(0.2)
    exact = [z.astype(np.float64) for z in (x, y)]
    of_x, of_y = (cubic(z, z)[~np.eye(len(z), dtype=bool)].mean() for z in exact)
    kernel = mean_kernel(y)
    assert kernel == pytest.approx(of_y, rel=5e-8)
    found = kernel_distance(x, y, kernel)
    assert found.value == pytest.approx(of_x + of_y - 2 * cubic(*exact).mean(), abs=1e-7 * of_y)
    assert found.stderr == pytest.approx(kernel_distance(*exact, of_y).stderr, rel=1e-5)


def test_tensors_give_the_values_of_arrays():
    x, y = correlated(60, 16, seed=0), correlated(90, 16, seed=1)
    for measure in (
        lambda x, y: frechet(x, fit_gaussian(y)),
        lambda x, y: frechet_infinity(x, fit_gaussian(y), np.random.default_rng(0)),
        lambda x, y: kernel_distance(x, y, mean_kernel(y)),
        *(
            lambda x, y, name=name: fidelity_and_diversity(x, y, neighbour_radii(y))[name]
            for name in ("precision", "density", "coverage")
        ),
        lambda x, y: memorised(x, y, neighbour_radii(x, y, k=1)),
    ):
        found, expected = measure(*map(torch.from_numpy, (x, y))), measure(x, y)
        assert found[:3] == expected[:3]
        np.testing.assert_array_equal(found.influences, expected.influences)


def test_metrics_are_independent_of_the_order():
    x, y = correlated(120, 16, seed=0), correlated(150, 16, seed=1)
    shuffled = np.random.default_rng(0).permutation(x)
    for measure in (
        lambda z: frechet(z, fit_gaussian(y))[:2],
        lambda z: kernel_distance(z, y, mean_kernel(y))[:2],
        lambda z: [estimate.value for estimate in fidelity_and_diversity(z, y, neighbour_radii(y)).values()],
    ):
        assert measure(x) == pytest.approx(measure(shuffled), rel=1e-4)
