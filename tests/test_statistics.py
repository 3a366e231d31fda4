import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import coverage
from convergence.analysis import comparison, intervals
from convergence.analysis.comparison import compare_pair, speedup_table, verdict
from convergence.analysis.curves import average, isotonic_fit, log_speedup, time_to_threshold
from convergence.analysis.intervals import censored_interval, t_interval
from convergence.analysis.power import cautious_sd, detectable, noise_floor, power, seeds_needed
from convergence.errors import StudyError
from convergence.tables import COLUMNS

STEPS = (0, 100, 200, 300, 400)


def study(base, cand, metric="fd", steps=STEPS, seconds_per_step=(0.5, 0.6), features="lite0", name="small"):
    """The long table of two arms; `base` and `cand` hold a row of values per seed, NaN for a diverged run."""
    rows = [
        (name, arm, seed, step, 32 * step, pace * step, features, metric, value, np.nan, 500, reason)
        for arm, of_seeds, pace in (("base", base, seconds_per_step[0]), ("cand", cand, seconds_per_step[1]))
        for seed, values in enumerate(of_seeds)
        for step, value in zip(steps, values, strict=True)
        for reason in ["diverged at step 7" if np.isnan(value) else ""]
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def curves(seeds, factor, seed=0, noise=0.05):
    rng = np.random.default_rng(seed)
    decay = np.array([300, 200, 150, 120, 100.0])
    return factor * decay * np.exp(noise * rng.standard_normal((seeds, len(decay))))


def over_seeds(table, quantity, threshold=None):
    rows = table[(table["quantity"] == quantity) & table["seed"].isna()]
    if threshold is not None:
        rows = rows[np.isclose(rows["threshold"], threshold)]
    return rows.iloc[0]


def of_seeds(table, quantity):
    return table[(table["quantity"] == quantity) & table["seed"].notna()]


# Intervals


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_t_interval_is_scipys(seeds):
    values = np.random.default_rng(seeds).normal(0.1, 0.3, (4, seeds))
    expected = stats.ttest_1samp(values, 0, axis=1).confidence_interval(0.95)
    found = t_interval(values)
    np.testing.assert_allclose(found.estimate, values.mean(axis=1))
    np.testing.assert_allclose(found.low, expected.low)
    np.testing.assert_allclose(found.high, expected.high)


def test_one_value_has_no_bounds_and_none_no_mean():
    assert t_interval(np.array([0.3])) == (0.3, -np.inf, np.inf)
    estimate, low, high = t_interval(np.array([]))
    assert np.isnan(estimate) and (low, high) == (-np.inf, np.inf)


def test_exact_values_have_their_t_interval():
    values = np.array([0.1, 0.3, 0.2, 0.4])
    assert censored_interval(values, values) == t_interval(values)


def test_the_closed_bound_is_the_worst_over_all_places_of_open_values():
    exact, bound = [0.1, 0.25, 0.3, 0.15], 0.28
    found = censored_interval([*exact, bound], [*exact, np.inf])
    places = np.concatenate([np.linspace(bound, 0.5, 400), [9.0]])
    lowest = np.sort([[*exact, place] for place in places])[:, :4]
    bounds = lowest.mean(axis=1) - intervals._pivot_quantile(5, 1) * lowest.std(axis=1, ddof=1)
    np.testing.assert_allclose(found.low, bounds.min(), rtol=1e-6)
    assert found.high == np.inf and found.estimate == 0.25


def test_without_open_values_the_pivot_is_students():
    np.testing.assert_allclose(intervals._pivot_quantile(4, 0), stats.t.ppf(0.975, 3) / np.sqrt(4), rtol=0.03)


def test_an_open_value_is_not_dropped():
    exact = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    faster = censored_interval(np.append(exact, 0.4), np.append(exact, np.inf))
    slower = censored_interval(np.append(exact, -np.inf), np.append(exact, -0.2))
    assert faster.low > t_interval(exact).low and faster.high == np.inf
    assert slower.high < t_interval(exact).high and slower.low == -np.inf
    many = np.tile(exact, 2)  # with more values the sign test bounds the open side
    assert censored_interval(np.append(many, 0.4), np.append(many, np.inf)).high == 0.3


def test_censored_interval_mirrors():
    rng = np.random.default_rng(1)
    low = rng.normal(size=6)
    high = np.where(np.arange(6) < 2, np.inf, low)
    there, back = censored_interval(low, high), censored_interval(-high, -low)
    assert (there.low, there.high) == (-back.high, -back.low)


@pytest.mark.parametrize(("seeds", "rank"), [(5, None), (6, 0), (8, 0), (9, 1), (12, 2)])
def test_where_no_value_is_exact_the_sign_test_bounds(seeds, rank):
    low = np.linspace(0.1, 0.9, seeds)
    found = censored_interval(low, np.full(seeds, np.inf))
    assert found.high == np.inf
    assert found.low == (-np.inf if rank is None else low[rank])
    if rank is not None:  # the sign test itself: so few of the values below the median have a chance below 2.5%
        assert stats.binomtest(rank, seeds, alternative="less").pvalue <= 0.025
        assert stats.binomtest(rank + 1, seeds, alternative="less").pvalue > 0.025


def test_pairs_of_which_nothing_is_known_leave_both_sides_open():
    low, high = np.array([-np.inf, 0.1, 0.2]), np.array([np.inf, 0.1, 0.2])
    assert censored_interval(low, high)[1:] == (-np.inf, np.inf)


def test_many_censored_pairs_are_quick():
    low = np.concatenate([np.zeros(20), np.linspace(0, 1, 20)])
    high = np.concatenate([np.full(20, np.inf), np.linspace(0, 1, 20)])
    found = censored_interval(low, high)
    assert np.isfinite(found.low)


# Times


@pytest.mark.parametrize("power_law", [0.3, 1.0])
def test_crossings_of_a_power_law_are_exact(power_law):
    images = np.array([100.0, 200, 300, 400])
    time = time_to_threshold(5 - power_law * np.log(images), images, 5 - power_law * np.log(237))
    np.testing.assert_allclose(time, 237)


def test_before_the_first_trained_checkpoint_the_level_is_linear():
    assert time_to_threshold(np.array([4.0, 2, 1]), np.array([0.0, 100, 200]), 3.5) == (25, 25)


def test_a_crossing_counts_when_it_lasts():
    images = np.array([100.0, 200, 300, 400, 500])
    early_dip = time_to_threshold(np.array([5.0, 1, 5, 3, 1]), images, 2.0)
    np.testing.assert_allclose(early_dip, np.sqrt(400 * 500))  # pooled to 5, 3, 3, 3, 1
    noisy_stay = time_to_threshold(np.array([5.0, 1, 2.2, 1, 2]), images, 2.0)
    np.testing.assert_allclose(noisy_stay, 100 * 2 ** (3 / (5 - 1.6)))
    assert time_to_threshold(np.array([5.0, 1, 1, 4, 4]), images, 2.0) == (500, np.inf)


def test_the_falling_fit_is_the_nearest_curve_that_never_rises():
    level = np.random.default_rng(0).normal(size=(20, 6))
    fit = isotonic_fit(level)
    assert (np.diff(fit) <= 0).all() and (np.diff(level) > 0).any(axis=1).all()
    for curve, found in zip(level, fit, strict=True):
        means = np.array([[curve[a : b + 1].mean() if a <= b else np.nan for b in range(6)] for a in range(6)])
        # the min-max formula of isotonic regression (Barlow et al. 1972)
        expected = [min(max(means[a, b] for b in range(k, 6)) for a in range(k + 1)) for k in range(6)]
        np.testing.assert_allclose(found, expected)
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


def test_many_curves_at_once_equal_each_alone():
    rng = np.random.default_rng(0)
    levels, images = rng.normal(size=(6, 3, 5)), np.arange(1.0, 6)
    thresholds = rng.normal(size=(6, 3))
    low, high = time_to_threshold(levels, images, thresholds)
    for at in np.ndindex(6, 3):
        assert time_to_threshold(levels[at], images, thresholds[at]) == (low[at], high[at])


def test_bounds_of_times_bound_the_speedup():
    cases = {((200, 200), (100, 100)): (np.log(2),) * 2, ((400, np.inf), (100, 100)): (np.log(4), np.inf)}
    cases |= {((200, 200), (400, np.inf)): (-np.inf, np.log(0.5)), ((4, np.inf), (4, np.inf)): (-np.inf, np.inf)}
    cases |= {((200, 200), (0, 100)): (np.log(2), np.inf)}
    for (baseline, candidate), expected in cases.items():
        np.testing.assert_allclose(log_speedup(baseline, candidate), expected)


def test_average_weighs_by_images():
    np.testing.assert_allclose(average(np.array([1.0, 1, 5]), np.array([0.0, 100, 200])), (100 + 300) / 200)
    np.testing.assert_allclose(average(np.array([[3.0], [4.0]]), np.array([10.0])), [3, 4])


# Comparisons


def test_primary_endpoint_is_the_paired_t_test_of_average_logs():
    base, cand = curves(4, 1.0), curves(4, 0.9, seed=1)
    found = over_seeds(compare_pair(study(base, cand), "base", "cand"), "average")
    weights = np.array([0, 0.5, 1, 1, 0.5]) / 3  # trapezoids over the trained checkpoints
    expected = stats.ttest_rel(np.log(base) @ weights, np.log(cand) @ weights)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose((found["low"], found["high"]), (interval.low, interval.high))
    final = over_seeds(compare_pair(study(base, cand), "base", "cand"), "final")
    interval = stats.ttest_rel(np.log(base[:, -1]), np.log(cand[:, -1])).confidence_interval(0.95)
    np.testing.assert_allclose((final["low"], final["high"]), (interval.low, interval.high))
    np.testing.assert_allclose(final["of_candidate"], stats.gmean(cand[:, -1]))
    assert (found["pairs"], found["censored"], found["first_images"], found["last_images"]) == (4, 0, 3200, 12800)


def test_seeds_are_paired_whatever_the_order_of_rows():
    table = study(curves(3, 1.0), curves(3, 0.9, seed=1))
    mixed = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare_pair(table, "base", "cand"), compare_pair(mixed, "base", "cand"))


