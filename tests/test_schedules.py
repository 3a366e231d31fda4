import warnings

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from convergence.figures import schedules
from convergence.figures.schedules import axis_limits, curves, draw_schedules, tenths
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train
from diffusion.gaussian import NoiseSchedule, cosine_betas, linear_betas
from diffusion.schemes import Tables, scheme_tables

LINEAR = NoiseSchedule(linear_betas(1000))
P2 = {"p2": {"gamma": 0.5, "k": 1}}
SCHEMES = {
    "uniform": (Scheme(), None),
    "uni05": (Scheme(mse_weight=P2), None),
    "under05": (Scheme(timesteps=P2), None),
    "matched05": (Scheme(timesteps=P2), Scheme(mse_weight=P2)),
    "debiased": (Scheme(mse_weight="debiased"), None),
    "lognormal": (Scheme(timesteps={"log_normal_sigma": {}}), None),
    "speed": (Scheme(timesteps={"speed": {}}, mse_weight={"speed": {}}), None),
    "learned_density": (Scheme(timesteps="loss_second_moment"), None),
}


def tables(*arms, schedule=LINEAR):
    return {arm: scheme_tables(schedule, *SCHEMES[arm]) for arm in arms}


def runs(arms):
    """The settings of the runs of each arm; `arms` maps names to those of SCHEMES."""
    sections = {"dataset": OpenMoji(source="openmoji", image_size=16), "model": Model(), "diffusion": Diffusion()}
    return {
        name: RunConfig(**sections, train=Train(), scheme=scheme, match=match, train_version=1)
        for name, (scheme, match) in ((name, SCHEMES[arm]) for name, arm in arms.items())
    }


