"""Power of the paired t-test, and how well intervals and outcomes hold on simulated studies."""

import itertools

import numpy as np
import pytest
from metric_tables import STEPS, curves, study
from scipy import stats

from benchmarks import coverage
from convergence.analysis.comparison import compare_pair
from convergence.analysis.effects import NO_DIFFERENCE
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
    assert detectable(0.03, 1) == np.inf
    with pytest.raises(StudyError, match="more than 10,000 seeds"):
        seeds_needed(1e-5, 0.1)


def test_a_cautious_sd_exceeds_the_true_one_in_four_of_five_pilots():
    pilots = np.random.default_rng(0).normal(size=(20_000, 4)).std(axis=1, ddof=1)
    np.testing.assert_allclose(np.mean(pilots * cautious_sd(1.0, 4) > 1), 0.8, atol=0.01)


def test_noise_is_the_spread_over_seeds():
    base, cand = curves(5, 1.0), curves(5, 0.9, seed=1)
    noise = compare_pair(study(base, cand), "base", "cand").noise
    weights = np.array([0, 0.5, 1, 1, 0.5]) / 3
    base_means, cand_means = np.log(base) @ weights, np.log(cand) @ weights
    np.testing.assert_allclose(noise.paired, np.std(base_means - cand_means, ddof=1))
    np.testing.assert_allclose(noise.between**2, (np.var(base_means, ddof=1) + np.var(cand_means, ddof=1)) / 2)
    assert np.isnan(compare_pair(study(base[:1], cand[:1]), "base", "cand").noise.paired)
    levels = np.array([[1.0, 2.0], [3.0, 5.0], [np.nan, 0.0]])
    assert noise_over_seeds(levels) == noise_over_seeds(levels[:2])


@pytest.mark.parametrize("seeds", coverage.SEEDS)
@pytest.mark.parametrize(
    ("noise", "speedup"),
    [
        ("2%, paired", 1.0),
        ("5%, paired", 1.5),
        ("14%, as published (Flowers)", 1.0),
        ("14%, as published (Flowers)", 2.0),
    ],
)
def test_intervals_of_known_pairs_have_the_stated_coverage(seeds, noise, speedup):
    result = coverage.coverage(np.random.default_rng(seeds), 2000, seeds, speedup, coverage.NOISES[noise], 0.5)
    assert result.censored.mean() < 0.15
    assert 0.93 <= result.covered[~result.censored].mean() <= 0.97
    assert 0.93 <= result.covered.mean() <= 0.97


@pytest.mark.parametrize("seeds", coverage.SEEDS)
@pytest.mark.parametrize(("speedup", "share"), [(0.8, 0.9), (1.0, 1.0), (1.25, 1.0), (2.0, 1.0)])
def test_intervals_of_censored_pairs_have_at_least_the_stated_coverage(seeds, speedup, share):
    rng = np.random.default_rng(seeds)
    result = coverage.coverage(rng, 1000, seeds, speedup, coverage.NOISES["5%, paired"], share)
    assert result.censored.mean() > 0.5
    assert result.covered.mean() >= 0.93
    if speedup != 1 and seeds > 3:  # most intervals are bounded
        bounded = np.isfinite(result.reach[:, int(speedup < 1)])
        assert bounded.mean() > 0.6 and np.median(result.reach[bounded, int(speedup < 1)]) < 1


@pytest.mark.parametrize("seeds", [2, *coverage.SEEDS])
@pytest.mark.parametrize("noise", list(coverage.NOISES)[2:])
def test_false_alarms_are_rare(seeds, noise):
    assert coverage.false_alarms(np.random.default_rng(seeds), 2000, seeds, coverage.NOISES[noise]) <= 0.065


@pytest.mark.slow
def test_false_alarms_of_whole_studies_are_rare():
    noise = coverage.NOISES["28%, as published (FFHQ)"]
    levels, _ = coverage.simulate(np.random.default_rng(0), 2000, 3, 1.0, noise, checkpoints=4)
    tables = [study(*np.exp(levels_of_study.swapaxes(0, 1)), steps=STEPS[1:]) for levels_of_study in levels]
    outcomes = [compare_pair(table, "base", "cand", thresholds=[40.0]).outcome for table in tables]
    assert np.mean([outcome != NO_DIFFERENCE for outcome in outcomes]) <= 0.065
