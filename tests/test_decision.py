"""What a verdict concludes: the decision table, the cases that it exists for, the frozen plan."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from metric_tables import PLAN, STEPS, compare_rows, curves, study, verdict_on
from scipy import stats

from convergence import layout
from convergence.analysis.decision import decide
from convergence.analysis.effects import shown
from convergence.analysis.notes import is_skewed, outlier
from convergence.analysis.verdict import to_markdown
from convergence.schema import Experiment
from convergence.study_plan import current_plan, plan_changes, plan_in_force, record_plan
from diffusion.errors import FileError

MIRROR = {
    "better": "worse", "worse": "better", "faster": "slower", "better on average": "worse on average",
}  # fmt: skip
MIRROR |= {after: before for before, after in MIRROR.items()}


def compared(base, cand, thresholds=None, margin=None):
    return compare_rows(study(base, cand), thresholds, margin, role="primary")


# The table


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize(
    ("average", "final", "images"), list(itertools.product(["better", "worse", "not shown"], repeat=3))
)
def test_every_combination_has_its_row(average, final, images, margin):
    mirrored = average == "worse"
    a, e, s = (MIRROR.get(value, value) if mirrored else value for value in (average, final, images))
    if a == "better":
        if e == "worse" or s == "worse":
            expected = "curves cross"
        else:
            expected = {"better": "faster", "not shown": "better on average"}[s]
    elif not margin:
        expected = "undecided"
    else:
        expected = "the same" if (e, s) == ("not shown", "not shown") else "the same on average"
    expected = MIRROR.get(expected, expected) if mirrored else expected
    assert decide(average, final, images, margin) == expected


@pytest.mark.parametrize(
    ("low", "high", "baseline", "candidate", "expected"),
    [
        (0.01, 0.1, 0, 0, "worse"),
        (-0.1, -0.01, 0, 0, "better"),
        (-0.01, 0.1, 0, 0, "not shown"),
        (0.0, 0.0, 0, 0, "not shown"),
        (-np.inf, np.inf, 0, 0, "not shown"),
        (0.01, 0.1, 1, 0, "not shown"),
        (0.01, 0.1, 0, 1, "worse"),
        (-0.1, -0.01, 0, 1, "not shown"),
        (-0.1, -0.01, 1, 0, "better"),
    ],
)
def test_the_interval_decides_unless_the_better_arm_failed_more(low, high, baseline, candidate, expected):
    assert shown(low, high, baseline, candidate) == expected


# Curves that give each row

PLATEAU = np.array([300.0, 110, 105, 102, 121])  # leads early, ends 21% above the baseline
LATE = np.array([300.0, 125, 124, 123, 100])  # leads early, is above the baseline at the third checkpoint
BASE = np.array([300.0, 200, 150, 120, 100])
JITTER = np.exp(0.001 * np.random.default_rng(6).standard_normal((2, 3, 5)))


@pytest.mark.parametrize(
    ("base", "cand", "outcome", "lead", "numbers"),
    [
        (BASE, 0.9 * BASE, "faster", "cand is faster than base", "it needs 0."),
        (BASE, 0.9 * BASE, "faster", "cand is faster than base", "; FD -10."),
        (BASE, 1.1 * BASE, "slower", "cand is slower than base", "it needs 1."),
        (BASE, PLATEAU, "curves cross", "The curves of cand and base cross at about 10,9", "last checkpoint (+20."),
        (BASE, PLATEAU, "curves cross", "The curves", "cand is better before and worse after; FD -"),
        (PLATEAU, BASE, "curves cross", "The curves of cand and base cross at about 10,9", "last checkpoint (-17."),
        (PLATEAU, BASE, "curves cross", "The curves", "cand is worse before and better after; FD +"),
        (
            BASE,
            BASE * [1, 0.5, 1.1, 0.9, 1.2],
            "curves cross",
            "The curves of cand and base cross at about 10,",
            "FD -",
        ),
        (BASE, BASE, "the same", "cand and base are the same within 2%", "on average (90% interval: "),
        (
            BASE,
            [300, 200 / 1.21, 150, 120, 121],
            "the same on average",
            "cand and base are the same within 2% on average, not at the end",
            "FD +21.0% at the last checkpoint",
        ),
        (BASE, LATE, "curves cross", "The curves of cand and base cross at about 9,1", "times the images (1.0"),
        (BASE, LATE, "curves cross", "The curves", "the early lead of cand is lost before the threshold; FD -"),
        (LATE, BASE, "curves cross", "The curves", "the early lead of base is lost before the threshold; FD +"),
    ],
)
def test_curves_give_the_row_that_describes_them(base, cand, outcome, lead, numbers):
    threshold = [121.0] if base is LATE or cand is LATE else None
    comparison = compared(base * JITTER[0], np.array(cand) * JITTER[1], threshold)
    said, evidence = comparison.sentence()
    assert comparison.outcome == outcome, str(comparison)
    assert said.startswith(lead) and numbers in evidence


def test_an_arm_that_ends_worse_is_not_faster():
    """Its level is lower on average, with an interval that excludes 0: the mean alone would call it faster."""
    comparison = compared(BASE * JITTER[0], PLATEAU * JITTER[1])
    assert comparison.average.shown == "better" and comparison.final.low > 20
    assert comparison.outcome == "curves cross" and "no single answer" in str(comparison)
    np.testing.assert_allclose(comparison.cross_images, 11_000, rtol=0.05)
    failed = np.append(BASE[:3], [np.nan, np.nan])
    with_failed = compared(np.vstack([BASE * JITTER[0], failed]), np.vstack([PLATEAU * JITTER[1], failed]))
    assert with_failed.outcome == "curves cross" and with_failed.cross_images == comparison.cross_images


def test_an_arm_that_arrives_later_is_not_faster():
    comparison = compared(BASE * JITTER[0], LATE * JITTER[1], [121.0])
    assert comparison.average.shown == "better" and comparison.images.low > 1
    assert comparison.outcome == "curves cross"


def test_equivalence_needs_the_90_interval_within_the_margin():
    arms = curves(5, 1.0, noise=0.01), curves(5, 1.0, noise=0.01, seed=1)
    for base, cand in (arms, arms[::-1]):
        low, high = compared(base, cand).average_90
        for margin, outcome in ((1.001 * max(-low, high), "the same"), (0.999 * max(-low, high), "undecided")):
            comparison = compared(base, cand, margin=margin)
            assert (comparison.outcome, comparison.within_margin) == (outcome, outcome == "the same")
            assert (f"(90% interval: {low:+.1f} to {high:+.1f})" in str(comparison)) == comparison.within_margin


@pytest.mark.parametrize(("thresholds", "outcome"), [(None, "slower"), ([50.0], "worse on average")])
def test_a_shown_difference_within_the_margin_says_so(thresholds, outcome):
    comparison = compared(BASE * JITTER[0], 1.01 * BASE * JITTER[1], thresholds)
    assert comparison.outcome == outcome and ", within the margin of 2%" in str(comparison)


def test_sentences_list_what_is_shown_and_all_quantities_before_the_planned_seeds_are_complete():
    shown, equal = compared(BASE * JITTER[0], 0.9 * BASE * JITTER[1]), compared(BASE * JITTER[0], BASE * JITTER[1])
    for comparison, outcome, listed in (
        (shown, "undecided", True),
        (equal, "undecided", False),
        (equal, "interim", True),
        (shown, "the same on average", True),
    ):
        _, numbers = replace(comparison, outcome=outcome, margin=2.0).sentence()
        assert ("at the last checkpoint" in numbers, "cand needs" in numbers) == (listed, listed)


def test_arms_with_failed_runs_are_not_the_same():
    base, cand = BASE * np.ones((4, 1)), BASE * np.exp(0.001 * np.random.default_rng(1).standard_normal((4, 5)))
    assert compared(base, cand).outcome == "the same"
    cand[3, 3:] = np.nan
    comparison = compared(base, cand)
    assert comparison.within_margin and comparison.outcome == "undecided"
    assert "1 run of cand of 4 diverged or collapsed." in comparison.notes


@pytest.mark.parametrize("seeds", [1, 3])
def test_arms_with_equal_values_are_identical(seeds):
    base = curves(seeds, 1.0)
    comparison = compared(base, base)
    assert comparison.outcome == "identical" and comparison.headline == "cand and base are identical"
    assert compared(base, base * (1 + 1e-13)).outcome == "identical"
    assert compared(base, base * (1 + 1e-5)).outcome != "identical"
    assert compared(base, base * [1, 1, 1, 1, 1.01]).outcome != "identical"


# Unusual pairs


def test_an_outlier_is_outside_of_the_prediction_interval_of_the_others():
    rng = np.random.default_rng(0)
    for size in (3, 5, 10):
        found = [outlier(rng.standard_normal(size)) is not None for _ in range(2000)]
        assert 0.035 < np.mean(found) < 0.065
    others = np.array([0.0, 1, 2, 3])
    limit = stats.t.ppf(1 - 0.05 / 10, 3) * others.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert outlier(np.append(others, 1.5 + 1.001 * limit)) == 4
    assert outlier(np.append(others, 1.5 + 0.999 * limit)) is None
    assert outlier(np.array([1.0, 9.0])) is None and outlier(np.zeros(4)) is None


def test_skewness_is_rarely_found_in_normal_pairs():
    rng = np.random.default_rng(0)
    for size in (5, 10, 30):
        assert 0.02 < np.mean([is_skewed(rng.standard_normal(size)) for _ in range(500)]) < 0.09
        for sign in (-1, 1):
            assert np.mean([is_skewed(sign * rng.exponential(size=size) ** 3) for _ in range(50)]) > 0.3
    assert not is_skewed(np.array([0.0, 0, 0, 9]))


def test_an_outlier_is_reported_with_the_sign_test_and_the_result_without_it():
    base, cand = curves(6, 1.0, noise=0.002), curves(6, 0.99, noise=0.002, seed=1)
    cand[4] *= 1.5
    comparison = compared(base, cand)
    without = compared(np.delete(base, 4, 0), np.delete(cand, 4, 0)).average
    (note,) = [note for note in comparison.notes if "outlier" in note]
    assert note.startswith("The pair of seed 4 is an outlier: 5 of 6 pairs are better (sign test p = 0.22)")
    assert note.endswith(
        f"without it the average is {without.estimate:+.1f}% ({without.low:+.1f} to {without.high:+.1f})."
    )
    assert any(note.startswith("cand seed 4 is unlike the other runs of its arm (+") for note in comparison.notes)


def test_skewed_pairs_without_an_outlier_are_reported():
    differences = 0.01 * np.array([-1.0] * 10 + [5, 5])
    note = compared(np.tile(BASE, (12, 1)), BASE * np.exp(differences)[:, None]).notes[0]
    assert note.startswith("The pairs are skewed: 10 of 12 pairs are better (sign test p = 0.039).")


# Planned seeds


def test_nothing_is_concluded_before_the_planned_seeds_are_complete():
    base, cand = curves(4, 1.0), curves(4, 0.8)
    plan = PLAN.model_copy(update={"seeds": (0, 1, 2, 3, 4), "last_step": 400})
    verdict = verdict_on(study(base, cand), plan)
    assert verdict.outcome == "interim" and verdict.answer.startswith(
        "Interim result of cand and base: FD -20.0% on average ("
    )
    assert "At this noise, 4 seeds detect a difference of" in verdict.answer
    assert "Planned runs are not evaluated yet (base seed 4, cand seed 4), so nothing is concluded." in verdict.answer
    complete = plan.model_copy(update={"seeds": (0, 1, 2, 3)})
    assert verdict_on(study(base, cand), complete).outcome == "faster"
    unfinished = study(base, cand).query("not (arm == 'cand' and seed == 3 and step == 400)")
    assert verdict_on(unfinished, complete).outcome == "interim"


def test_seeds_that_were_not_planned_do_not_decide():
    base, cand = curves(6, 1.0, noise=0), curves(6, 1.0, noise=0.003)
    cand[3:] *= 0.7
    plan = PLAN.model_copy(update={"seeds": (0, 1, 2), "last_step": 400})
    verdict = verdict_on(study(base, cand), plan)
    planned, replication = verdict.comparisons
    assert verdict.outcome == planned.outcome == verdict_on(study(base[:3], cand[:3]), plan).outcome
    assert (planned.seeds, replication.seeds, replication.role) == ((0, 1, 2), (3, 4, 5), "replication")
    assert "| replication |" not in to_markdown(verdict)
    assert replication.outcome == "faster" and "- Seeds 3, 4, 5: cand is faster than base" in to_markdown(verdict)


def test_checkpoints_after_the_last_planned_one_do_not_decide():
    base, cand = curves(3, 1.0), curves(3, 0.9)
    plan = PLAN.model_copy(update={"last_step": 300})
    cut = verdict_on(study(base[:, :4], cand[:, :4], steps=STEPS[:4]), plan)
    assert verdict_on(study(base, cand), plan).answer == cut.answer


# The frozen plan


def test_thresholds_and_margin_of_the_plan_are_those_of_the_primary_metric():
    fd = study(curves(3, 1.0), curves(3, 0.9, seed=1))
    others = fd.assign(metric="kid", value=fd["value"] / 1000), fd.assign(features="other")
    plan = PLAN.model_copy(update={"thresholds": (150.0,), "margin": 30.0})
    primary, *secondary = verdict_on(pd.concat([fd, *others]), plan).comparisons
    assert (primary.role, primary.thresholds, primary.margin, primary.within_margin) == ("primary", [150], 30, True)
    assert [(c.role, 150 in c.thresholds, c.margin) for c in secondary] == [
        ("secondary", False, None),
        ("secondary", False, 2),
    ]


def experiment(**compare):
    compare = {"baseline": "a", "candidates": ["b"], "primary": {"candidate": "b"}} | compare
    evaluate = {"features": ["efficientnet-lite0"], "metrics": ["fd", "kid"]}
    return Experiment(
        name="mine", dataset={"source": "openmoji", "image_size": 16}, checkpoints=[4, 8], seeds=[0, 1],
        arms={"a": {}, "b": {}}, compare=compare, evaluate=evaluate, probe=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("compare", "margin", "scale"),
    [
        ({}, 2.0, "ratio"),
        ({"margin": "0.5%"}, 0.5, "ratio"),
        ({"primary": {"candidate": "b", "metric": "kid"}}, None, "difference"),
        ({"primary": {"candidate": "b", "metric": "kid"}, "margin": 0.001}, 0.001, "difference"),
    ],
)
def test_the_margin_has_the_unit_of_the_metric(compare, margin, scale):
    plan = current_plan(experiment(**compare))
    assert (plan.margin, plan.scale, plan.seeds, plan.last_step) == (margin, scale, (0, 1), 8)


@pytest.mark.parametrize(
    ("metric", "margin"), [("fd", 0.02), ("fd", "2"), ("fd", "-1%"), ("kid", "2%"), ("kid", 0), ("kid", "x%")]
)
def test_a_margin_in_another_unit_is_refused(metric, margin):
    with pytest.raises(ValueError, match="margin"):
        experiment(primary={"candidate": "b", "metric": metric}, margin=margin)


def test_the_plan_is_frozen_when_the_first_checkpoint_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = experiment(), experiment(planned_seeds=[0, 1, 2], margin="5%", thresholds=[90, 80])
    record_plan(first)
    record_plan(second)  # nothing is evaluated yet
    assert plan_in_force(first) == current_plan(first)
    assert layout.plan_path("mine").read_text() == current_plan(second).model_dump_json(indent=1) + "\n"
    table = layout.step_directory("mine", "a", first.run("a"), 0, 4) / "metrics.csv"
    table.parent.mkdir(parents=True)
    table.touch()
    record_plan(first)
    frozen = plan_in_force(first)
    assert frozen == current_plan(second) and not frozen.after_results
    assert plan_changes(frozen, current_plan(first)) == (
        "thresholds was 90.0, 80.0 and is unset in the study file.",
        "margin was 5.0 and is 2.0 in the study file.",
        "seeds was 0, 1, 2 and is 0, 1 in the study file.",
    )
    layout.plan_path("mine").write_text("{}")
    with pytest.raises(FileError, match=r"plan\.json: is not the plan of a study"):
        plan_in_force(first)
    layout.plan_path("mine").unlink()
    record_plan(first)
    assert plan_in_force(first).after_results
    (late,) = plan_changes(plan_in_force(first), current_plan(first))
    assert "recorded after results existed" in late


@pytest.mark.parametrize(
    ("section", "change", "listed"),
    [
        ("train", {"batch_size": 7}, ["runs"]),
        ("sample", {"steps": 7}, ["evaluation"]),
        ("sample", {"keep": True}, []),
        ("evaluate", {"metrics": ("fd",)}, ["evaluation"]),
        ("evaluate", {"weights": {"efficientnet-lite0": {"path": "here.pth"}}}, []),
    ],
)
def test_settings_that_change_values_are_part_of_the_plan(section, change, listed):
    before = experiment()
    after = before.model_copy(update={section: getattr(before, section).model_copy(update=change)})
    changes = plan_changes(current_plan(before), current_plan(after))
    assert [change.split()[0] for change in changes] == listed and "{" not in "".join(changes)


def test_a_study_that_compares_nothing_has_no_plan():
    assert current_plan(experiment().model_copy(update={"compare": None})) is None


def test_the_verdict_lists_what_was_changed_after_results_were_seen():
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    text = to_markdown(verdict_on(metrics, plan_changes=["margin was 5.0 and is 2.0 in the study file."]))
    assert "**Changed after results were seen.** The verdict judges by the plan." in text
    assert "- margin was 5.0 and is 2.0 in the study file." in text
    assert "Changed after" not in to_markdown(verdict_on(metrics))