def test_speedup_in_images_and_seconds():
    base = np.array([[300.0, 80, 40, 80 / 3, 20]])  # 8000 / step
    table = compare_pair(study(base, base * [[1, 0.5, 0.5, 0.5, 0.5]]), "base", "cand", thresholds=[30.0, 25.0])
    assert table[table["quantity"] == "images"]["threshold"].unique().tolist() == [30, 25]
    in_images, in_seconds = (over_seeds(table, axis, 30.0) for axis in ("images", "seconds"))
    np.testing.assert_allclose(np.exp(in_images["effect"]), 2)
    np.testing.assert_allclose(in_images["of_baseline"], 32 * 8000 / 30)
    np.testing.assert_allclose(np.exp(in_seconds["effect"]), 2 * 0.5 / 0.6)
    assert (in_images["low"], in_images["high"]) == (-np.inf, np.inf)  # one seed


def test_thresholds_come_from_the_baseline_alone():
    base = curves(3, 1.0)
    tables = [compare_pair(study(base, curves(3, factor)), "base", "cand") for factor in (0.5, 1.5)]
    first, last = stats.gmean(base[:, 1]), stats.gmean(base[:, -1])
    for table in tables:
        found = table[table["quantity"] == "images"]["threshold"].unique()
        np.testing.assert_allclose(found, [first * (last / first) ** share for share in (0.25, 0.5, 0.75)])


