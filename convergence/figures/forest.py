"""Forest plots, with a row per effect: the primary comparison of one study, or those of several studies."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator

from convergence.analysis.effects import Effect
from convergence.analysis.results import Comparison
from convergence.analysis.wording import UNKNOWN, count_text, effect_text
from convergence.figures.style import COLOURS, STYLE, save_figure
from convergence.tables import HIGHER_IS_BETTER

WIDTH_INCHES = 9.0
ROW_INCHES = 0.55
AXIS_INCHES = 0.75  # ticks and label of a panel
TITLE_CHARACTERS, TITLE_LINE_INCHES = 80, 0.22
CAPTION_CHARACTERS, CAPTION_LINE_INCHES = 120, 0.17
# How far an axis extends beyond the estimates and seeds, in units of their span; longer intervals end in an arrow.
MAX_EXTENSION = 1.0
AXIS_MARGIN = 0.05
SEEDS_BELOW = 0.27  # rows between an interval and the dots of its seeds
ESTIMATE, SEED = COLOURS[0], "0.5"
MARKS = (
    "Squares: estimates with 95% intervals, filled if the interval excludes no effect. Dots: single seeds; triangles: "
    "bounds of seeds that do not reach the threshold or reach it before their first checkpoint."
)
GREY = " Grey: the margin of equivalence."

Rows = Mapping[str, tuple[Comparison, Effect]]  # label -> what the row shows


def draw_forest(comparison: Comparison | None, paths: list[Path]) -> None:
    """Draws the primary comparison of a study with its numbers, and saves the figure to each path.

    The upper panel shows changes of the metric. The lower panel shows factors, candidate / baseline: the training
    images and, if known, the hours until the primary threshold. An interval that leaves the axis ends in an arrow.
    Unknown effects have no row. Equal comparisons give files with equal bytes.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_primary(comparison), paths)


