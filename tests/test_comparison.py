import doctest
import re

import numpy as np
import pandas as pd
import pytest
from metric_tables import compare_rows, curves, known_costs, study
from scipy import stats

import convergence
from convergence.analysis.comparison import EFFECT_COLUMNS, effects_table
from convergence.analysis.cost import cost_table, costs
from convergence.errors import StudyError
from convergence.rows import of_rounds
from diffusion.errors import InputError


def compared(base, cand, thresholds=None, **columns):
    return compare_rows(study(base, cand, **columns), thresholds)


def percent(log_ratio):
    return 100 * np.expm1(log_ratio)


def test_the_primary_endpoint_is_the_paired_t_test_of_mean_logs():
    base, cand = curves(4, 1.0), curves(4, 0.9, seed=1)
    comparison = compared(base, cand)
    weights = np.array([0, 0.5, 1, 1, 0.5]) / 3  # trapezoidal rule over the trained checkpoints
    test = stats.ttest_rel(np.log(cand) @ weights, np.log(base) @ weights)
    average, final = comparison.average, comparison.final
    np.testing.assert_allclose((average.low, average.high), percent(np.array(test.confidence_interval(0.95))))
    np.testing.assert_allclose(comparison.average_90, percent(np.array(test.confidence_interval(0.90))))
    np.testing.assert_allclose(average.p_value, test.pvalue)
    interval = stats.ttest_rel(np.log(cand[:, -1]), np.log(base[:, -1])).confidence_interval(0.95)
    np.testing.assert_allclose((final.low, final.high), percent(np.array(interval)))
    np.testing.assert_allclose(final.candidate, stats.gmean(cand[:, -1]))
    assert (average.pairs, average.censored, average.unit) == (4, 0, "percent")
    assert (comparison.first_images, comparison.last_images, comparison.seeds) == (3200, 12800, (0, 1, 2, 3))


def test_seeds_are_paired_in_any_order_of_rows():
    table = study(curves(3, 1.0), curves(3, 0.9, seed=1))
    tables = [effects_table([compare_rows(rows)]) for rows in (table, table.sample(frac=1))]
    pd.testing.assert_frame_equal(*tables)


def test_images_are_a_factor_above_1_for_a_slower_candidate():
    base = np.array([[300.0, 80, 40, 80 / 3, 20]])  # 8000 / step
    comparison = compared(base, base * [[1, 2, 2, 2, 2]], [45.0, 50.0, 45.0])
    assert comparison.thresholds == [50, 45] and comparison.primary_threshold == 50
    three = compared(base, base, [45.0, 60.0, 50.0])
    assert three.primary_threshold == three.images.threshold == 50
    images = comparison.effect("images", 45.0)
    np.testing.assert_allclose(images.estimate, 2)
    np.testing.assert_allclose(images.baseline, 32 * 8000 / 45)
    assert (images.low, images.high, images.unit) == (0, np.inf, "factor")  # one seed
    assert comparison.images is comparison.effect("images", 50.0)
    np.testing.assert_allclose(comparison.average.estimate, 100)
    with pytest.raises(KeyError):
        comparison.effect("images", 31.0)


def test_hours_are_images_times_the_cost_of_the_arm():
    base, cand = curves(3, 1.0), curves(3, 0.9, seed=1)
    comparison = compare_rows(study(base, cand), costs=known_costs(base=2.0, cand=3.0))
    images, hours = comparison.images, comparison.hours
    assert len(comparison.thresholds) == 4
    for name in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(hours, name), 1.5 * getattr(images, name))
    np.testing.assert_allclose(hours.baseline, images.baseline / 1000 * 2 / 3600)
    assert compare_rows(study(base, cand), costs=known_costs(base=2.0)).hours is None


