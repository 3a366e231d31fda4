"""How well intervals and outcomes hold on simulated studies, also if somebody looks after each seed."""

import numpy as np
import pytest
from metric_tables import PLAN, compare_rows, study, verdict_on

from benchmarks import coverage, looks
from benchmarks.simulation import NOISES, effects, outcomes, simulate
from convergence.analysis.curves import mean_over_images
from convergence.analysis.intervals import t_interval

MANY = coverage.SEEDS[1:]


def table(levels):
    """The long table of one study, from levels [seeds, 2, 5]."""
    return study(*np.exp(levels.swapaxes(0, 1)), steps=[100, 200, 300, 400, 500])


@pytest.mark.parametrize("seeds", MANY)
@pytest.mark.parametrize(
    ("noise", "factor"),
    [
        ("2%, paired", 1.0),
        ("5%, paired", 0.67),
        ("14%, as published (Flowers)", 1.0),
        ("14%, as published (Flowers)", 0.5),
    ],
)
def test_intervals_of_known_pairs_have_the_stated_coverage(seeds, noise, factor):
    result = coverage.coverage(np.random.default_rng(seeds), 2000, seeds, factor, NOISES[noise], 0.5)
    assert result.censored.mean() < 0.15
    assert 0.93 <= result.covered[~result.censored].mean() <= 0.97
    assert 0.93 <= result.covered.mean() <= 0.97


@pytest.mark.parametrize("seeds", MANY)
@pytest.mark.parametrize(("factor", "share"), [(1.25, 0.9), (1.0, 1.0), (0.8, 1.0), (0.5, 1.0)])
def test_intervals_of_censored_pairs_have_at_least_the_stated_coverage(seeds, factor, share):
    result = coverage.coverage(np.random.default_rng(seeds), 1000, seeds, factor, NOISES["5%, paired"], share)
    assert result.censored.mean() > 0.5
    assert result.covered.mean() >= 0.93
    if factor != 1 and seeds > 3:  # most intervals are bounded
        bounded = np.isfinite(result.reach[:, int(factor < 1)])
        assert bounded.mean() > 0.6 and np.median(result.reach[bounded, int(factor < 1)]) < 1


def false_alarms(noise, seeds):
    """How often the interval of A shows the candidate to be better and worse, in % of studies without a difference."""
    levels, images = simulate(np.random.default_rng(seeds), 2000, seeds, 1.0, NOISES[noise])
    _, low, high = t_interval(mean_over_images(levels[:, :, 1] - levels[:, :, 0], images))
    return 100 * np.mean(high < 0), 100 * np.mean(low > 0)


@pytest.mark.parametrize("seeds", coverage.SEEDS)
@pytest.mark.parametrize("noise", [noise for noise in list(NOISES)[2:] if not NOISES[noise].bad])
def test_false_alarms_are_rare(seeds, noise):
    assert sum(false_alarms(noise, seeds)) <= 6.5


@pytest.mark.parametrize(("seeds", "known"), [(2, 11), (3, 24), (5, 37)])
def test_bad_runs_in_one_arm_cause_false_alarms(seeds, known):
    better, worse = false_alarms("5%, 15% bad runs in the candidate", seeds)
    assert better == pytest.approx(known, abs=2.5) and worse < 3


def test_looking_after_each_seed_causes_no_false_alarms_under_a_plan():
    every_look, planned = 100 * looks.rates(np.random.default_rng(0), 3000).T
    np.testing.assert_allclose(every_look, [5, 8.8, 13.5, 19.8], atol=1.5)
    assert planned.max() <= 6.0  # 5.5 plus sampling error


@pytest.mark.parametrize(
    ("noise", "factor"),
    [("2%, paired", 0.85), ("2%, paired", 1.0), ("5%, paired", 0.85), ("5%, a level of 5% per run", 0.85)],
)
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_simulated_outcomes_are_those_of_the_analysis(noise, factor, seeds):
    levels, images = simulate(np.random.default_rng(seeds), 10, seeds, factor, NOISES[noise], checkpoints=5)
    found = [compare_rows(table(of_study)).outcome for of_study in levels]
    assert found == outcomes(effects(levels, images))


@pytest.mark.parametrize("planned", [3, 5])
def test_a_verdict_claims_nothing_before_the_planned_seeds_and_later_ones_change_nothing(planned):
    levels, images = simulate(np.random.default_rng(0), 200, 7, 1.0, looks.NOISE, checkpoints=5)
    early = effects(levels[:, :2], images).average
    plan = PLAN.model_copy(update={"seeds": tuple(range(planned)), "last_step": 500})
    for of_study in levels[(early.low > 0) | (early.high < 0)][:3]:  # they show a difference at the first look
        verdicts = [verdict_on(table(of_study[:seeds]), plan) for seeds in range(2, 8)]
        found = [verdict.outcome for verdict in verdicts]
        assert found[: planned - 2] == ["interim"] * (planned - 2)
        assert found[planned - 2] == compare_rows(table(of_study[:planned])).outcome
        assert len(set(found[planned - 2 :])) == 1
        assert [verdict.comparisons[-1].role for verdict in verdicts[planned - 1 :]] == ["replication"] * (7 - planned)
