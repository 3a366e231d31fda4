import numpy as np
import pytest

from convergence.analysis.curves import isotonic_fit, log_factor, mean_over_images, time_to_threshold


@pytest.mark.parametrize("power_law", [0.3, 1.0])
def test_crossings_of_a_power_law_are_exact(power_law):
    images = np.array([100.0, 200, 300, 400])
    time = time_to_threshold(5 - power_law * np.log(images), images, 5 - power_law * np.log(237))
    np.testing.assert_allclose(time, 237)


def test_before_the_first_trained_checkpoint_the_level_is_linear():
    assert time_to_threshold(np.array([4.0, 2, 1]), np.array([0.0, 100, 200]), 3.5) == (25, 25)


def test_a_crossing_counts_only_if_it_lasts():
    images = np.array([100.0, 200, 300, 400, 500])
    early_dip = time_to_threshold(np.array([5.0, 1, 5, 3, 1]), images, 2.0)
    np.testing.assert_allclose(early_dip, np.sqrt(400 * 500))  # pooled to 5, 3, 3, 3, 1
    noisy_stay = time_to_threshold(np.array([5.0, 1, 2.2, 1, 2]), images, 2.0)
    np.testing.assert_allclose(noisy_stay, 100 * 2 ** (3 / (5 - 1.6)))
    assert time_to_threshold(np.array([5.0, 1, 1, 4, 4]), images, 2.0) == (500, np.inf)


def test_the_isotonic_fit_is_the_nearest_curve_that_never_increases():
    level = np.random.default_rng(0).normal(size=(20, 6))
    fit = isotonic_fit(level)
    assert (np.diff(fit) <= 0).all() and (np.diff(level) > 0).any(axis=1).all()
    for curve, fitted in zip(level, fit, strict=True):
        means = np.array([[curve[a : b + 1].mean() if a <= b else np.nan for b in range(6)] for a in range(6)])
        # the min-max formula of isotonic regression (Barlow et al. 1972)
        expected = [min(max(means[a, b] for b in range(k, 6)) for a in range(k + 1)) for k in range(6)]
        np.testing.assert_allclose(fitted, expected)
    np.testing.assert_array_equal(isotonic_fit(np.array([3.0, 2, 2, 1])), [3, 2, 2, 1])
    np.testing.assert_array_equal(isotonic_fit(np.array([1.0, 3, np.nan])), [2, 2, np.nan])
    np.testing.assert_array_equal(isotonic_fit(np.array([np.nan, np.nan])), [np.nan, np.nan])


def test_censoring_at_both_ends_and_after_a_divergence():
    images = np.array([100.0, 200, 300])
    assert time_to_threshold(np.array([5.0, 4, 3]), images, 2.0) == (300, np.inf)
    assert time_to_threshold(np.array([1.0, 1, 1]), images, 2.0) == (0, 100)
    assert time_to_threshold(np.array([1.0, 1, 1]), np.array([0.0, 200, 300]), 2.0) == (0, 200)
    assert time_to_threshold(np.array([5.0, 1, np.nan]), images, 2.0) == (300, np.inf)
    assert time_to_threshold(np.array([5.0]), images[:1], 2.0) == (100, np.inf)
    assert time_to_threshold(np.array([1.0]), images[:1], 2.0) == (0, 100)


def test_many_curves_at_once_give_the_result_of_each_curve():
    rng = np.random.default_rng(0)
    levels, images = rng.normal(size=(6, 3, 5)), np.arange(1.0, 6)
    thresholds = rng.normal(size=(6, 3))
    low, high = time_to_threshold(levels, images, thresholds)
    for index in np.ndindex(6, 3):
        assert time_to_threshold(levels[index], images, thresholds[index]) == (low[index], high[index])


def test_the_bounds_of_a_factor_follow_from_the_bounds_of_the_times():
    cases = {((200, 200), (100, 100)): (np.log(0.5),) * 2, ((400, np.inf), (100, 100)): (-np.inf, np.log(0.25))}
    cases |= {((200, 200), (400, np.inf)): (np.log(2), np.inf), ((4, np.inf), (4, np.inf)): (-np.inf, np.inf)}
    cases |= {((200, 200), (0, 100)): (-np.inf, np.log(0.5))}
    for (baseline, candidate), expected in cases.items():
        np.testing.assert_allclose(log_factor(baseline, candidate), expected)


def test_the_mean_is_weighted_by_images():
    np.testing.assert_allclose(mean_over_images(np.array([1.0, 1, 5]), np.array([0.0, 100, 200])), (100 + 300) / 200)
    np.testing.assert_allclose(mean_over_images(np.array([[3.0], [4.0]]), np.array([10.0])), [3, 4])
