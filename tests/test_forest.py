from dataclasses import replace

import numpy as np
import pytest
from metric_tables import compare_rows, curves, known_costs, study
from PIL import Image

from convergence.analysis.wording import effect_text
from convergence.figures.forest import (
    _draw_primary,
    _draw_studies,
    _has_interval,
    _limits,
    _ratio_ticks,
    draw_forest,
    draw_studies,
)


def comparison_of(base, cand, *options, **named):
    return compare_rows(study(base, cand, *options, **named), role="primary")


def squares(ax):
    return [line for line in ax.lines if line.get_marker() == "s"]


def rows(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def numbers(ax):
    return [text.get_text() for text in ax.texts]


def test_forest_shows_the_primary_comparison_with_its_numbers_and_seeds(tmp_path):
    comparison = comparison_of(curves(4, 1.0), curves(4, 0.9, seed=1))
    changes, factors = _draw_primary(comparison).axes
    shown = [comparison.average, comparison.final, comparison.images]
    assert rows(changes) == ["on average over training", "at the last checkpoint"]
    assert rows(factors) == [f"images to FD {comparison.primary_threshold:.4g}"]
    assert [*numbers(changes), *numbers(factors)] == [effect_text(effect) for effect in shown]
    assert (changes.get_xscale(), factors.get_xscale()) == ("linear", "log")
    for ax, effects in ((changes, shown[:2]), (factors, shown[2:])):
        np.testing.assert_allclose([line.get_xdata()[0] for line in squares(ax)], [e.estimate for e in effects])
        for square, effect in zip(squares(ax), effects, strict=True):
            assert (square.get_markerfacecolor() == "white") == (effect.shown == "not shown")
        dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(dots, [[seed.estimate for seed in effect.per_seed] for effect in effects])
    assert "(← better, worse →)" in changes.get_xlabel() and "(← faster, slower →)" in factors.get_xlabel()
    for name in ("a.png", "b.png"):
        draw_forest(comparison, [tmp_path / name])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_forest_has_a_row_of_hours_if_the_costs_are_known():
    arms = study(curves(4, 1.0), curves(4, 0.9, seed=1))
    comparison = compare_rows(arms, role="primary", costs=known_costs(base=2.0, cand=3.0))
    factors = _draw_primary(comparison).axes[1]
    assert numbers(factors) == [effect_text(comparison.images), effect_text(comparison.hours)]
    assert [row.split()[0] for row in rows(factors)] == ["images", "hours"]


def test_forest_has_no_row_of_an_unknown_effect(tmp_path):
    failed = np.full((2, 5), np.nan)
    failed[:, 0] = 300
    comparison = comparison_of(curves(2, 1.0), failed)
    assert _draw_primary(comparison).axes == []
    for name, shown in (("unknown.png", comparison), ("none.png", None)):
        draw_forest(shown, [tmp_path / name])
        assert min(Image.open(tmp_path / name).size) > 50
    late = replace(comparison.images, estimate=np.nan, low=1.2, high=np.inf, censored=2)  # known on one side
    (ax,) = _draw_primary(replace(comparison, effects=(*comparison.effects[:2], late))).axes
    assert numbers(ax) == ["1.20 or more"] and not squares(ax)
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == ">"][-1] == ax.get_xlim()[1]


def test_the_change_of_a_share_is_better_to_the_right():
    shares = 1 - curves(3, 1.0) / 400
    figure = _draw_primary(comparison_of(shares, 0.9 * shares, "precision"))
    assert figure.axes[0].get_xlabel() == "change of Precision (lite0)   (← worse, better →)"


def test_studies_have_a_row_each_and_no_pooled_number(tmp_path):
    studies = [
        comparison_of(curves(3, 1.0), curves(3, 0.8, seed=1), name="one"),
        comparison_of(curves(2, 1.0), curves(2, 1.1, seed=2), name="two"),
        comparison_of(curves(2, 1.0) - 150, curves(2, 1.0, seed=2) - 150, "kid", name="three"),
    ]
    changes, factors, differences = _draw_studies(studies).axes
    assert rows(changes) == ["one (3 seeds)\ncand against base", "two (2 seeds)\ncand against base"]
    assert rows(differences) == ["three (2 seeds)\ncand against base"]
    assert numbers(changes) == [effect_text(comparison.average) for comparison in studies[:2]]
    with_images = [comparison.images for comparison in studies if comparison.images]
    assert numbers(factors) == [effect_text(images) for images in with_images]
    for name in ("a.png", "b.png"):
        draw_studies(studies, [tmp_path / name])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_an_interval_that_leaves_the_axis_ends_in_an_arrow():
    comparison = comparison_of(curves(2, 1.0), curves(2, 1.1, seed=3))
    wide = replace(comparison.average, low=-60.0, high=1e4)
    (ax, *_) = _draw_primary(replace(comparison, effects=(wide, *comparison.effects[1:]))).axes
    ends = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == ">" and line.get_ydata()[0] == 0]
    assert ends == [ax.get_xlim()[1]]
    inner = [wide.estimate, *(seed.estimate for seed in wide.per_seed)]
    low, high = _limits([wide], False, 2.0)
    assert low < min(inner) and max(inner) < high < 1e3


@pytest.mark.parametrize(
    ("unit", "low", "high", "known"),
    [
        ("percent", -np.inf, np.inf, False),
        ("percent", -np.inf, 3.0, True),
        ("factor", 0.0, np.inf, False),
        ("factor", 0.0, 3.0, True),
        ("factor", 1.1, np.inf, True),
    ],
)
def test_an_interval_is_drawn_if_one_end_is_known(unit, low, high, known):
    effect = replace(comparison_of(curves(2, 1.0), curves(2, 1.1)).average, unit=unit, low=low, high=high)
    assert _has_interval(effect) == known


@pytest.mark.parametrize(("low", "high"), [(0.98, 1.03), (0.9, 1.7), (0.4, 1.2), (0.05, 30)])
def test_ratios_are_round(low, high):
    ticks = _ratio_ticks(low, high)
    assert 1 in np.round(ticks, 12) and 3 <= len(ticks) <= 12
    assert all(low <= tick <= high and float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)
