"""The forest plot: every comparison of a study, per seed and over all seeds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from convergence.analysis.effects import Effect
from convergence.analysis.results import Comparison
from convergence.figures.style import COLOURS, STYLE, draw_legend, save_figure

WIDTH_INCHES = 11.0
ROW_INCHES = 0.27
GAP_ROWS = 1.8  # above each comparison, for its title
# How far an axis extends beyond the estimates and seeds, in units of their span; longer intervals end in an arrow.
MAX_EXTENSION = 2.0
PRIMARY, SECONDARY, SEED = COLOURS[1], "0.15", "0.55"
PANELS = {"average": 0, "final": 0, "images": 1, "seconds": 1}
LABELS = {"average": "average", "final": "at the end"}


def draw_forest(comparisons: Sequence[Comparison], paths: list[Path]) -> None:
    """Draws comparisons as a forest plot and saves it to each path.

    The left panel shows the advantage in the metric, the right panel the speed-up at each threshold; to the right of
    the vertical line the candidate is better. Squares are estimates over all seeds with 95% intervals, dots are seeds,
    triangles are bounds of censored seeds. The primary endpoint is coloured. An interval that leaves the axis ends in
    an arrow. Equal comparisons give equal bytes.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(comparisons), paths)


def _draw(comparisons: Sequence[Comparison]) -> Figure:
    if not comparisons:
        figure = Figure((WIDTH_INCHES, 1))
        figure.text(0.5, 0.5, "Nothing is compared.", ha="center", va="center")
        return figure
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    shown = [
        [_in_units_of_the_axis(effect, comparison.scale) for effect in comparison.effects] for comparison in comparisons
    ]
    limits = [_limits([effect for effects in shown for effect in effects if PANELS[effect.quantity] == panel])
              for panel in (0, 1)]  # fmt: skip
    labels: list[dict[float, str]] = [{}, {}]
    top = 0.0
    for comparison, effects in zip(comparisons, shown, strict=True):
        top -= GAP_ROWS
        title = axes[0].text(0, top + 0.8, _title(comparison), transform=axes[0].get_yaxis_transform(), weight="bold")
        title.set_in_layout(False)  # it extends over both panels
        title.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        lowest = top
        for panel, ax in enumerate(axes):
            rows = [effect for effect in effects if PANELS[effect.quantity] == panel]
            for row, effect in enumerate(rows):
                colour = PRIMARY if comparison.role == "primary" and effect.quantity == "average" else SECONDARY
                _draw_effect(ax, top - row, effect, limits[panel], colour)
                labels[panel][top - row] = LABELS.get(effect.quantity, f"{effect.quantity} to {effect.threshold:.4g}")
                lowest = min(lowest, top - row)
        top = lowest
    for ax, rows_of_panel, (low, high) in zip(axes, labels, limits, strict=True):
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set_yticks(list(rows_of_panel), list(rows_of_panel.values()))
        ax.tick_params(axis="y", length=0, pad=10)
        ax.set(ylim=(top - 0.8, 0), xlim=(low, high))
        ax.spines[["left", "top"]].set_visible(False)
        ax.grid(axis="x", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes[0].set_zorder(1)
    axes[0].patch.set_visible(False)
    axes[0].set_xlabel("advantage in the metric, %   (candidate better →)")
    axes[1].set_xlabel("speed-up over the baseline   (candidate faster →)")
    ticks = _ratio_ticks(*limits[1])
    axes[1].set_xticks(np.log(ticks), [f"{tick:g}" for tick in ticks])
    handles = [
        Line2D([], [], marker="s", color=PRIMARY, label="primary endpoint, 95% interval"),
        Line2D([], [], marker="s", color=SECONDARY, label="secondary"),
        Line2D([], [], marker="o", markersize=4, color=SEED, linestyle="", label="one seed"),
        Line2D([], [], marker=">", markersize=5, color=SEED, linestyle="", label="bound of a censored seed"),
    ]
    figure.set_size_inches(WIDTH_INCHES, 1.2 - ROW_INCHES * top)
    draw_legend(figure, handles, WIDTH_INCHES, "outside lower center")
    return figure


def _in_units_of_the_axis(effect: Effect, scale: str) -> Effect:
    """Returns advantages in the metric in percent of the baseline's, or in points for shares; times stay logs."""
    if effect.quantity not in ("average", "final"):
        return effect
    estimate, low, high = (
        100 * (-np.expm1(-value) if scale == "log" else value) for value in (effect.estimate, effect.low, effect.high)
    )
    per_seed = tuple(_in_units_of_the_axis(seed, scale) for seed in effect.per_seed)
    return replace(effect, estimate=estimate, low=low, high=high, per_seed=per_seed)


def _draw_effect(ax: Axes, y: float, effect: Effect, limits: tuple[float, float], colour: str) -> None:
    """Draws the seeds and the interval of one effect, cut at the limits of the axis."""
    exact = [seed.estimate for seed in effect.per_seed if not np.isnan(seed.estimate)]
    if exact:  # matplotlib's layout places an empty unclipped line at pixel (0, 0)
        ax.plot(exact, np.full(len(exact), y), "o", markersize=4, color=SEED, zorder=3, clip_on=False)
    censored = [seed for seed in effect.per_seed if seed.censored]
    for bounds, marker in (([seed.low for seed in censored], ">"), ([seed.high for seed in censored], "<")):
        finite = [bound for bound in bounds if np.isfinite(bound)]
        ax.plot(finite, np.full(len(finite), y), marker, markersize=5, color=SEED, zorder=3)
    low, high = np.clip([effect.low, effect.high], *limits)
    unknown = np.isinf([effect.low, effect.high]).all()
    alpha = 0.4 if unknown else 1
    ax.plot([low, high], [y, y], color=colour, linewidth=0.8 if unknown else 1.6, alpha=alpha)
    for end, is_cut, marker in ((low, effect.low < limits[0], "<"), (high, effect.high > limits[1], ">")):
        if is_cut:
            ax.plot(end, y, marker, markersize=7, color=colour, alpha=alpha, clip_on=False)
    ax.plot(effect.estimate, y, "s", markersize=6, color=colour, zorder=4)


def _limits(effects: list[Effect]) -> tuple[float, float]:
    """Returns the ends of an axis that shows zero, all estimates and seeds, and intervals up to `MAX_EXTENSION`."""
    estimates = [row.estimate for effect in effects for row in (effect, *effect.per_seed)]
    seed_bounds = [bound for effect in effects for seed in effect.per_seed for bound in (seed.low, seed.high)]
    bounds = [*seed_bounds, *(bound for effect in effects for bound in (effect.low, effect.high))]
    inner = [0.0, *(value for value in (*estimates, *seed_bounds) if np.isfinite(value))]
    low, high = min(inner), max(inner)
    extension = MAX_EXTENSION * (high - low or 1.0)
    outer = np.clip([low, high, *(value for value in bounds if np.isfinite(value))], low - extension, high + extension)
    margin = 0.05 * (outer.max() - outer.min() or 1.0)
    return outer.min() - margin, outer.max() + margin


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Returns round ratios between exp(low) and exp(high), closer together on a short axis."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = sorted({digit * 10.0**power for digit in digits for power in range(-6, 7)})
        ticks = [float(f"{tick:.3g}") for tick in ticks if low <= np.log(tick) <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _title(comparison: Comparison) -> str:
    role = "primary" if comparison.role == "primary" else "secondary"
    arms = f"{comparison.candidate} against {comparison.baseline}"
    return f"{comparison.study}: {arms}, {comparison.metric_name} ({role}): {comparison.outcome}"