def half_drawn(timesteps=1000):
    """Tables of an arm that draws only the second half of the timesteps."""
    p = torch.zeros(timesteps, dtype=torch.float64)
    p[timesteps // 2 :] = 2 / timesteps
    return Tables(p, torch.ones_like(p), torch.ones_like(p))


def drawn(arms, learned=(), schedule=LINEAR):
    """The six panels of curves, the two of shares, and the caption."""
    figure = schedules._draw_figure("small", dict.fromkeys(arms, schedule), arms, list(learned))
    curves_, shares = figure.subfigs
    return curves_.axes, shares.axes, figure.get_supxlabel().replace("\n", " ")


# Numbers


@pytest.mark.parametrize("timesteps", [2, 37, 1000])
@pytest.mark.parametrize("arm", ["uniform", "under05", "lognormal"])
def test_tenths_contain_each_timestep_once(timesteps, arm):
    table = tables(arm, schedule=NoiseSchedule(cosine_betas(timesteps)))[arm]
    draws = curves(table).draws
    shares = tenths(draws)
    np.testing.assert_allclose(shares.sum(), 1)
    for tenth in range(10):
        inside = [d for t, d in enumerate(draws) if tenth <= t / timesteps * 10 < tenth + 1]
        np.testing.assert_allclose(shares[tenth], sum(inside) / timesteps)


def test_shares_of_the_p2_arms():
    arms = {arm: curves(table) for arm, table in tables("uni05", "under05", "matched05").items()}
    np.testing.assert_allclose(tenths(arms["uni05"].draws), 0.1)
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    weight = np.sqrt(1 - alphas_cumprod)
    first = weight[:100].sum() / weight.sum()
    assert round(100 * first, 1) == 2.1
    np.testing.assert_allclose(tenths(arms["under05"].draws)[0], first)
    for arm in arms.values():
        np.testing.assert_allclose(tenths(arm.product)[0], first)
    np.testing.assert_allclose(arms["matched05"].product, weight)
    np.testing.assert_allclose(arms["uni05"].product, weight)
    np.testing.assert_allclose(arms["under05"].product, weight / weight.mean())


def test_timesteps_that_are_never_drawn_have_no_weight():
    half = curves(half_drawn())
    assert np.isnan(half.weight[:500]).all() and (half.weight[500:] == 1).all()
    np.testing.assert_array_equal(half.product, half.draws)


# Axes


def test_a_constant_has_a_linear_axis_from_zero():
    ones = np.ones(100)
    assert axis_limits([ones], [ones]) == ("linear", 0, pytest.approx(1.08))
    assert axis_limits([0 * ones], [ones]) == ("linear", 0, 1)


def test_the_weight_of_the_vb_has_a_log_axis():
    assert axis_limits([np.ones(10)], [np.ones(10)], log_from=0) == ("log", pytest.approx(1 / 1.5), 1.5)
    panels, *_ = drawn(tables("uni05", "matched05"))
    (vb,) = (ax for ax in panels if ax.get_title() == schedules.VB_TITLE)
    assert vb.get_yscale() == "log" and vb.get_ylim()[1] > 80.6
    assert vb.lines[1].get_ydata()[0] == pytest.approx(80.6, abs=0.05)
    assert len({ax.get_title() for ax in panels}) == 6  # nothing is shown twice


def test_a_weight_of_four_decades_fits_on_a_log_axis():
    weight, ones = LINEAR.snr.rsqrt().numpy(), np.ones(1000)
    for lines in ([weight], [weight, ones]):
        scale, low, high = axis_limits(lines, [ones] * len(lines))
        assert scale == "log" and low < weight[0] < 0.02 and 100 < weight[-1] < high


def test_zeros_and_tails_of_any_depth_do_not_stretch_an_axis():
    x = np.linspace(-1, 1, 1000)
    peak, ones = np.exp(-((x / 0.01) ** 2)), np.ones(1000)
    peak *= 1000 / peak.sum()
    assert peak.min() == 0
    assert axis_limits([peak], [peak])[0] == "linear"
    scale, low, high = axis_limits([ones, peak], [ones, peak])
    assert scale == "log" and 1e-4 < low < 1 and peak.max() < high < 1000


@pytest.mark.parametrize(
    "arms",
    [
        {"half": half_drawn()},
        {"half": half_drawn(), **tables("debiased", "uniform")},
        {"narrow": scheme_tables(LINEAR, Scheme(timesteps={"logit_normal": {"mean": 0.5, "std": 0.2}}), Scheme())},
    ],
)
def test_zeros_constants_and_large_weights_are_drawn(arms):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(schedules._draw_figure("small", dict.fromkeys(arms, LINEAR), arms, [])).draw()
    for ax in drawn(arms)[0]:
        low, high = ax.get_ylim()
        assert low < high < 1e4
        assert all(((line.get_ydata() >= low) & (line.get_ydata() <= high)).any() for line in ax.lines)


def test_axis_labels_name_the_end_of_least_noise():
    panels, shares, _ = drawn(tables("uni05", "under05"))
    for ax in (*panels[:3], *shares):
        assert "0: least noise" in ax.get_xlabel() and ax.get_xlim()[0] < ax.get_xlim()[1]
    for ax in panels[3:]:
        assert "left: least noise" in ax.get_xlabel() and ax.get_xlim()[0] > ax.get_xlim()[1]


# The figure


def test_every_arm_is_drawn_in_every_panel():
    arms = tables(*SCHEMES)
    panels, shares, _ = drawn(arms)
    assert len(panels) == 6 and len(shares) == 2
    for ax in panels:
        assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == len(arms)
        widths = [line.get_linewidth() for line in ax.lines]
        assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0]
    for ax, column in zip(shares, ("draws", "product"), strict=True):
        expected = np.array([tenths(getattr(curves(table), column)) for table in arms.values()])
        printed = np.array([float(text.get_text().removeprefix("<")) for text in ax.texts]).reshape(expected.shape)
        np.testing.assert_allclose(printed, 100 * expected, atol=0.1)
    assert [label.get_text() for label in shares[0].get_yticklabels()] == list(arms)


def test_lines_are_the_curves_and_densities_of_log_snr_integrate_to_one():
    arms = tables("uni05", "under05")
    panels, *_ = drawn(arms)
    for index, table in enumerate(arms.values()):
        lines = [ax.lines[index] for ax in panels]
        of_arm = curves(table)
        for line, expected in zip(lines, (of_arm.draws, of_arm.weight, of_arm.product), strict=False):
            np.testing.assert_array_equal(line.get_ydata(), expected)
        np.testing.assert_array_equal(lines[4].get_ydata(), table.vb_weight)
        for line, total in ((lines[3], 1), (lines[5], curves(table).product.mean())):
            log_snr, density = line.get_data()
            np.testing.assert_allclose(np.trapezoid(density[::-1], log_snr[::-1]), total, rtol=2e-3)


def test_density_of_log_snr_follows_a_change_of_variables():
    # If t is uniform, log SNR of a cosine schedule without offset has the density sech(x / 2) / (2 pi).
    cosine = NoiseSchedule(cosine_betas(1000))
    panels, *_ = drawn(tables("uniform", schedule=cosine), schedule=cosine)
    log_snr, density = panels[3].lines[0].get_data()
    middle = np.abs(log_snr) < 5
    np.testing.assert_allclose(density[middle], 1 / np.cosh(log_snr[middle] / 2) / (2 * np.pi), rtol=0.02)


def test_caption_states_shares_equal_curves_and_proportions():
    *_, caption = drawn(tables("uniform", "uni05", "under05", "matched05", "learned_density"), ["learned_density"])
    assert "t < 100: 10.0% in uniform, uni05 and learned_density; 2.1% in under05 and matched05." in caption
    assert "draws of under05 and matched05;" in caption
    assert "MSE weight of uniform, under05 and learned_density;" in caption
    assert "vb weight of uniform, uni05, under05 and learned_density;" in caption
    assert "expected MSE weight of uni05 and matched05." in caption
    assert "Expected weights of the MSE that are proportional at every t: under05 = 1.24 × uni05." in caption
    assert "The density of learned_density is learned during training; the figure shows its initial values." in caption


def test_caption_has_no_sentence_without_content():
    *_, caption = drawn(tables("uniform", "lognormal"))
    assert (
        "Equal curves, which overlap: MSE weight of uniform and lognormal; vb weight of uniform and lognormal."
        in caption
    )
    assert "proportion" not in caption and "learned" not in caption


def test_the_title_names_the_study_and_the_legend_its_arms():
    cosine = NoiseSchedule(cosine_betas(50))
    arms = tables("under05", "uniform", schedule=cosine)
    figure = schedules._draw_figure("large", dict.fromkeys(arms, cosine), arms, [])
    assert figure.get_suptitle() == "large: 50 timesteps"
    curves_, _ = figure.subfigs
    assert [text.get_text() for text in curves_.legends[0].get_texts()] == ["under05", "uniform"]
    for index, line in enumerate(curves_.axes[0].lines):
        assert line.get_color() == schedules.line_style(index)["color"]


def test_equal_tables_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / name for name in ("schedules.png", "schedules.svg")]
        draw_schedules("small", runs({"uni05": "uni05", "under05": "under05"}), paths)
    for name in ("schedules.png", "schedules.svg"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["schedules.png", "schedules.svg"]


def test_runs_become_the_tables_of_their_arms(monkeypatch):
    calls = []
    monkeypatch.setattr(schedules, "_draw_figure", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(schedules, "save_figure", lambda *_: None)
    draw_schedules("small", runs({"a": "matched05", "b": "learned_density"}), [])
    ((study, noise_paths, arms, learned),) = calls
    assert study == "small" and list(arms) == ["a", "b"] and learned == ["b"]
    expected = tables("matched05")["matched05"]
    assert torch.equal(arms["a"].probabilities, expected.probabilities)
    assert torch.equal(arms["a"].mse_weight, expected.mse_weight)
    assert torch.equal(noise_paths["b"].snr, LINEAR.snr)


def test_nothing_is_cut_off_at_the_edges(tmp_path):
    draw_schedules(
        "small", runs({f"{arm}_{'x' * (39 - len(arm))}": arm for arm in SCHEMES}), [tmp_path / "schedules.png"]
    )
    with Image.open(tmp_path / "schedules.png") as image:
        pixels = np.asarray(image.convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()