def draw_studies(comparisons: Sequence[Comparison], paths: list[Path]) -> None:
    """Draws the primary comparisons of several studies and saves the figure to each path.

    Each metric has a panel with its changes, and one panel shows the factors of training images until the primary
    threshold. Studies are not pooled into one number, because they differ in data, nets and length of training. Equal
    comparisons give files with equal bytes.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_studies(comparisons), paths)


def _draw_primary(comparison: Comparison | None) -> Figure:
    if comparison is None:
        return _draw("Nothing is compared.", {}, "")
    goal = f"to {comparison.short_name} {comparison.primary_threshold:.4g}"
    rows = {
        "on average over training": comparison.average,
        "at the last checkpoint": comparison.final,
        f"images {goal}": comparison.images,
        f"hours {goal}": comparison.hours,
    }
    known = {label: (comparison, effect) for label, effect in rows.items() if effect}
    pairs = count_text(comparison.average.pairs, "paired seed")
    start = f"{comparison.candidate} against {comparison.baseline}, {pairs}."
    return _draw(f"{comparison.study}: {comparison.headline}", known, start)


def _draw_studies(comparisons: Sequence[Comparison]) -> Figure:
    rows = {}
    for comparison in comparisons:
        seeds = count_text(comparison.average.pairs, "seed")
        name = f"{comparison.study} ({seeds})\n{comparison.candidate} against {comparison.baseline}"
        for effect in filter(None, (comparison.average, comparison.images)):
            goal = f", {comparison.short_name} {effect.threshold:.4g}" if effect is comparison.images else ""
            rows[name + goal] = (comparison, effect)
    return _draw("Primary comparison of each study", rows, "Studies are not pooled.")


def _draw(title: str, rows: Rows, start: str) -> Figure:
    """Draws a panel per metric and a panel for factors, without unknown effects. The caption begins with `start`."""
    panels: dict[str, dict[str, tuple[Comparison, Effect]]] = {}
    for label, (comparison, effect) in rows.items():
        if effect_text(effect) != UNKNOWN:
            panels.setdefault(_axis_label(comparison, effect), {})[label] = (comparison, effect)
    margins = [comparison.margin for comparison, effect in rows.values() if effect.quantity == "average"]
    caption = f"{start} {MARKS if panels else 'No effect is known.'}{GREY if any(margins) and panels else ''}"
    title, caption = textwrap.fill(title, TITLE_CHARACTERS), textwrap.fill(caption, CAPTION_CHARACTERS)
    heights = [AXIS_INCHES + ROW_INCHES * len(panel) for panel in panels.values()]
    title_inches = TITLE_LINE_INCHES * (title.count("\n") + 2)
    height = title_inches + sum(heights) + CAPTION_LINE_INCHES * (caption.count("\n") + 1)
    figure = Figure((WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    figure.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=12)
    figure.supxlabel(caption, x=0.02, ha="left", fontsize=8, color="0.25")
    if panels:
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (label, panel) in zip(axes, panels.items(), strict=True):
            _draw_panel(ax, panel)
            ax.set_xlabel(label)
    return figure


def _axis_label(comparison: Comparison, effect: Effect) -> str:
    if effect.unit == "factor":
        return "candidate / baseline   (← faster, slower →)"
    better = "(← worse, better →)" if comparison.metric in HIGHER_IS_BETTER else "(← better, worse →)"
    return f"change of {comparison.metric_name}{', %' if effect.unit == 'percent' else ''}   {better}"


def _draw_panel(ax: Axes, rows: Rows) -> None:
    """Draws effects of one unit as rows, with their numbers at the right."""
    effects = [effect for _, effect in rows.values()]
    is_factor = effects[0].unit == "factor"
    margins = [comparison.margin or 0.0 for comparison, effect in rows.values() if effect.quantity == "average"]
    limits = _limits(effects, is_factor, max(margins, default=0.0))
    if is_factor:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ticks = _ratio_ticks(*limits)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    ax.set(xlim=limits, ylim=(len(rows) - 0.4, -0.5))
    ax.axvline(1 if is_factor else 0, color="0.3", linewidth=0.8, zorder=1)
    for y, (comparison, effect) in enumerate(rows.values()):
        if effect.quantity == "average" and comparison.margin:
            ax.fill_betweenx([y - 0.45, y + 0.45], -comparison.margin, comparison.margin, color="0.9", linewidth=0)
        _draw_effect(ax, y, effect, limits)
        ax.text(1.04, y, effect_text(effect), transform=ax.get_yaxis_transform(), va="center", fontsize=11)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.tick_params(axis="y", length=0, pad=10)
    ax.spines[["left", "top"]].set_visible(False)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _draw_effect(ax: Axes, y: float, effect: Effect, limits: tuple[float, float]) -> None:
    """Draws the seeds and the interval of one effect, cut at the limits of the axis."""
    exact = [seed.estimate for seed in effect.per_seed if not np.isnan(seed.estimate)]
    censored = [seed for seed in effect.per_seed if seed.censored]
    for values, marker in (
        (exact, "o"),
        ([seed.low for seed in censored], ">"),
        ([seed.high for seed in censored], "<"),
    ):
        inside = [value for value in values if limits[0] < value < limits[1]]
        if inside:  # matplotlib's layout places an empty line at pixel (0, 0)
            ax.plot(inside, [y + SEEDS_BELOW] * len(inside), marker, markersize=4.5, color=SEED, markeredgewidth=0)
    if _has_interval(effect):
        low, high = np.clip([effect.low, effect.high], *limits)
        ax.plot([low, high], [y, y], color=ESTIMATE, linewidth=2.2, solid_capstyle="butt")
        for end, is_cut, marker in ((low, effect.low < limits[0], "<"), (high, effect.high > limits[1], ">")):
            if is_cut:
                ax.plot(end, y, marker, markersize=8, color=ESTIMATE, clip_on=False)
    if not np.isnan(effect.estimate):
        filling = ESTIMATE if effect.shown != "not shown" else "white"
        ax.plot(effect.estimate, y, "s", markersize=9, color=ESTIMATE, markerfacecolor=filling, markeredgewidth=2)


def _has_interval(effect: Effect) -> bool:
    """Returns whether at least one end of the effect's interval is known."""
    return np.isfinite(effect.high) or np.isfinite(effect.low) and not (effect.unit == "factor" and effect.low == 0)


def _limits(effects: list[Effect], is_factor: bool, margin: float) -> tuple[float, float]:
    """Returns the ends of an axis that contains the margin, all estimates and all seeds.

    Intervals extend the axis on each side by at most `MAX_EXTENSION` times the length of this range.
    """
    rows = [row for effect in effects for row in (effect, *effect.per_seed)]
    to_axis, from_axis = (np.log, np.exp) if is_factor else (np.asarray, np.asarray)
    with np.errstate(divide="ignore"):
        estimates, bounds = (
            to_axis(values) for values in ([row.estimate for row in rows], [(row.low, row.high) for row in rows])
        )
    inner = np.append(estimates[np.isfinite(estimates)], (-margin, margin))
    extension = MAX_EXTENSION * (np.ptp(inner) or 1.0)
    outer = np.append(bounds[np.isfinite(bounds)].clip(inner.min() - extension, inner.max() + extension), inner)
    space = AXIS_MARGIN * (np.ptp(outer) or 1.0)
    return float(from_axis(outer.min() - space)), float(from_axis(outer.max() + space))


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Returns round ratios between two values, closer together on a short axis."""
    if high < 2 * low:
        return [tick for tick in MaxNLocator(6, steps=(1, 2, 5, 10)).tick_values(low, high) if low <= tick <= high]
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = sorted({float(f"{digit * 10.0**power:.3g}") for digit in digits for power in range(-6, 7)})
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks
