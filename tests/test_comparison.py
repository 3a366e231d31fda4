import doctest
import re

import numpy as np
import pandas as pd
import pytest
from metric_tables import COMPARE, curves, study
from scipy import stats

import convergence
from convergence.analysis.comparison import (
    SPEEDUP_COLUMNS,
    compare_pair,
    compare_study,
    speedup_table,
)
from convergence.analysis.effects import decide
from convergence.errors import StudyError
from diffusion.errors import InputError


def compared(base, cand, thresholds=None, **columns):
    return compare_pair(study(base, cand, **columns), "base", "cand", thresholds)


def test_the_primary_endpoint_is_the_paired_t_test_of_mean_logs():
    base, cand = curves(4, 1.0), curves(4, 0.9, seed=1)
    comparison = compared(base, cand)
    weights = np.array([0, 0.5, 1, 1, 0.5]) / 3  # trapezoidal rule over the trained checkpoints
    interval = stats.ttest_rel(np.log(base) @ weights, np.log(cand) @ weights).confidence_interval(0.95)
    average = comparison.average
    np.testing.assert_allclose((average.low, average.high), (interval.low, interval.high))
    final = comparison.effect("final")
    interval = stats.ttest_rel(np.log(base[:, -1]), np.log(cand[:, -1])).confidence_interval(0.95)
    np.testing.assert_allclose((final.low, final.high), (interval.low, interval.high))
    np.testing.assert_allclose(final.candidate, stats.gmean(cand[:, -1]))
    assert (average.pairs, average.censored) == (4, 0)
    assert (comparison.first_images, comparison.last_images, comparison.seeds) == (3200, 12800, (0, 1, 2, 3))


def test_seeds_are_paired_in_any_order_of_rows():
    table = study(curves(3, 1.0), curves(3, 0.9, seed=1))
    tables = [speedup_table([compare_pair(rows, "base", "cand")]) for rows in (table, table.sample(frac=1))]
    pd.testing.assert_frame_equal(*tables)


def test_speedup_in_images_and_seconds():
    base = np.array([[300.0, 80, 40, 80 / 3, 20]])  # 8000 / step
    comparison = compared(base, base * [[1, 0.5, 0.5, 0.5, 0.5]], [25.0, 30.0])
    assert comparison.thresholds == [30, 25]
    images, seconds = (comparison.effect(axis, 30.0) for axis in ("images", "seconds"))
    np.testing.assert_allclose(np.exp(images.estimate), 2)
    np.testing.assert_allclose(images.baseline, 32 * 8000 / 30)
    np.testing.assert_allclose(np.exp(seconds.estimate), 2 * 0.5 / 0.6)
    assert (images.low, images.high) == (-np.inf, np.inf)  # one seed
    assert comparison.effect("images") is images
    with pytest.raises(KeyError):
        comparison.effect("images", 31.0)


def test_thresholds_come_from_the_baseline_alone():
    base = curves(3, 1.0)
    first, last = stats.gmean(base[:, 1]), stats.gmean(base[:, -1])
    for factor in (0.5, 1.5):
        thresholds = compared(base, curves(3, factor)).thresholds
        np.testing.assert_allclose(thresholds, [first * (last / first) ** share for share in (0.25, 0.5, 0.75)])


def test_a_run_that_never_reaches_a_threshold_is_censored_and_counted():
    base, cand = curves(3, 1.0, noise=0), curves(3, 1.0, noise=0)
    cand[1] *= 3
    total = compared(base, cand, [130.0]).effect("images")
    seed = total.per_seed[1]
    assert seed.candidate == np.inf and seed.censored == 1 and np.isnan(seed.estimate) and seed.low == -np.inf
    np.testing.assert_allclose(seed.high, np.log(seed.baseline / 12800))
    assert (total.pairs, total.censored) == (3, 1) and np.isnan(total.candidate)


def test_diverged_runs_are_counted_and_never_reach_a_threshold():
    base, cand = curves(3, 1.0), curves(3, 0.9)
    cand[2, 3:] = np.nan
    comparison = compared(base, cand)
    for quantity in ("average", "final"):
        effect = comparison.effect(quantity)
        assert (effect.pairs, effect.failed_candidate, effect.failed_baseline) == (2, 1, 0)
        assert [bool(np.isnan(seed.estimate)) for seed in effect.per_seed] == [False, False, True]
    assert comparison.average.estimate == compared(base[:2], cand[:2]).average.estimate
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
def test_an_unknown_speedup_has_its_reason(threshold, reason):
    base, cand = curves(2, 1.0, noise=0), curves(2, 0.9, noise=0)
    base[0, 1:], cand[1, 1:] = 110, 110
    text = str(compared(base, cand, [threshold]))
    assert f"Speed-up in images to FD (lite0) {threshold:.4g}: unknown, because {reason}." in text


def test_studies_of_which_every_run_diverged_have_no_result():
    base, cand = curves(2, 1.0), curves(2, 0.9)
    cand[:, 2:] = np.nan
    comparison = compared(base, cand)
    assert comparison.average.pairs == 0 and comparison.outcome == "no difference shown"
    assert "at least one diverged" in str(comparison)
    base[:] = np.nan
    comparison = compared(base, cand)
    assert comparison.effect("final").failed_baseline == 2 and comparison.thresholds == []
    assert "nan" not in str(comparison) and np.isnan(comparison.middle_threshold)