def test_a_run_that_never_arrives_is_censored_and_counted():
    base, cand = curves(3, 1.0, noise=0), curves(3, 1.0, noise=0)
    cand[1] *= 3
    found = compare_pair(study(base, cand), "base", "cand", thresholds=[130.0])
    censored = of_seeds(found, "images").iloc[1]
    assert censored["of_candidate"] == np.inf and censored["censored"] == 1 and np.isnan(censored["effect"])
    assert censored["low"] == -np.inf
    np.testing.assert_allclose(censored["high"], np.log(censored["of_baseline"] / 12800))
    summary = over_seeds(found, "images")
    assert (summary["pairs"], summary["censored"]) == (3, 1) and np.isnan(summary["of_candidate"])


def test_diverged_runs_are_counted_and_never_reach_a_threshold():
    base, cand = curves(3, 1.0), curves(3, 0.9)
    cand[2, 3:] = np.nan
    table = compare_pair(study(base, cand), "base", "cand")
    for quantity in ("average", "final"):
        summary = over_seeds(table, quantity)
        assert (summary["pairs"], summary["diverged_candidate"], summary["diverged_baseline"]) == (2, 1, 0)
        assert of_seeds(table, quantity)["effect"].isna().tolist() == [False, False, True]
    kept = compare_pair(study(base[:2], cand[:2]), "base", "cand")
    assert over_seeds(table, "average")["effect"] == over_seeds(kept, "average")["effect"]
    assert (of_seeds(table, "images")["of_candidate"].to_numpy().reshape(3, 3)[:, 2] == np.inf).all()


