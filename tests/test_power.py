"""Power of the paired t-test, and the noise of a comparison."""

import itertools

import numpy as np
import pytest
from metric_tables import compare_rows, curves, study
from scipy import stats

from convergence.analysis.power import cautious_sd, detectable, noise_over_seeds, power, seeds_needed
from convergence.errors import StudyError


@pytest.mark.parametrize(("ratio", "pairs"), [(0.5, 3), (1.5, 5), (0.8, 10), (6.0, 2)])
def test_power_equals_that_of_simulated_t_tests(ratio, pairs):
    values = np.random.default_rng(0).normal(ratio, 1, (40_000, pairs))
    detected = stats.ttest_1samp(values, 0, axis=1).pvalue < 0.05
    np.testing.assert_allclose(power(ratio, 1, pairs), detected.mean(), atol=0.01)


def test_detectable_effect_and_seeds_invert_the_power():
    for pairs in (2, 3, 10, 50):
        np.testing.assert_allclose(power(detectable(0.03, pairs), 0.03, pairs), 0.8, rtol=1e-6)
    for effect, sd in itertools.product((0.01, 0.02), (0.005, 0.02, 0.06)):
        seeds = seeds_needed(effect, sd)
        assert power(effect, sd, seeds) >= 0.8 and (seeds == 2 or power(effect, sd, seeds - 1) < 0.8)
    assert detectable(0.03, 1) == np.inf and detectable(0.0, 3) == 0 and power(0.01, 0.0, 3) == 1
    assert seeds_needed(1.0, 1e-3) == 2
    with pytest.raises(StudyError, match="more than 10,000 seeds"):
        seeds_needed(1e-5, 0.1)


def test_a_cautious_sd_exceeds_the_true_one_in_four_of_five_pilots():
    pilots = np.random.default_rng(0).normal(size=(20_000, 4)).std(axis=1, ddof=1)
    np.testing.assert_allclose(np.mean(pilots * cautious_sd(1.0, 4) > 1), 0.8, atol=0.01)


def test_noise_is_the_spread_over_seeds():
    base, cand = curves(5, 1.0), curves(5, 0.9, seed=1)
    noise = compare_rows(study(base, cand)).noise
    weights = np.array([0, 0.5, 1, 1, 0.5]) / 3
    base_means, cand_means = np.log(base) @ weights, np.log(cand) @ weights
    np.testing.assert_allclose(noise.paired, np.std(base_means - cand_means, ddof=1))
    np.testing.assert_allclose(noise.between, (np.std(base_means, ddof=1), np.std(cand_means, ddof=1)))
    assert np.isnan(compare_rows(study(base[:1], cand[:1])).noise.paired)
    levels = np.array([[1.0, 2.0], [3.0, 5.0], [np.nan, 0.0]])
    assert noise_over_seeds(levels) == noise_over_seeds(levels[:2])