def test_the_interval_of_hours_has_the_noise_of_images_and_of_costs():
    """The cost of the candidate by paired rounds; relative to a third arm, the noise of both costs counts."""
    seconds = np.random.default_rng(0).lognormal(0, 0.1, (6, 3))
    rounds, metrics = (
        pd.DataFrame(of_rounds(seconds, ["base", "cand", "third"], "a CPU")),
        study(curves(3, 1.0), curves(3, 0.9, seed=1)),
    )

    def compared_with(baseline):
        return compare_rows(metrics, costs=costs(cost_table(rounds, "small", baseline)))

    def distance(first, second):
        logs = np.log(seconds[:, first] / seconds[:, second])
        return stats.ttest_1samp(logs, 0).confidence_interval(0.95).high - logs.mean()

    images = compared_with("base").images
    ratio = np.exp(np.log(seconds[:, 1] / seconds[:, 0]).mean())
    for baseline, distances in (("base", [distance(1, 0)]), ("third", [distance(1, 2), distance(0, 2)])):
        hours = compared_with(baseline).hours
        for bound, of_images, sign in ((hours.low, images.low, -1), (hours.high, images.high, 1)):
            of_both = np.linalg.norm([np.log(of_images / images.estimate), *distances])
            np.testing.assert_allclose(bound, images.estimate * ratio * np.exp(sign * of_both))
        np.testing.assert_allclose(hours.estimate, images.estimate * ratio)
        for of_seed, hours_of_seed in zip(images.per_seed, hours.per_seed, strict=True):
            np.testing.assert_allclose([hours_of_seed.low, hours_of_seed.high], of_seed.low * ratio)
    one_round = costs(cost_table(rounds[rounds["round"] == 0], "small", "base"))
    hours = compare_rows(metrics, costs=one_round).hours
    assert (hours.low, hours.high, hours.shown) == (0, np.inf, "not shown")


def test_the_arm_with_more_failed_runs_is_not_better_in_hours():
    base, cand = curves(9, 1.0), curves(9, 0.5, seed=1)
    cand[0, 2:] = np.nan
    comparison = compare_rows(study(base, cand), costs=known_costs(base=2.0, cand=2.0))
    assert comparison.images.high < 1 and comparison.images.shown == comparison.hours.shown == "not shown"


def test_the_primary_threshold_is_the_lowest_level_that_every_run_reaches():
    base, cand = curves(3, 1.0, noise=0), curves(3, 1.0, noise=0)
    base[1], cand[2] = base[1] * 1.234567, cand[2] * 0.5
    comparison = compared(base, cand)
    assert comparison.primary_threshold == 123.5  # 123.4567, rounded to the side that is easier to reach
    assert np.isfinite([seed.estimate for seed in comparison.images.per_seed]).all()
    cand[0, 2:] = np.nan  # a failed run does not count
    base[1] /= 1.234567
    assert compared(base, cand).primary_threshold == 100
    cand = curves(3, 1.0, noise=0)
    cand[1] = [300, 200, 150, 100, 121]  # its fit ends at 110
    assert compared(cand, cand).primary_threshold == 110
    recall = np.array([[0.0, 0.2, 0.3, 0.4, 0.56789], [0.0, 0.1, 0.3, 0.4, 0.6]])
    assert compared(recall, recall, metric="recall").primary_threshold == 0.5678
    assert compared(recall, 0 * recall, metric="recall").primary_threshold == 0


def test_other_thresholds_come_from_the_baseline_alone():
    base = curves(3, 1.0)
    first, last = stats.gmean(base[:, 1]), stats.gmean(base[:, -1])
    for factor in (0.5, 1.5):
        comparison = compared(base, curves(3, factor))
        thresholds = [value for value in comparison.thresholds if value != comparison.primary_threshold]
        np.testing.assert_allclose(thresholds, [first * (last / first) ** share for share in (0.25, 0.5, 0.75)])
    cand = curves(3, 1.0)
    cand[0, 2:] = np.nan
    comparison = compared(base, cand)
    np.testing.assert_allclose(
        [value for value in comparison.thresholds if value != comparison.primary_threshold], thresholds
    )
    only_candidate = compared(np.full((3, 5), np.nan), base)
    assert only_candidate.thresholds == [only_candidate.primary_threshold]


def test_a_run_that_never_reaches_a_threshold_is_censored_and_counted():
    base, cand = curves(3, 1.0, noise=0), curves(3, 1.0, noise=0)
    cand[1] *= 3
    total = compared(base, cand, [130.0]).images
    seed = total.per_seed[1]
    assert seed.candidate == np.inf and seed.censored == 1 and np.isnan(seed.estimate) and seed.high == np.inf
    np.testing.assert_allclose(seed.low, 12800 / seed.baseline)
    assert (total.pairs, total.censored) == (3, 1) and np.isnan(total.candidate)


def test_diverged_runs_are_counted_and_never_reach_a_threshold():
    base, cand = curves(3, 1.0), curves(3, 0.9)
    cand[2, 3:] = np.nan
    comparison = compared(base, cand)
    for effect in (comparison.average, comparison.final):
        assert (effect.pairs, effect.failed_candidate, effect.failed_baseline) == (2, 1, 0)
        assert [bool(np.isnan(seed.estimate)) for seed in effect.per_seed] == [False, False, True]
    for name in ("estimate", "low", "high", "baseline", "candidate"):
        assert getattr(comparison.average, name) == getattr(compared(base[:2], cand[:2]).average, name)
    for threshold in comparison.thresholds:
        assert comparison.effect("images", threshold).per_seed[2].candidate == np.inf


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        (310.0, "all runs reach it before their first checkpoint"),
        (50.0, "no run reaches it"),
        (105.0, "too few runs cross it between their checkpoints"),
    ],
)
def test_an_unknown_factor_has_its_reason(threshold, reason):
    base, cand = curves(2, 1.0, noise=0), curves(2, 0.9, noise=0)
    base[0, 1:], cand[1, 1:] = 110, 110
    assert f"The images to {threshold:.4g} are unknown, because {reason}." in str(compared(base, cand, [threshold]))