def test_all_diverged_is_no_crash():
    base, cand = curves(2, 1.0), curves(2, 0.9)
    cand[:, 2:] = np.nan
    table = compare_pair(study(base, cand), "base", "cand")
    summary = over_seeds(table, "average")
    assert summary["pairs"] == 0 and verdict(summary) == "no difference shown"
    base[:] = np.nan
    assert over_seeds(compare_pair(study(base, cand), "base", "cand"), "final")["diverged_baseline"] == 2


def test_shares_are_compared_by_differences_and_more_is_better():
    base = np.array([[0.0, 0.2, 0.3, 0.4, 0.5], [0.0, 0.1, 0.3, 0.4, 0.5]])
    table = compare_pair(study(base, base + 0.1, metric="recall"), "base", "cand")
    np.testing.assert_allclose(over_seeds(table, "average")["effect"], 0.1)
    np.testing.assert_allclose(over_seeds(table, "final")["of_candidate"], 0.6)
    assert over_seeds(table, "images", 0.325)["effect"] > 0
    assert set(table["scale"]) == {"plain"}


def test_a_distance_that_is_not_positive_is_compared_by_differences():
    base = np.array([[0.5, 0.3, 0.2, 0.1, 0.05]] * 2)
    table = compare_pair(study(base, base - 0.06, metric="kid"), "base", "cand")
    assert set(table["scale"]) == {"plain"}
    np.testing.assert_allclose(over_seeds(table, "final")["effect"], 0.06)


def test_arms_of_different_checkpoints_are_compared_where_both_were():
    base, cand = curves(3, 1.0), curves(3, 1.0)
    table = study(base, cand)
    longer = table["images"] * np.where(table["arm"] == "cand", 2, 1)
    found = over_seeds(compare_pair(table.assign(images=longer), "base", "cand"), "average")
    assert (found["first_images"], found["last_images"]) == (6400, 12800)
    apart = table["images"] * np.where(table["arm"] == "cand", 10, 1)
    with pytest.raises(StudyError, match="share no range"):
        compare_pair(table.assign(images=apart), "base", "cand")


def test_values_missing_for_another_reason_are_left_out_one_by_one():
    table = study(curves(2, 1.0), curves(2, 0.9))
    table.loc[[2, 12], ["value", "reason"]] = np.nan, "needs 4 images"
    found = over_seeds(compare_pair(table, "base", "cand"), "average")
    assert (found["pairs"], found["diverged_baseline"]) == (2, 0)
    assert compare_pair(table.assign(value=np.nan, reason="needs 4 images"), "base", "cand").empty


def test_one_comparison_is_primary():
    both = [study(curves(2, 1.0), curves(2, 0.9), metric=m, features=f) for m in ("fd", "kid") for f in ("a", "b")]
    compare = {"baseline": "base", "candidates": ["cand"], "thresholds": [150.0], "features": "b"}
    table = speedup_table(pd.concat(both), {"small": compare | {"primary": {"candidate": "cand", "metric": "fd"}}})
    primary = table[table["primary"]]
    assert set(primary["metric"]) == {"fd"} and set(primary["features"]) == {"b"}
    assert primary["threshold"].dropna().unique().tolist() == [150]
    assert len(table[["features", "metric"]].drop_duplicates()) == 4
    assert table[~table["primary"]]["threshold"].nunique() == 3  # by the rule
    assert speedup_table(pd.concat(both), {}).columns.tolist() == comparison.SPEEDUP_COLUMNS


# Verdict and noise


@pytest.mark.parametrize(
    ("low", "high", "baseline", "candidate", "expected"),
    [
        (0.01, 0.1, 0, 0, "faster"),
        (-0.1, -0.01, 0, 0, "slower"),
        (-0.01, 0.1, 0, 0, "no difference shown"),
        (0.0, 0.0, 0, 0, "no difference shown"),
        (-np.inf, np.inf, 0, 0, "no difference shown"),
        (0.01, 0.1, 0, 1, "no difference shown"),
        (-0.1, -0.01, 0, 1, "slower"),
        (-0.1, -0.01, 1, 0, "no difference shown"),
    ],
)
def test_verdict(low, high, baseline, candidate, expected):
    row = {"low": low, "high": high, "diverged_baseline": baseline, "diverged_candidate": candidate}
    assert verdict(row) == expected


