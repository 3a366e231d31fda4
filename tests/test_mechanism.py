import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from test_verdict import COMPARE, compared, curves, study

from convergence.analysis.mechanism import compare_probes
from convergence.analysis.verdict import verdict_text
from convergence.figures.mechanism import _draw, draw_mechanism
from convergence.tables import PROBE_COLUMNS

BINS = ["0-49", "50-99", "all"]
METRICS = ["mse", "vb", "gradient_norm", "gradient_variance", "noise_scale"]


def probes(factor, seeds=4, noise=0.01, name="small"):
    """Probes of two arms; `factor` gives the candidate's value over the baseline's by (timesteps, metric). Noise lifts
    even seeds and lowers odd ones."""
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
    rows = table[(table["timesteps"] == timesteps) & (table["metric"] == metric) & (table["quantity"] == "average")]
    return rows[rows["seed"].isna()].iloc[0]


def told(factor, matched=(), **options):
    metrics = study(curves(4, 1.0), curves(4, 0.9, seed=1))
    compare = COMPARE | {"matched": list(matched)}
    table = compare_probes(probes(factor, **options), {"small": compare})
    text = verdict_text(metrics, compared(metrics), table, {"small": compare})
    return re.search(r"### Why\n(.*?)### Diverged", text, re.S)[1]


def test_changes_are_paired_t_intervals_of_logs():
    table = probes({("0-49", "mse"): 0.9})
    found = average_of(compare_probes(table, {"small": COMPARE}), "0-49", "mse")
    logs = np.log(table.query("timesteps == '0-49' and metric == 'mse'").pivot_table(
        index="seed", columns=["arm", "images"], values="value"))  # fmt: skip
    weights = np.array([0.25, 0.5, 0.25])
    expected = stats.ttest_rel(logs["base"] @ weights, logs["cand"] @ weights).confidence_interval(0.95)
    np.testing.assert_allclose((found["low"], found["high"]), (expected.low, expected.high))
    np.testing.assert_allclose(found["effect"], -np.log(0.9))
    assert found["pairs"] == 4


def test_what_drowned_in_noise_is_left_out_and_the_rest_compared():
    table = probes({})
    drowned = (table["metric"] == "noise_scale") & (table["timesteps"] == "all") & (table["seed"] == 2)
    table.loc[drowned, ["value", "reason"]] = [np.nan, "the mean gradient drowns in noise: raise probe.images"]
    found = compare_probes(table, {"small": COMPARE})
    assert average_of(found, "all", "noise_scale")["pairs"] == 3
    assert average_of(found, "all", "mse")["pairs"] == 4


def test_the_text_says_which_timesteps_profit_and_whether_noise_fell():
    text = told({("0-49", "mse"): 1.2, ("50-99", "mse"): 0.8, ("all", "noise_scale"): 0.7})
    assert "Loss, mse: lower at t 50-99; higher at t 0-49." in text
    assert "Loss, vb: no difference shown at any t." in text
    assert "Gradient noise: **less noisy**, noise scale 0." in text
    assert "Gradient noise: **noisier**" in told({("all", "noise_scale"): 1.3})
    assert "Gradient noise: **no difference shown**" in told({})
    assert "differ by its variance alone" in told({}, matched=["cand"]) and "variance alone" not in text


def test_one_seed_shows_nothing_and_no_nan():
    text = told({("0-49", "mse"): 0.5}, seeds=1)
    assert "Loss, mse: no difference shown at any t." in text and "(no interval)" in text and "nan" not in text


def test_a_study_without_probes_says_so():
    assert "Not measured" in told({}, name="other")


def test_the_figure_has_a_block_for_each_study_and_equal_bytes(tmp_path):
    comparisons = {name: {"baseline": "base", "candidates": ["cand"]} for name in ("small", "large")}
    table = pd.concat([probes({("0-49", "mse"): 0.9}), probes({}, seeds=1, name="large")])
    figure = _draw(table, comparisons)
    axes = figure.get_axes()
    assert len(axes) == 8
    change, *_ = axes
    (line,) = [line for line in change.lines if line.get_linestyle() == "None"]
    expected = 100 * np.expm1(-average_of(compare_probes(table, comparisons), "0-49", "mse")["effect"])
    np.testing.assert_allclose(line.get_ydata()[0], expected)
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_mechanism(table, comparisons, [path])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("candidates", [[], ["cand"]])
def test_figures_of_little(tmp_path, candidates):
    table = probes({}, seeds=1)
    table.loc[table["metric"] == "noise_scale", "value"] = np.nan
    table = table if candidates else table[table["arm"] == "base"]
    for of in (table, table.iloc[:0]):
        draw_mechanism(of, {"small": {"baseline": "base", "candidates": candidates}}, [tmp_path / "a.png"])
        assert min(Image.open(tmp_path / "a.png").size) > 100


def test_what_was_measured_at_no_common_time_is_unknown_and_stops_nothing():
    """A noise scale is missing where the mean gradient drowns: at other checkpoints in every run, perhaps."""
    table = probes({})
    drowned = (table["metric"] == "noise_scale") & (table["arm"].eq("base") == table["step"].eq(100))
    table.loc[drowned, ["value", "reason"]] = np.nan, "the mean gradient drowns in noise"
    found = compare_probes(table, {"small": COMPARE})
    assert set(found["metric"]) == set(METRICS) - {"noise_scale"}
    metrics = study(curves(4, 1.0), curves(4, 0.9, seed=1))
    text = verdict_text(metrics, compared(metrics), found, {"small": COMPARE | {"matched": []}})
    assert "so the noise scale is unknown" in text