def test_a_factor_is_unknown_if_no_pair_crosses_the_threshold():
    both = np.array([[100.0, 100, 100, 100, 100], [300, 200, 200, 200, 200]])  # before its first checkpoint, never
    assert "because too few runs cross it between their checkpoints" in str(compared(both, both, [150.0]))


def test_a_factor_with_one_known_bound_is_not_unknown():
    base, cand = curves(4, 1.0), curves(4, 1.0, seed=1)
    cand[2:] *= 3
    comparison = compared(base, cand, [130.0])
    assert np.isnan(comparison.images.estimate) and comparison.images.low > 0
    assert "unknown" not in str(comparison)


def test_a_baseline_that_still_improves_is_named():
    flat, falls = np.array([[300.0, 110, 105, 102, 100]] * 2), curves(2, 1.0, noise=0)
    assert "The metric of base still falls by 33% over the last doubling of images" in str(compared(falls, flat))
    late = compared(falls[:, 3:], flat[:, 3:], steps=(300, 400))
    for comparison in (compared(flat, falls), compared(falls, flat, metric="kid"), late):
        assert "still falls" not in str(comparison)


def test_studies_of_which_every_run_diverged_have_no_result():
    base, cand = curves(2, 1.0), curves(2, 0.9)
    cand[:, 2:] = np.nan
    comparison = compared(base, cand)
    assert comparison.average.pairs == 0 and comparison.outcome == "undecided"
    assert "In every pair at least one run diverged" in str(comparison)
    base[:] = np.nan
    comparison = compared(base, cand)
    assert comparison.final.failed_baseline == 2 and comparison.thresholds == [] and comparison.images is None
    assert "nan" not in str(comparison) and np.isnan(comparison.primary_threshold)


@pytest.mark.parametrize(("metric", "name"), [("recall", "Recall"), ("density", "Density"), ("coverage", "Coverage")])
def test_shares_are_compared_by_differences_and_higher_is_better(metric, name):
    base = np.array([[0.0, 0.2, 0.3, 0.4, 0.5], [0.0, 0.1, 0.3, 0.4, 0.5], [0.0, 0.15, 0.3, 0.4, 0.5]])
    comparison = compared(base, base + [[0.1], [0.11], [0.1]], metric=metric)
    average, final = comparison.average, comparison.final
    np.testing.assert_allclose(average.estimate, 0.31 / 3)
    np.testing.assert_allclose(final.candidate, 0.5 + 0.31 / 3)
    assert 0 < average.low < average.estimate < average.high and average.shown == "better"
    assert comparison.images.estimate < 1 and comparison.margin is None and not comparison.within_margin
    assert comparison.scale == "difference" and f"{name} +0.103 on average (" in str(comparison)
    unreached = compared(base, base + [[0.1], [0.11], [0.1]], [0.9], metric=metric)
    assert unreached.headline == f"cand has a higher {name} on average than base"


@pytest.mark.parametrize(("metric", "change", "text"), [("kid", -0.04, "KD -0.04"), ("fd", -0.05, "FD -0.05")])
def test_metrics_that_can_be_zero_are_compared_by_differences(metric, change, text):
    base = np.array([[0.5, 0.3, 0.2, 0.1, 0.05]] * 2)
    comparison = compared(base, base + change, metric=metric)
    assert comparison.scale == "difference" and text in str(comparison)
    np.testing.assert_allclose(comparison.final.estimate, change)
    assert comparison.final.shown == "better"


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_value_that_is_not_finite_counts_as_missing(value):
    table, missing = study(curves(2, 1.0), curves(2, 0.9)), study(curves(2, 1.0), curves(2, 0.9))
    table.loc[2, "value"], missing.loc[2, "value"] = value, np.nan
    missing.loc[2, "reason"] = ""
    assert repr(compare_rows(table)) == repr(compare_rows(missing))


