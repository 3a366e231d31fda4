"""The forest plots: the primary comparison of a study, and those of several studies."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from convergence.analysis.effects import Effect
from convergence.analysis.results import Comparison
from convergence.figures.style import COLOURS, STYLE, save_figure
from convergence.tables import HIGHER_IS_BETTER

WIDTH_INCHES = 9.0
ROW_INCHES = 0.52
AXIS_INCHES = 0.75  # ticks and label of a panel
TITLE_CHARACTERS, TITLE_INCHES = 90, 0.22
# How far an axis extends beyond the estimates and seeds, in units of their span; longer intervals end in an arrow.
MAX_EXTENSION = 1.0
AXIS_MARGIN = 0.05
SEEDS_BELOW = 0.24  # rows between an interval and the dots of its seeds
ESTIMATE, SEED = COLOURS[0], "0.45"
LABELS = {"average": "on average over training", "final": "at the last checkpoint"}

Panel = Mapping[str, tuple[Comparison, Effect]]  # label of a row -> what it shows


def draw_forest(comparison: Comparison | None, paths: list[Path]) -> None:
    """Draws the primary comparison of a study with its numbers, and saves the figure to each path.

    The upper panel shows changes of the metric, the lower one the images to the primary threshold as a factor.
    Squares are estimates over all seeds with 95% intervals, filled if the interval excludes no effect; dots are seeds,
    triangles are bounds of censored seeds. An interval that leaves the axis ends in an arrow. Unknown effects have no
    row. Equal comparisons give equal bytes.
    """
    panels: list[Panel] = []
    if comparison:
        effects = {effect.quantity: effect for effect in comparison.effects}
        panels = [
            {LABELS[name]: (comparison, effects[name]) for name in ("average", "final") if name in effects},
            {
                f"{name} to {comparison.primary_threshold:.4g}": (comparison, effects[name])
                for name in ("images", "hours")
                if name in effects
            },
        ]
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(comparison.headline if comparison else "Nothing is compared.", panels), paths)


def draw_studies(comparisons: Sequence[Comparison], paths: list[Path]) -> None:
    """Draws the primary comparison of each study in a row, without a pooled number, and saves the figure to each path.

    The panels are those of `draw_forest`; metrics that are compared by differences have a panel each.
    """
    panels: dict[str, dict[str, tuple[Comparison, Effect]]] = {}
    ...


def _draw(title: str, panels: Sequence[Panel]) -> Figure:
    """Draws panels below each other, without rows of unknown effects."""
    known = [{label: row for label, row in panel.items() if not np.isnan(row[1].estimate)} for panel in panels]
    known = [panel for panel in known if panel]
    title = textwrap.fill(title, TITLE_CHARACTERS)
    heights = [AXIS_INCHES + ROW_INCHES * len(panel) for panel in known]
    figure = Figure(
        (WIDTH_INCHES, sum(heights) + TITLE_INCHES * (title.count("\n") + 2)), layout="constrained"
    )
    figure.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=12)
    if known:
        axes = figure.subplots(len(known), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, panel in zip(axes, known, strict=True):
            _draw_panel(ax, panel)
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    comparison, first = next(iter(panel.values()))
    effects = [effect for _, effect in panel.values()]
    is_factor = first.unit == "factor"
    limits = _limits(effects, is_factor)
    for y, effect in enumerate(effects):
        _draw_effect(ax, y, effect, limits)
        ax.text(1.03, y, str(effect), transform=ax.get_yaxis_transform(), va="center", fontsize=12)
    ax.axvline(1 if is_factor else 0, color="0.3", linewidth=0.8)
    ax.set_yticks(range(len(effects)), list(panel))
    ax.tick_params(axis="y", length=0, pad=8)
    ax.set_ylim(len(effects) - 0.4, -0.5)
    if is_factor:
        ax.set_xscale("log")
        ticks = _ratio_ticks(*limits)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("candidate / baseline   (← faster, slower →)")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        ...
    ax.set_xlim(limits)
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
            ax.plot(inside, np.full(len(inside), y + SEEDS_BELOW), marker, markersize=4.5, color=SEED, mew=0)
    low, high = np.clip([effect.low, effect.high], *limits)
    ...


def _limits(effects: list[Effect], is_factor: bool) -> tuple[float, float]:
    """Returns the ends of an axis that shows no effect, all estimates and seeds, and intervals up to `MAX_EXTENSION`."""
    ...


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Returns round ratios between two values, closer together on a short axis."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = sorted({digit * 10.0**power for digit in digits for power in range(-6, 7)})
        ticks = [float(f"{tick:.3g}") for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks
