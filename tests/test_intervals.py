import numpy as np
import pytest
from scipy import stats

from convergence.analysis import intervals
from convergence.analysis.intervals import Interval, censored_interval, sum_interval, t_interval, t_test


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_t_interval_equals_scipy(seeds):
    values = np.random.default_rng(seeds).normal(0.1, 0.3, (4, seeds))
    expected = stats.ttest_1samp(values, 0, axis=1).confidence_interval(0.95)
    interval = t_interval(values)
    np.testing.assert_allclose(interval.estimate, values.mean(axis=1))
    np.testing.assert_allclose(interval.low, expected.low)
    np.testing.assert_allclose(interval.high, expected.high)


def test_one_value_has_no_bounds_and_no_value_has_no_mean():
    assert t_interval(np.array([0.3])) == (0.3, -np.inf, np.inf)
    estimate, low, high = t_interval(np.array([]))
    assert np.isnan(estimate) and (low, high) == (-np.inf, np.inf)


@pytest.mark.parametrize(
    ("seeds", "rounds", "noise"), [(3, 8, 1.0), (5, 3, 1.0), (10, 8, 0.1)], ids=["seeds", "rounds", "equal"]
)
def test_the_interval_of_a_sum_contains_the_true_sum(seeds, rounds, noise):
    """In 95% of 4000 simulations, and in 95.5% or more if the parts have few values; their bounds added give more."""
    random = np.random.default_rng(0)
    parts = (
        t_interval(1 + noise * random.standard_normal((4000, seeds))),
        t_interval(2 + 0.5 * random.standard_normal((4000, rounds))),
    )
    covered, width, added = 0, 0.0, 0.0
    for part in zip(*(zip(*interval, strict=True) for interval in parts), strict=True):
        _, low, high = sum_interval([Interval(*values) for values in part])
        covered += low < 3 < high
        width, added = width + high - low, added + sum(values[2] - values[1] for values in part)
    assert 0.94 < covered / 4000 < 0.99 and width < 0.95 * added


def test_a_sum_has_the_bounds_that_its_parts_allow():
    exact = Interval(2.0, 2.0, 2.0)
    assert sum_interval([Interval(1.0, 0.5, 1.25), exact]) == (3.0, 2.5, 3.25)
    assert sum_interval([Interval(1.0, -np.inf, 2.0), Interval(0.0, -0.75, 0.75)]) == (1.0, -np.inf, 2.25)
    estimate, low, high = sum_interval([Interval(np.nan, 0.5, np.inf), Interval(0.0, -0.75, 0.75)])
    assert np.isnan(estimate) and (low, high) == (-0.25, np.inf)


def test_the_p_value_is_that_of_the_t_test():
    values = np.array([0.1, 0.3, -0.2, 0.4])
    assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert t_test(np.zeros(3)) == 1 and np.isnan(t_test(values[:1]))


def test_exact_values_have_the_t_interval():
    values = np.array([0.1, 0.3, 0.2, 0.4])
    assert censored_interval(values, values) == t_interval(values)


def test_the_finite_end_is_the_worst_over_all_values_of_the_censored_pairs():
    exact, bound = [0.1, 0.25, 0.3, 0.15], 0.28
    interval = censored_interval([*exact, bound], [*exact, np.inf])
    places = np.concatenate([np.linspace(bound, 0.5, 400), [9.0]])
    lowest = np.sort([[*exact, place] for place in places])[:, :4]
    bounds = lowest.mean(axis=1) - intervals._pivot_quantile(5, 1) * lowest.std(axis=1, ddof=1)
    np.testing.assert_allclose(interval.low, bounds.min(), rtol=1e-6)
    assert interval.high == np.inf and interval.estimate == 0.25


def test_the_pivot_of_complete_samples_is_that_of_students_t():
    np.testing.assert_allclose(intervals._pivot_quantile(4, 0), stats.t.ppf(0.975, 3) / np.sqrt(4), rtol=0.03)


def test_a_censored_value_is_not_dropped():
    exact = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    faster = censored_interval(np.append(exact, 0.4), np.append(exact, np.inf))
    slower = censored_interval(np.append(exact, -np.inf), np.append(exact, -0.2))
    assert faster.low > t_interval(exact).low and faster.high == np.inf
    assert slower.high < t_interval(exact).high and slower.low == -np.inf
    many = np.tile(exact, 2)  # with six or more values the sign test bounds the unbounded side
    assert censored_interval(np.append(many, 0.4), np.append(many, np.inf)).high == 0.3


def test_censored_interval_is_symmetric():
    rng = np.random.default_rng(1)
    low = rng.normal(size=6)
    high = np.where(np.arange(6) < 2, np.inf, low)
    interval, mirrored = censored_interval(low, high), censored_interval(-high, -low)
    assert (interval.low, interval.high) == (-mirrored.high, -mirrored.low)


@pytest.mark.parametrize(("seeds", "rank"), [(5, None), (6, 0), (8, 0), (9, 1), (12, 2)])
def test_without_exact_values_the_bound_comes_from_the_sign_test(seeds, rank):
    low = np.linspace(0.1, 0.9, seeds)
    interval = censored_interval(low, np.full(seeds, np.inf))
    assert interval.high == np.inf
    assert interval.low == (-np.inf if rank is None else low[rank])
    if rank is not None:  # so few values below the median have a probability below 2.5%
        assert stats.binomtest(rank, seeds, alternative="less").pvalue <= 0.025
        assert stats.binomtest(rank + 1, seeds, alternative="less").pvalue > 0.025


def test_an_unknown_pair_leaves_both_sides_unbounded():
    low, high = np.array([-np.inf, 0.1, 0.2]), np.array([np.inf, 0.1, 0.2])
    assert censored_interval(low, high)[1:] == (-np.inf, np.inf)


def test_many_censored_pairs_use_the_sign_test():
    low = np.linspace(0, 1, 40)
    high = np.where(np.arange(40) < 13, np.inf, low)
    assert censored_interval(low, high).low == low[13]