def test_a_short_run_is_named_since_all_runs_are_cut_to_it():
    table = study(curves(3, 1.0), curves(3, 0.9))
    short = table[~((table["arm"] == "cand") & (table["seed"] == 1) & (table["step"] > 200))]
    comparison, cut = compare_rows(short), compare_rows(table[table["step"] <= 200])
    assert repr(comparison.effects) == repr(cut.effects)
    text = str(comparison)
    assert "cand seed 1 ends at 6,400 training images: all runs are compared up to there, although 5 runs went" in text
    assert "went on" not in str(compare_rows(table))


def test_arms_with_different_checkpoints_are_compared_over_common_images():
    table = study(curves(3, 1.0), curves(3, 1.0))
    longer = table["images"] * np.where(table["arm"] == "cand", 2, 1)
    comparison = compare_rows(table.assign(images=longer))
    assert (comparison.first_images, comparison.last_images) == (6400, 12800)
    separate = table["images"] * np.where(table["arm"] == "cand", 10, 1)
    with pytest.raises(StudyError, match="share no range"):
        compare_rows(table.assign(images=separate))


def test_values_missing_for_another_reason_are_left_out_one_by_one():
    table = study(curves(2, 1.0), curves(2, 0.9))
    table.loc[[2, 12], ["value", "reason"]] = np.nan, "needs 4 images"
    average = compare_rows(table).average
    assert (average.pairs, average.failed_baseline) == (2, 0)
    assert compare_rows(table.assign(value=np.nan, reason="needs 4 images")) is None
    started = table[(table["arm"] == "base") | (table["seed"] == 0) | (table["step"] == 0)]
    assert compare_rows(started).seeds == (0,)


def test_the_table_has_a_row_per_seed_and_one_over_all_seeds(tmp_path):
    base, cand = curves(3, 1.0), curves(3, 0.9, seed=1)
    cand[1] *= 3  # never reaches most thresholds
    comparison = compared(base, cand)
    effects_table([comparison]).to_csv(tmp_path / "effects.csv", index=False)
    table = pd.read_csv(tmp_path / "effects.csv")
    assert list(table) == EFFECT_COLUMNS and len(table) == (2 + 4) * (3 + 1)
    assert table["seed"].isna().tolist() == [False, False, False, True] * 6
    np.testing.assert_array_equal(
        table[["of_baseline", "of_candidate", "estimate", "low", "high"]],
        [
            (effect.baseline, effect.candidate, effect.estimate, effect.low, effect.high)
            for total in comparison.effects
            for effect in (*total.per_seed, total)
        ],
    )
    assert effects_table([]).columns.tolist() == EFFECT_COLUMNS


# The comparison of curves in a notebook


def test_the_example_of_compare_runs():
    (example,) = doctest.DocTestFinder().find(convergence.compare, globs={"pd": pd, "compare": convergence.compare})
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert (result.attempted, result.failed) == (3, 0)


def test_compare_equals_the_comparison_of_a_study():
    table = study(curves(3, 1.0), curves(3, 0.8, seed=1))
    several = pd.concat([table.assign(metric="kid", value=1.0), table])
    comparison = convergence.compare(
        several[["arm", "seed", "images", "value", "metric"]], "base", "cand", thresholds=[150, 120]
    )
    expected = compare_rows(table, [150, 120])
    assert isinstance(comparison, convergence.Comparison) and isinstance(comparison.average, convergence.Effect)
    assert comparison.average.low == expected.average.low and comparison.thresholds == [150, 120]
    assert comparison.outcome == "faster" and str(comparison).startswith("cand is faster than base: it needs 0.")
    numbers = table.replace({"arm": {"base": 5, "cand": 6}})
    assert convergence.compare(numbers, "5", "6").average.low == expected.average.low


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"candidate": "nobody"}, "the column arm has no nobody: choose from base, cand"),
        ({}, {"metric": "kid"}, "the column metric has no kid: choose from fd"),
        ({"seed": "first"}, {}, "seed has a value that is not a number"),
        ({"seed": 0}, {}, "two values"),
        ({"study": list("ab") * 10}, {}, "the column study has several values (a, b): select the rows of one"),
        ({"value": np.nan}, {}, "no seed has fd values of both base and cand"),
    ],
)
def test_compare_rejects_what_it_cannot_use(change, arguments, message):
    table = study(curves(2, 1.0), curves(2, 0.9)).assign(**change)
    with pytest.raises(InputError, match=re.escape(message)):
        convergence.compare(table, **({"baseline": "base", "candidate": "cand"} | arguments))


def test_compare_needs_three_columns():
    with pytest.raises(InputError, match="missing columns: images, value"):
        convergence.compare(pd.DataFrame({"arm": ["a"]}), "a", "b")
