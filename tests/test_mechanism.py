"""The comparison of probes with exact moments of simulated gradients, its text and its figure."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from convergence.analysis.mechanism import BETWEEN, mechanisms, update_rows
from convergence.analysis.mechanism_text import mechanism_section
from convergence.figures.mechanism import _draw, draw_mechanism
from convergence.rows import PROBE_COLUMNS
from convergence.study_file import load_experiment
from diffusion.build import constant_tables
from diffusion.config import Scheme
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.schemes import Tables, scheme_tables

ROOT = Path(__file__).parents[1]
T = 100
BINS = ["0-49", "50-99", "all"]
HALVES = slice(50), slice(50, 100)
METRICS = ["mse", "vb", "gradient_squared_norm", "gradient_variance"]
SCHEDULE = NoiseSchedule(linear_betas(T))
P2 = {"p2": {"gamma": 0.5, "k": 1}}
UNI, UNDER = Scheme(mse_weight=P2), Scheme(timesteps=P2)
TABLES = {
    "uniform": scheme_tables(SCHEDULE, Scheme()),
    "uni": scheme_tables(SCHEDULE, UNI),
    "under": scheme_tables(SCHEDULE, UNDER),
    "matched": scheme_tables(SCHEDULE, UNDER, UNI),
    "epsilon": scheme_tables(SCHEDULE, Scheme(timesteps=P2, correct_vb=False), UNI),
}
TABLES["no vb"] = replace(TABLES["uni"], vb_weight=torch.zeros(T))
FACTOR = 1 / TABLES["uni"].mse_weight.mean().item()
EQUAL = {"base": TABLES["uni"], "cand": TABLES["uni"]}


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


def mechanism(table, tables=EQUAL):
    (found,) = mechanisms(table, "base", ["cand"], tables)
    return found


def effects_of(found):
    return {(effect.timesteps, effect.quantity): effect for effect in found.effects}


def text_of(table, tables=EQUAL):
    return "\n\n".join(mechanism_section(mechanisms(table, "base", ["cand"], tables)))


def exact(tables, means, variances, timesteps):
    """|g|^2 and variance of w_t times a random vector with mean means[t] and variance variances[t], t in a bin."""
    p, w = tables.probabilities.numpy(), tables.mse_weight.numpy()
    p = np.where(np.isin(np.arange(T), timesteps), p, 0)
    p = p / p.sum()
    squared_norm = (p * w * means).sum() ** 2
    return squared_norm, p @ (w**2 * (variances + means**2)) - squared_norm


def exact_probes(arms, variances, means=0, seeds=3):
    """Probes of arms whose gradients have known moments at each t; `variances` has those of each arm, [T]."""
    bins = {"0-49": np.arange(50), "50-99": np.arange(50, 100), "all": np.arange(T)}
    rows = [
        ("small", arm, seed, 100, 3200, 50, name, metric, value, 64, True, "")
        for arm, tables in arms.items()
        for seed in range(seeds)
        for name, timesteps in bins.items()
        for metric, value in zip(METRICS, (1, 1, *exact(tables, means, variances[arm], timesteps)), strict=True)
    ]
    return pd.DataFrame(rows, columns=PROBE_COLUMNS)


@pytest.mark.parametrize(
    ("baseline", "candidate", "mse", "vb", "sentence"),
    [
        ("uni", "uni", 1, 1, "The expected gradient is that of `base`. This holds at equal parameters"),
        ("uni", "matched", 1, 1, "The expected gradient is that of `base`. This holds at equal parameters"),
        ("uni", "under", FACTOR, np.nan,
         f"mse is {FACTOR:.4g} times that of `base`; apart from this factor, only that of vb differs. This holds"),
        ("under", "uni", 1 / FACTOR, np.nan, "only that of vb differs"),
        ("uni", "epsilon", 1, np.nan, "mse is that of `base`; only that of vb differs. This holds"),
        ("uni", "no vb", 1, np.nan, "mse is that of `base`; only that of vb differs. This holds"),
        ("uniform", "uni", np.nan, 1, "vb is that of `base`; that of the mse differs by a factor that depends on t."),
        ("uniform", "under", np.nan, np.nan, "differ from the baseline's by factors that depend on t."),
        ("uniform", "learned", np.nan, np.nan, "a density is learned"),
    ],
)  # fmt: skip
def test_the_tables_show_how_the_expected_gradients_are_related(baseline, candidate, mse, vb, sentence):
    tables = {name: TABLES[arm] for name, arm in (("base", baseline), ("cand", candidate)) if arm != "learned"}
    found = mechanism(probes({}), tables)
    np.testing.assert_allclose((found.mse_factor, found.vb_factor), (mse, vb))
    assert sentence in text_of(probes({}), tables)
    assert ("AdamW divides by" in text_of(probes({}), tables)) == np.isfinite(mse)


def test_tables_alone_leave_nothing_remaining():
    """With the same gradients at every t, a bin that is drawn more rarely has a larger variance by its weight alone."""
    weight = torch.tensor([0.2] * 50 + [1.8] * 50, dtype=torch.float64)
    ones = torch.ones_like(weight)
    arms = {"base": Tables(ones / T, weight, ones), "cand": Tables(weight / T, ones, ones)}
    table = exact_probes(arms, dict.fromkeys(arms, np.ones(T)))
    within = table[table["metric"] == "gradient_variance"].pivot_table(index="timesteps", columns="arm", values="value")
    np.testing.assert_allclose((within["cand"] / within["base"])[BINS[:2]], [25, 1 / 1.8**2])
    found = mechanism(table, arms)
    for name, expected in zip(BINS, (5, 1 / 1.8, 1), strict=True):
        np.testing.assert_allclose(found.of("by_tables")[name].estimate, expected)
    np.testing.assert_allclose([found.of("remaining")[name].estimate for name in BINS[:2]], 1)
    arms["cand"] = Tables(weight / T, weight, ones)  # another expected gradient
    remaining = mechanism(exact_probes(arms, dict.fromkeys(arms, np.ones(T))), arms).of("remaining")
    np.testing.assert_allclose([remaining[name].estimate for name in BINS[:2]], 1)
    arms["cand"] = Tables(weight / T, ones, ones)
    noisier = {"base": np.ones(T), "cand": np.where(np.arange(T) < 50, 1, 2)}
    remaining = mechanism(exact_probes(arms, noisier), arms).of("remaining")
    np.testing.assert_allclose([remaining[name].estimate for name in BINS[:2]], [1, 2])


def test_the_published_variances_at_small_t_follow_from_the_tables():
    """Ratios within t < 125 of 24 and 19 are 23.1 and 15.0 by tables alone; the largest excess is at t >= 875."""
    experiment = load_experiment(ROOT / "experiments/fashion_mnist16.yaml")
    tables = constant_tables({arm: experiment.run(arm) for arm in experiment.arms})
    table = pd.read_csv(ROOT / "reports/published/fashion_mnist16/mechanism.csv", keep_default_na=False)
    table = table[table["metric"].isin(["mse", "vb", "gradient_variance"])].astype({"value": float})
    no_norms = table[table["metric"] == "mse"].assign(metric="gradient_squared_norm")
    found = mechanisms(pd.concat([table, no_norms]), "uni05", ["matched05", "under05"], tables)
    for effects, by_tables, smallest_t, largest_t in zip(found, (15.0, 23.1), (1.25, 1.02), (2.18, 1.61), strict=True):
        drawn = [tables[arm].probabilities[:125].sum().item() for arm in (effects.candidate, effects.baseline)]
        within = effects.of("by_tables")["0-124"].estimate * effects.scale**2 * drawn[1] / drawn[0]
        remaining = effects.of("remaining")
        ends = remaining["0-124"].estimate, remaining["875-999"].estimate
        np.testing.assert_allclose((within, *ends), (by_tables, smallest_t, largest_t), rtol=5e-3)
        assert max(effect.estimate for effect in remaining.values()) == remaining["875-999"].estimate


@pytest.mark.parametrize("candidate", ["uni", "under", "matched", "uniform"])
def test_bins_add_up_to_the_variance_of_the_whole_gradient(candidate):
    arms = {"base": TABLES["uni"], "cand": TABLES[candidate]}
    random = np.random.default_rng(0)
    means, variances = random.standard_normal(T), {"base": random.random(T), "cand": random.random(T)}
    found = mechanism(exact_probes(arms, variances, means), arms)
    effects, contributions = effects_of(found), {}
    for arm, role, scale in (("base", "baseline", 1), ("cand", "candidate", found.scale)):
        p, w = arms[arm].probabilities.numpy(), arms[arm].mse_weight.numpy() / scale
        second_moments = p * w**2 * (variances[arm] + means**2)
        first, second = (second_moments[t].sum() - ((p * w * means)[t].sum()) ** 2 / p[t].sum() for t in HALVES)
        whole = second_moments.sum() - (p * w * means).sum() ** 2
        contributions[role] = np.array([first, second, whole])
        shares = [effects[name, f"{role}_share"].estimate for name in (*BINS, BETWEEN)]
        np.testing.assert_allclose(shares, 100 * np.array([first, second, whole, whole - first - second]) / whole)
    ratios = contributions["candidate"] / contributions["baseline"]
    np.testing.assert_allclose([effects[name, "variance"].estimate for name in BINS], ratios)


def test_a_constant_factor_of_the_loss_changes_nothing():
    """AdamW removes it."""
    heavy = scheme_tables(SCHEDULE, UNI)
    heavy.mse_weight.mul_(3)
    arms = {"base": TABLES["uni"], "cand": heavy}
    found = mechanism(exact_probes(arms, dict.fromkeys(arms, np.ones(T)), np.ones(T)), arms)
    np.testing.assert_allclose((found.scale, found.mse_factor), 3)
    for quantity in ("variance", "by_tables", "remaining", "noise_scale"):
        np.testing.assert_allclose([effect.estimate for effect in found.of(quantity).values()], 1)


def test_estimates_of_the_squared_gradient_are_pooled_with_their_signs():
    """Only the mean of all estimates is unbiased: without the negative ones, |g|^2 is too large."""
    table = probes({}, noise=0)
    gradient = table["metric"] == "gradient_squared_norm"
    variance = table["metric"] == "gradient_variance"
    table.loc[variance, "value"] = 10.0
    table.loc[gradient, "value"] = table.loc[gradient, "step"].map({100: -1.0, 200: 3.0, 300: -1.0})
    cand = gradient & (table["arm"] == "cand")
    table.loc[cand, "value"] = 2 * table.loc[cand, "value"]
    effect = effects_of(mechanism(table))["all", "noise_scale"]
    np.testing.assert_allclose((effect.estimate, effect.low, effect.high), 0.5)  # means of |g|^2: 1 / 3 against 2 / 3
    assert (effect.pairs, effect.not_positive) == (4, 0)
    table.loc[cand & (table["seed"] == 2), "value"] = -1.0
    effect = effects_of(mechanism(table))["all", "noise_scale"]
    np.testing.assert_allclose(effect.estimate, (4 * 1 / 3) / (3 * 2 / 3 - 1))
    assert (effect.pairs, effect.not_positive, effect.high) == (4, 1, np.inf)
    assert "1.33 (no interval: |g|^2 is not above 0 in 1 of 4 pairs)" in text_of(table)
    table.loc[cand, "value"] = -1.0
    assert "unknown (no interval: |g|^2 is not above 0 in 4 of 4 pairs)" in text_of(table)
    assert "nan" not in text_of(table)


def test_changes_of_the_loss_are_paired_t_intervals_of_logs():
    table = probes({("0-49", "mse"): 0.9})
    table.loc[(table["arm"] == "cand") & (table["step"] == 100), "value"] *= 1.2
    change = effects_of(mechanism(table))["0-49", "mse"]
    logs = np.log(table.query("timesteps == '0-49' and metric == 'mse'").pivot_table(
        index="seed", columns=["arm", "images"], values="value"))  # fmt: skip
    weights = np.array([0.25, 0.5, 0.25])
    expected = stats.ttest_rel(logs["cand"] @ weights, logs["base"] @ weights).confidence_interval(0.95)
    np.testing.assert_allclose((change.low, change.high), 100 * np.expm1([expected.low, expected.high]))
    np.testing.assert_allclose(change.estimate, 100 * (0.9 * 1.2**0.25 - 1))
    assert change.pairs == 4


def with_updates(table, norms):
    """Probes with the rows of updates; `norms` is a function of (arm, seed, step), None for a checkpoint without."""
    checkpoints = table.groupby(["arm", "seed", "step"], sort=False)
    rows = [
        update_rows(probe, dict(zip(("update_norm", "weight_norm"), norms(*checkpoint) or (), strict=False)))
        for checkpoint, probe in checkpoints
    ]
    return pd.concat([table, *rows], ignore_index=True)


def test_updates_are_paired_t_intervals_of_logs_over_the_checkpoints_that_have_them():
    random = np.random.default_rng(0)
    norms = {(arm, seed, step): (random.lognormal(), 20 * random.lognormal())
             for arm in ("base", "cand") for seed in range(4) for step in (200, 300)}  # fmt: skip
    table = with_updates(probes({}), lambda *checkpoint: norms.get(checkpoint))  # none at step 100
    assert set(table.loc[table["metric"].eq("weight_norm") & table["value"].isna(), "reason"]) == {"not recorded"}
    found = effects_of(mechanism(table))
    logs = {arm: np.log([[norms[arm, seed, step] for step in (200, 300)] for seed in range(4)]).mean(1)
            for arm in ("base", "cand")}  # fmt: skip
    for prefix, of in (("", lambda logs: logs[:, 0]), ("relative_", lambda logs: logs[:, 0] - logs[:, 1])):
        base, cand = of(logs["base"]), of(logs["cand"])
        ratio = stats.ttest_rel(cand, base)
        for name, mean, interval in (
            (f"{prefix}update", (cand - base).mean(), ratio.confidence_interval(0.95)),
            (f"baseline_{prefix}update", base.mean(), stats.ttest_1samp(base, 0).confidence_interval(0.95)),
            (f"candidate_{prefix}update", cand.mean(), stats.ttest_1samp(cand, 0).confidence_interval(0.95)),
        ):
            effect = found["all", name]
            np.testing.assert_allclose((effect.estimate, effect.low, effect.high), np.exp([mean, *interval]))
            assert effect.pairs == 4
    of_others = mechanism(probes({})).effects
    assert mechanism(table).effects[: len(of_others)] == of_others and len(found) == len(of_others) + 6


@pytest.mark.parametrize(
    ("of_candidate", "sentence"),
    [
        (lambda seed: 0.9, "**lower**, 0.90 (0.90 to 0.90)"),
        (lambda seed: 0.9 + 0.1 * seed, "**no difference shown**, 1."),
    ],
)
def test_the_text_has_the_size_of_updates_by_arm(of_candidate, sentence):
    norms = {"base": lambda seed: (0.0123, 10.0), "cand": lambda seed: (0.0123 * of_candidate(seed), 20.0)}
    table = probes({}, seeds=4)
    table.loc[(table["arm"] == "cand") & (table["seed"] == 3), ["value", "reason"]] = np.nan, "collapsed at step 300"
    table = with_updates(table, lambda arm, seed, step: None if (arm, seed) == ("cand", 3) else norms[arm](seed))
    text = text_of(table, {"base": TABLES["uni"]})  # a learned density has no gradients, but updates
    assert f"- Size of an update: {sentence}" in text and "nan" not in text
    assert "| norm of the update | 0.0123 (0.0123 to 0.0123) | 0.01" in text
    assert "| divided by the norm of the weights | 0.00123 (0.00123 to 0.00123) | 0.00" in text
    assert text.endswith("| 3 |")
    assert "Size of an update" not in text_of(probes({})) and "| update |" not in text_of(probes({}))
    one = text_of(with_updates(probes({}, seeds=1), lambda *_: (0.5, 10.0)))
    assert "| norm of the update | 0.5 (no interval) | 0.5 (no interval) | 1.00 (no interval) | 1 |" in one


def test_pairs_and_checkpoints_behind_the_rows_are_printed():
    table = probes({}, seeds=3)
    table.loc[(table["arm"] == "cand") & (table["seed"] == 1) & (table["step"] == 300), ["value", "reason"]] = (
        np.nan, "diverged at step 300"
    )  # fmt: skip
    found = mechanism(table)
    assert {effect.pairs for effect in found.effects if effect.quantity != "by_tables"} == {2}
    text = text_of(table)
    assert "base`, 3 checkpoints from 3,200 to 9,600 training images, probed with 64 held-out images:" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 0-49", "| 50-99", "| all", "| between"))]
    assert len(rows) == 7 and all(row.endswith("| 2 |") for row in rows)
    longer = table[(table["arm"] == "base") | (table["step"] < 300)]
    assert (mechanism(longer).checkpoints, mechanism(longer).last_images) == (2, 6400)


def test_the_text_names_the_timesteps_of_each_difference():
    text = text_of(probes({("0-49", "mse"): 1.2, ("50-99", "mse"): 0.8, ("all", "gradient_variance"): 0.7}))
    assert "- Loss, mse: lower at t 50-99; higher at t 0-49." in text
    assert "- Loss, vb: no difference shown at any t." in text
    assert "- Variance of the whole gradient: **lower**, 0.70 (0." in text
    assert "| 0-49 | +20.0% (+" in text and "| 50-99 | -20.0% (-" in text
    text = text_of(probes({("0-49", "mse"): 1.2, ("0-49", "gradient_variance"): 2, ("all", "gradient_variance"): 1.5}))
    assert "- Loss, mse: higher at t 0-49; no difference shown elsewhere." in text
    assert "times the baseline's; by bins: higher at t 0-49; no difference shown elsewhere." in text
    assert "- Variance of the whole gradient: **higher**, 1.50 (1." in text
    assert "- Variance of the whole gradient: **no difference shown**, 1.00 (0." in text_of(probes({}))


def test_incomplete_probes_have_no_invented_numbers():
    one = text_of(probes({("0-49", "mse"): 0.5}, seeds=1))
    assert "Loss, mse: no difference shown at any t." in one and "(no interval)" in one
    learned = probes({})
    learned.loc[learned["metric"].str.startswith("gradient"), ["value", "reason"]] = np.nan, "the density is learned"
    without_gradients = text_of(learned, {"base": TABLES["uni"]})
    assert "Loss, mse" in without_gradients and "Variance of" not in without_gradients
    assert without_gradients.count("| timesteps |") == 1
    never = probes({})
    chosen = (never["arm"] == "cand") & (never["timesteps"] == "0-49") & never["metric"].str.startswith("gradient")
    never.loc[chosen, ["value", "reason"]] = np.nan, "never drawn"
    late = scheme_tables(SCHEDULE, Scheme())
    late.probabilities[:50], late.probabilities[50:] = 0, 1 / 50
    never_drawn = text_of(never, {"base": TABLES["uniform"], "cand": late})
    assert "| 0.0 (0.0 to 0.0) | – | – | – | – | 4 |" in never_drawn
    no_vb = probes({})
    no_vb.loc[no_vb["metric"] == "vb", "value"] = 0.0
    epsilon_only = text_of(no_vb, {"base": TABLES["uni"], "cand": TABLES["under"]})
    assert f"The expected gradient is {FACTOR:.4g} times that of `base`. This" in epsilon_only
    assert "Loss, vb" not in epsilon_only
    for text in (one, without_gradients, never_drawn, epsilon_only):
        assert "nan" not in text and "inf" not in text
    assert "Not measured" in text_of(probes({}).iloc[:0])
    whole = probes({})
    for part in (whole["arm"] == "base", (whole["arm"] == "base") == (whole["step"] == 100)):
        assert "Not measured" in text_of(whole[part])


def test_the_table_of_gradients_has_shares_of_at_least_0_and_one_number_by_tables():
    rows = text_of(probes({}, seeds=2)).split("| pairs |")[2].splitlines()[2:]
    cells = {row.split(" | ")[0]: row.split(" | ")[1:] for row in rows if row.startswith("| ")}
    assert cells["| all"][:2] == ["100", "100"]
    for name in BINS[:2]:
        assert cells[f"| {name}"][3] == "1.00" and not any("(-" in share for share in cells[f"| {name}"][:2])
    assert any("(0.0 to" in share for of_bin in cells.values() for share in of_bin[:2])


def test_every_panel_of_the_figure_has_intervals_and_equal_bytes(tmp_path):
    found = mechanisms(probes({("0-49", "mse"): 0.9}), "base", ["cand"], EQUAL)
    axes = _draw("small", found, ["base", "cand"]).get_axes()
    assert len(axes) == 4 and axes[0].get_ylim() == axes[1].get_ylim() and len({ax.get_xlim() for ax in axes}) == 1
    assert all(ax.get_title().endswith("?") and ax.collections for ax in axes)
    ends = [segment[:, 1] for segment in axes[0].collections[0].get_segments()]
    change = effects_of(found[0])["0-49", "mse"]
    np.testing.assert_allclose(ends[0], [change.low, change.high])
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_mechanism("small", found, ["base", "cand"], [path])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("seeds", [0, 1])
@pytest.mark.parametrize("tables", [EQUAL, {}])
def test_figures_of_incomplete_probes(tmp_path, seeds, tables):
    found = mechanisms(probes({}, seeds=seeds), "base", ["cand"], tables)
    axes = _draw("small", [of_candidate for of_candidate in found if of_candidate.effects], ["base", "cand"]).get_axes()
    texts = [[text.get_text() for text in ax.texts] for ax in axes]
    unknown = [] if tables else ["not measured"]
    assert texts == ([[], [], unknown, unknown] if seeds else [])
    draw_mechanism("small", found, ["base", "cand"], [tmp_path / "a.png"])
    assert min(Image.open(tmp_path / "a.png").size) > 100