def test_shares_are_compared_by_differences_and_higher_is_better():
    base = np.array([[0.0, 0.2, 0.3, 0.4, 0.5], [0.0, 0.1, 0.3, 0.4, 0.5]])
    comparison = compared(base, base + 0.1, metric="recall")
    np.testing.assert_allclose(comparison.average.estimate, 0.1)
    np.testing.assert_allclose(comparison.effect("final").candidate, 0.6)
    np.testing.assert_allclose(comparison.middle_threshold, 0.325)
    assert comparison.effect("images").estimate > 0
    assert comparison.scale == "plain" and ": +0.1 (" in str(comparison)


def test_a_distance_that_is_not_positive_is_compared_by_differences():
    base = np.array([[0.5, 0.3, 0.2, 0.1, 0.05]] * 2)
    comparison = compared(base, base - 0.06, metric="kid")
    assert comparison.scale == "plain" and ": -0.06 (" in str(comparison)
    np.testing.assert_allclose(comparison.effect("final").estimate, 0.06)


def test_arms_with_different_checkpoints_are_compared_over_common_images():
    table = study(curves(3, 1.0), curves(3, 1.0))
    longer = table["images"] * np.where(table["arm"] == "cand", 2, 1)
    comparison = compare_pair(table.assign(images=longer), "base", "cand")
    assert (comparison.first_images, comparison.last_images) == (6400, 12800)
    separate = table["images"] * np.where(table["arm"] == "cand", 10, 1)
    with pytest.raises(StudyError, match="share no range"):
        compare_pair(table.assign(images=separate), "base", "cand")


def test_values_missing_for_another_reason_are_left_out_one_by_one():
    table = study(curves(2, 1.0), curves(2, 0.9))
    table.loc[[2, 12], ["value", "reason"]] = np.nan, "needs 4 images"
    average = compare_pair(table, "base", "cand").average
    assert (average.pairs, average.failed_baseline) == (2, 0)
    assert compare_pair(table.assign(value=np.nan, reason="needs 4 images"), "base", "cand") is None


def test_one_comparison_is_primary():
    both = [study(curves(2, 1.0), curves(2, 0.9), metric=m, features=f) for m in ("fd", "kid") for f in ("a", "b")]
    comparisons = compare_study(pd.concat(both), COMPARE | {"thresholds": [150.0], "features": "b"})
    (primary,) = [comparison for comparison in comparisons if comparison.primary]
    assert (primary.metric, primary.features, primary.thresholds) == ("fd", "b", [150])
    assert len(comparisons) == 4
    assert all(len(comparison.thresholds) == 3 for comparison in comparisons if not comparison.primary)
    assert compare_study(pd.concat(both).iloc[:0], COMPARE) == []


def test_the_table_has_a_row_per_seed_and_one_over_all_seeds(tmp_path):
    base, cand = curves(3, 1.0), curves(3, 0.9, seed=1)
    cand[1] *= 3  # never reaches a threshold
    comparison = compared(base, cand)
    speedup_table([comparison]).to_csv(tmp_path / "speedup.csv", index=False)
    table = pd.read_csv(tmp_path / "speedup.csv")
    assert list(table) == SPEEDUP_COLUMNS and len(table) == (2 + 2 * 3) * (3 + 1)
    assert table["seed"].isna().tolist() == [False, False, False, True] * 8
    np.testing.assert_array_equal(
        table[["of_baseline", "of_candidate", "effect", "low", "high"]],
        [
            (effect.baseline, effect.candidate, effect.estimate, effect.low, effect.high)
            for total in comparison.effects
            for effect in (*total.per_seed, total)
        ],
    )
    assert comparison.middle_threshold == comparison.thresholds[1]
    assert speedup_table([]).columns.tolist() == SPEEDUP_COLUMNS


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
def test_the_interval_decides_unless_the_better_arm_diverged_more(low, high, baseline, candidate, expected):
    assert decide(low, high, baseline, candidate) == expected


# The comparison of curves in a notebook


def test_the_example_of_compare_runs():
    (example,) = doctest.DocTestFinder().find(convergence.compare, globs={"pd": pd, "compare": convergence.compare})
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert (result.attempted, result.failed) == (3, 0)


def test_compare_equals_the_comparison_of_a_study():
    table = study(curves(3, 1.0), curves(3, 0.8, seed=1))
    comparison = convergence.compare(table[["arm", "seed", "images", "value"]], "base", "cand", thresholds=[150, 120])
    expected = compare_pair(table, "base", "cand", [150, 120])
    assert isinstance(comparison, convergence.Comparison) and isinstance(comparison.average, convergence.Effect)
    assert comparison.average.low == expected.average.low and comparison.thresholds == [150, 120]
    assert str(comparison).startswith("cand is faster than base in FID: -")
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
        ({"value": np.nan}, {}, "no seed has values of fd of both base and cand"),
    ],
)
def test_compare_rejects_what_it_cannot_use(change, arguments, message):
    table = study(curves(2, 1.0), curves(2, 0.9)).assign(**change)
    with pytest.raises(InputError, match=re.escape(message)):
        convergence.compare(table, **({"baseline": "base", "candidate": "cand"} | arguments))


def test_compare_needs_three_columns():
    with pytest.raises(InputError, match="missing columns: images, value"):
        convergence.compare(pd.DataFrame({"arm": ["a"]}), "a", "b")
