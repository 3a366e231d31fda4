import numpy as np
import pytest
from metric_tables import compare_rows, curves, study

from convergence.analysis.plan import plan
from convergence.analysis.power import cautious_sd, seeds_needed
from convergence.errors import StudyError
from convergence.tables import check_curves

COSTS = {"base": 281.25, "cand": 562.5}  # seconds per 1000 images: an hour and two per run


def test_the_plan_has_seeds_and_hours():
    metrics = study(curves(3, 1.0), curves(3, 1.0, seed=1))
    sd = compare_rows(metrics).noise.paired
    seeds, safe = (seeds_needed(np.log(1.02), value) for value in (sd, cautious_sd(sd, 3)))
    text = plan(metrics, "base", "cand", 0.02, COSTS)
    assert f"  {safe} seeds, {3.0 * safe:,.1f} hours of training in both arms, to be safe" in text
    assert f"  {seeds} seeds, {3.0 * seeds:,.1f} hours of training" in text and "FD (lite0)" in text


def test_a_plan_without_costs_has_no_hours():
    metrics = study(curves(3, 1.0), curves(3, 1.0, seed=1))
    text = plan(check_curves(metrics[["arm", "seed", "images", "value"]]), "base", "cand", 0.02)
    assert "Pilot: 3 pairs, FID," in text and " seeds, if this is the true standard deviation" in text
    assert "hours" not in text.lower()


def test_a_plan_for_shares_is_in_differences():
    base = np.array([[0.0, 0.2, 0.3, 0.4, 0.5], [0.0, 0.1, 0.3, 0.4, 0.5], [0.0, 0.1, 0.2, 0.4, 0.5]])
    text = plan(study(base, base + [[0.1], [0.2], [0.15]], metric="recall"), "base", "cand", 0.1)
    assert "a difference of 0.1 with 80% power" in text and "%)" not in text.splitlines()[2]


@pytest.mark.parametrize(
    ("seeds", "effect", "message"),
    [(3, 1e-6, "more than 10,000 seeds"), (1, 0.02, "The pilot has 1 pairs of base and cand that did not diverge")],
)
def test_a_plan_that_is_impossible_says_why(seeds, effect, message):
    metrics = study(curves(seeds, 1.0), curves(seeds, 0.9, seed=1))
    with pytest.raises(StudyError, match=message):
        plan(metrics, "base", "cand", effect)


def test_arms_that_are_identical_or_differ_by_a_constant_have_no_plan():
    base = curves(3, 1.0)
    cand = base * (1 + 1e-14 * np.random.default_rng(0).standard_normal(base.shape))
    with pytest.raises(StudyError, match="base and cand are identical in the pilot"):
        plan(study(base, cand), "base", "cand", 0.02)
    with pytest.raises(StudyError, match="the pilot shows no noise"):
        plan(study(base, 0.9 * base), "base", "cand", 0.02)


def test_arms_without_common_seeds_have_no_plan():
    metrics = study(curves(2, 1.0), curves(2, 0.9))
    apart = metrics.assign(seed=metrics["seed"] + 10 * (metrics["arm"] == "cand"))
    with pytest.raises(StudyError, match="The pilot has 0 pairs"):
        plan(apart, "base", "cand", 0.02)
