import itertools
import re

import numpy as np
import pandas as pd
import pytest
from metric_tables import COMPARE, curves, study
from PIL import Image
from scipy import stats

from convergence.analysis.mechanism import probe_effects
from convergence.analysis.verdict import judge, to_markdown
from convergence.figures.mechanism import _draw, draw_mechanism
from convergence.tables import PROBE_COLUMNS

BINS = ["0-49", "50-99", "all"]
METRICS = ["mse", "vb", "gradient_norm", "gradient_variance", "noise_scale"]


def probes(factor, seeds=4, noise=0.01, name="small"):
    """Probes of two arms; `factor` has the candidate's value over the baseline's by (timesteps, metric), 1 by default.

    Noise increases the values of even seeds and decreases those of odd ones.
    """
    rng = np.random.default_rng(0)
    rows = [
        (name, arm, seed, step, 32 * step, step / 2, timesteps, metric, value, 64, True, "")
        for seed in range(seeds)
        for step in (100, 200, 300)
        for timesteps in BINS
        for metric in METRICS
        for shared in [np.exp(0.5 * rng.standard_normal())]
        for arm in ("base", "cand")
        for changed in [factor.get((timesteps, metric), 1) * np.exp(noise * (-1) ** seed) if arm == "cand" else 1]
        for value in [shared * changed]
    ]
    return pd.DataFrame(rows, columns=PROBE_COLUMNS)


def average_of(table, timesteps, metric):
    """The advantage of the candidate in one quantity."""
    (probe,) = [
        probe for probe in probe_effects(table, COMPARE) if (probe.timesteps, probe.metric) == (timesteps, metric)
    ]
    return probe.average


def mechanism_of(table, matched=()):
    """The section on the mechanism in a verdict."""
    metrics = study(curves(4, 1.0), curves(4, 0.9, seed=1))
    text = to_markdown(judge(metrics, table, "small", COMPARE | {"matched": list(matched)}))
    return re.search(r"## Mechanism\n(.*?)## Diverged", text, re.S)[1]


def test_changes_are_paired_t_intervals_of_logs():
    table = probes({("0-49", "mse"): 0.9})
    change = average_of(table, "0-49", "mse")
    logs = np.log(table.query("timesteps == '0-49' and metric == 'mse'").pivot_table(
        index="seed", columns=["arm", "images"], values="value"))  # fmt: skip
    weights = np.array([0.25, 0.5, 0.25])
    expected = stats.ttest_rel(logs["base"] @ weights, logs["cand"] @ weights).confidence_interval(0.95)
    np.testing.assert_allclose((change.low, change.high), (expected.low, expected.high))
    np.testing.assert_allclose(change.estimate, -np.log(0.9))
    assert change.pairs == 4 and change.seed is None and change.per_seed == ()


def test_an_unknown_noise_scale_is_left_out_and_the_rest_is_compared():
    table = probes({})
    unknown = (table["metric"] == "noise_scale") & (table["timesteps"] == "all") & (table["seed"] == 2)
    table.loc[unknown, ["value", "reason"]] = [np.nan, "the mean gradient is too small compared with its noise"]
    assert average_of(table, "all", "noise_scale").pairs == 3
    assert average_of(table, "all", "mse").pairs == 4


def test_the_verdict_has_the_average_of_every_probe_over_all_seeds():
    table = probes({("0-49", "mse"): 0.9})
    verdict = judge(study(curves(4, 1.0), curves(4, 0.9, seed=1)), table, "small", COMPARE)
    effects = [(probe.timesteps, probe.metric) for probe in verdict.mechanism]
    assert effects == list(itertools.product(BINS, METRICS))
    assert verdict.mechanism[0].average == average_of(table, "0-49", "mse")


def test_the_text_says_which_timesteps_profit_and_whether_the_gradient_is_less_noisy():
    text = mechanism_of(probes({("0-49", "mse"): 1.2, ("50-99", "mse"): 0.8, ("all", "noise_scale"): 0.7}))
    assert "`cand` against `base`:" in text
    assert "Loss, mse: lower at t 50-99; higher at t 0-49." in text
    assert "Loss, vb: no difference shown at any t." in text
    assert "Loss, mse: higher at t 0-49; no difference shown elsewhere." in mechanism_of(probes({("0-49", "mse"): 1.2}))
    assert "Gradient noise: **less noisy**, noise scale 0." in text
    assert "Gradient noise: **noisier**" in mechanism_of(probes({("all", "noise_scale"): 1.3}))
    assert "Gradient noise: **no difference shown**" in mechanism_of(probes({}))
    assert "the same expected gradient" in mechanism_of(probes({}), matched=["cand"])
    assert "the same expected gradient" not in text


def test_one_seed_shows_no_difference_and_no_nan():
    text = mechanism_of(probes({("0-49", "mse"): 0.5}, seeds=1))
    assert "Loss, mse: no difference shown at any t." in text and "(no interval)" in text and "nan" not in text


def test_a_study_without_probes_says_so():
    assert "Not measured" in mechanism_of(probes({}, name="other"))


def test_the_figure_has_four_panels_and_equal_bytes(tmp_path):
    table = probes({("0-49", "mse"): 0.9})
    axes = _draw(table, COMPARE).get_axes()
    assert len(axes) == 4
    change, *_ = axes
    (line,) = [line for line in change.lines if line.get_linestyle() == "None"]
    expected = 100 * np.expm1(-average_of(table, "0-49", "mse").estimate)
    np.testing.assert_allclose(line.get_ydata()[0], expected)
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_mechanism(table, COMPARE, [path])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("candidates", [[], ["cand"]])
def test_figures_of_incomplete_probes(tmp_path, candidates):
    table = probes({}, seeds=1)
    table.loc[table["metric"] == "noise_scale", "value"] = np.nan
    table = table if candidates else table[table["arm"] == "base"]
    for rows in (table, table.iloc[:0]):
        draw_mechanism(rows, {"baseline": "base", "candidates": candidates}, [tmp_path / "a.png"])
        assert min(Image.open(tmp_path / "a.png").size) > 100


def test_quantities_without_common_checkpoints_are_unknown():
    """A noise scale is missing where the mean gradient is too small, perhaps at other checkpoints in every run."""
    table = probes({})
    unknown = (table["metric"] == "noise_scale") & (table["arm"].eq("base") == table["step"].eq(100))
    table.loc[unknown, ["value", "reason"]] = np.nan, "the mean gradient is too small compared with its noise"
    assert {probe.metric for probe in probe_effects(table, COMPARE)} == set(METRICS) - {"noise_scale"}
    assert "Gradient noise: unknown" in mechanism_of(table)
