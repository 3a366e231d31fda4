"""Tables of metrics with known values, for tests of the analysis and of the figures."""

import numpy as np
import pandas as pd

from convergence.analysis.comparison import compare_pairs
from convergence.analysis.cost import cost_table, costs
from convergence.analysis.pairs import pair_runs
from convergence.analysis.verdict import judge
from convergence.rows import COLUMNS, PROBE_COLUMNS, of_rounds
from convergence.study_plan import StudyPlan

STEPS = (0, 100, 200, 300, 400)

COMPARE = {"baseline": "base", "candidates": ["cand"]}
PLAN = StudyPlan(
    baseline="base",
    candidates=("cand",),
    candidate="cand",
    features="lite0",
    metric="fd",
    thresholds=None,
    margin=2.0,
    seeds=None,
    last_step=None,
)


def study(base, cand, metric="fd", steps=STEPS, features="lite0", name="small"):
    """The long table of two arms; `base` and `cand` have a row of values per seed, NaN for a diverged run."""
    rows = [
        (name, arm, seed, step, 32 * step, 0.5 * step, features, metric, value, np.nan, 500, reason)
        for arm, values_of_seeds in (("base", base), ("cand", cand))
        for seed, values in enumerate(values_of_seeds)
        for step, value in zip(steps, values, strict=True)
        for reason in ["diverged at step 7" if np.isnan(value) else ""]
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def curves(seeds, factor, seed=0, noise=0.05):
    """[seeds, 5] decreasing values with noise, times a factor."""
    rng = np.random.default_rng(seed)
    decay = np.array([300, 200, 150, 120, 100.0])
    return factor * decay * np.exp(noise * rng.standard_normal((seeds, len(decay))))


def known_costs(rounds=4, **seconds):
    """Costs of arms without noise, from their seconds per 1000 images; the first arm is the baseline."""
    values = 1e-3 * np.array([[*seconds.values()]] * rounds)
    return costs(cost_table(pd.DataFrame(of_rounds(values, [*seconds], "a CPU")), "small", next(iter(seconds))))


def compare_rows(rows, *options, **named):
    """The comparison of `base` and `cand` in a long table; None if no seed has values of both."""
    pairs = pair_runs(rows, "base", "cand")
    return pairs and compare_pairs(pairs, *options, **named)


def verdict_on(metrics, plan=PLAN, *options, **named):
    """The verdict on the study `small` without probes."""
    return judge(metrics, pd.DataFrame(columns=PROBE_COLUMNS), "small", plan, *options, **named)