@pytest.mark.parametrize(("ratio", "pairs"), [(0.5, 3), (1.5, 5), (0.8, 10), (6.0, 2)])
def test_power_is_that_of_simulated_t_tests(ratio, pairs):
    values = np.random.default_rng(0).normal(ratio, 1, (40_000, pairs))
    shown = stats.ttest_1samp(values, 0, axis=1).pvalue < 0.05
    np.testing.assert_allclose(power(ratio, 1, pairs), shown.mean(), atol=0.01)


def test_detectable_effect_and_seeds_invert_the_power():
    for pairs in (2, 3, 10, 50):
        np.testing.assert_allclose(power(detectable(0.03, pairs), 0.03, pairs), 0.8, rtol=1e-6)
    for effect, sd in itertools.product((0.01, 0.02), (0.005, 0.02, 0.06)):
        seeds = seeds_needed(effect, sd)
        assert power(effect, sd, seeds) >= 0.8 and (seeds == 2 or power(effect, sd, seeds - 1) < 0.8)
    assert detectable(0.03, 1) == np.inf
    with pytest.raises(StudyError, match="more than 10,000 seeds"):
        seeds_needed(1e-5, 0.1)


def test_a_cautious_sd_is_above_the_true_one_four_times_in_five():
    pilots = np.random.default_rng(0).normal(size=(20_000, 4)).std(axis=1, ddof=1)
    np.testing.assert_allclose(np.mean(pilots * cautious_sd(1.0, 4) > 1), 0.8, atol=0.01)


def test_noise_floor_is_the_spread_of_seeds():
    base, cand = curves(5, 1.0), curves(5, 0.9, seed=1)
    noise = noise_floor(compare_pair(study(base, cand), "base", "cand"))
    weights = np.array([0, 0.5, 1, 1, 0.5]) / 3
    of_base, of_cand = np.log(base) @ weights, np.log(cand) @ weights
    np.testing.assert_allclose(noise.paired, np.std(of_base - of_cand, ddof=1))
    np.testing.assert_allclose(noise.between**2, (np.var(of_base, ddof=1) + np.var(of_cand, ddof=1)) / 2)
    assert np.isnan(noise_floor(compare_pair(study(base[:1], cand[:1]), "base", "cand")).paired)


# The methods, on simulated studies


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
def test_finite_pairs_are_covered_as_promised(seeds, noise, speedup):
    found = coverage.coverage(np.random.default_rng(seeds), 2000, seeds, speedup, coverage.NOISES[noise], 0.5)
    assert found.censored.mean() < 0.15
    assert 0.93 <= found.covered[~found.censored].mean() <= 0.97
    assert 0.93 <= found.covered.mean() <= 0.97


@pytest.mark.parametrize("seeds", coverage.SEEDS)
@pytest.mark.parametrize(("speedup", "share"), [(0.8, 0.9), (1.0, 1.0), (1.25, 1.0), (2.0, 1.0)])
def test_censored_pairs_are_covered_at_least_as_promised(seeds, speedup, share):
    rng = np.random.default_rng(seeds)
    found = coverage.coverage(rng, 1000, seeds, speedup, coverage.NOISES["5%, paired"], share)
    assert found.censored.mean() > 0.5
    assert found.covered.mean() >= 0.93
    if speedup != 1 and seeds > 3:  # and the intervals say something
        bounded = np.isfinite(found.reach[:, int(speedup < 1)])
        assert bounded.mean() > 0.6 and np.median(found.reach[bounded, int(speedup < 1)]) < 1


@pytest.mark.parametrize("seeds", [2, *coverage.SEEDS])
@pytest.mark.parametrize("noise", list(coverage.NOISES)[2:])
def test_studies_without_a_difference_are_seldom_called_different(seeds, noise):
    assert coverage.false_alarms(np.random.default_rng(seeds), 2000, seeds, coverage.NOISES[noise]) <= 0.065


@pytest.mark.slow
def test_whole_studies_without_a_difference_are_seldom_called_different():
    noise = coverage.NOISES["28%, as published (FFHQ)"]
    levels, _ = coverage.simulate(np.random.default_rng(0), 2000, 3, 1.0, noise, checkpoints=4)
    tables = [study(*np.exp(of.swapaxes(0, 1)), steps=STEPS[1:]) for of in levels]
    told = [verdict(over_seeds(compare_pair(of, "base", "cand", thresholds=[40.0]), "average")) for of in tables]
    assert np.mean([one != "no difference shown" for one in told]) <= 0.065
