"""The figure of the trials: the primary metric against each tuned value."""

import textwrap
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from convergence.analysis.curves import from_level
from convergence.analysis.tuning import edges
from convergence.figures.style import LOG_AXIS_FROM_RATIO, STYLE, Style, draw_legend, line_style, save_figure
from convergence.schema import Experiment
from convergence.study_plan import StudyPlan
from convergence.tables import HIGHER_IS_BETTER, metric_name
from convergence.tuning import Tuned, number_at

PANEL_INCHES = (5.4, 4.6)
CAPTION_CHARACTERS = 85  # of one panel
BEST: Style = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.6, "linestyle": ""}
FAILED: Style = {"marker": "x", "markersize": 9, "markeredgewidth": 2, "linestyle": ""}
SEED: Style = {"linestyle": "", "alpha": 0.35, "markeredgewidth": 0}
OWN: Style = {"color": "0.4", "linewidth": 1.5, "linestyle": ":"}


def draw_tuning(experiment: Experiment, plan: StudyPlan, trials: pd.DataFrame, tuned: Tuned, paths: list[Path]) -> None:
    """Draws the primary metric of the trials against each tuned value, and saves the figure to each path.

    Each tuned key has a panel, with a line per arm through the means over seeds; with two keys, at the best value of
    the other key. Faint points are single trials, circles are the best values, and dotted lines are the values of the
    study. Crosses at the top are failed trials. Equal tables give files with equal bytes.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(experiment, plan, trials, tuned), paths)


def _draw(experiment: Experiment, plan: StudyPlan, trials: pd.DataFrame, tuned: Tuned) -> Figure:
    keys = experiment.tuned_keys
    styles = {arm: line_style(index) for index, arm in enumerate(experiment.arms)}
    width = PANEL_INCHES[0] * len(keys)
    figure = Figure((width, PANEL_INCHES[1]), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    figure.suptitle(f"{experiment.name}: trials", x=0.02, ha="left", weight="bold", fontsize=12)
    other = ", at the best value of the other key" if len(keys) > 1 else ""
    lines = f"Lines: mean over the trial seeds ({', '.join(map(str, tuned.seeds))}){other}. Faint: single seeds."
    sentences = [lines, *edges(tuned)]
    caption = "\n".join(textwrap.fill(sentence, CAPTION_CHARACTERS * len(keys)) for sentence in sentences)
    figure.supxlabel(caption, x=0.02, ha="left", fontsize=8, color="0.25")
    panels = figure.subfigures(1, squeeze=False)[0, 0]  # keeps the legend clear of the title
    axes = panels.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    direction = "higher is better →" if plan.metric in HIGHER_IS_BETTER else "← lower is better"
    axes[0].set_ylabel(f"{metric_name(plan.features, plan.metric)},\naverage over training   {direction}")
    for ax, key in zip(axes, keys, strict=True):
        for arm, of_arm in trials[trials[key].notna()].groupby("arm", sort=False):
            _draw_arm(ax, of_arm, key, keys, plan, styles[arm])
        for value in {number_at(experiment.run(arm), key) for arm in experiment.arms} - {None}:
            ax.axvline(value, zorder=0, **OWN)
        _set_value_axis(ax, key, sorted(trials[key].dropna().unique()))
    handles = [Line2D([], [], label=arm, **styles[arm]) for arm in trials["arm"].unique()]
    handles.append(Line2D([], [], label="best value", color="0.2", **BEST | {"markersize": 10}))
    handles.append(Line2D([], [], label=f"value of {experiment.name}", **OWN))
    if trials["level"].isna().any():
        handles.append(Line2D([], [], label="failed trial", color="0.2", **FAILED))
    draw_legend(panels, handles, width, "outside upper center")
    return figure


def _draw_arm(ax: Axes, trials: pd.DataFrame, key: str, keys: list[str], plan: StudyPlan, style: Style) -> None:
    """Draws the trials of one arm against one tuned key."""
    colour = {"color": style["color"]}
    ax.plot(trials[key], trials["average"], marker=style["marker"], **colour, **SEED)
    means = trials.groupby(keys, dropna=False)["level"].agg(lambda levels: levels.mean(skipna=False)).reset_index()
    levels = means.groupby(key)["level"].min().dropna()
    line = pd.Series(from_level(levels.to_numpy(), plan.metric, plan.scale), levels.index)
    ax.plot(line.index, line, **style)
    best = trials.loc[trials["best"], key].unique()
    ax.plot(best, line[best], **colour, **BEST)
    failures = trials.loc[trials["level"].isna(), key]
    ax.plot(failures, [0.97] * len(failures), transform=ax.get_xaxis_transform(), **colour, **FAILED)


def _set_value_axis(ax: Axes, key: str, values: list[float]) -> None:
    """Labels the x axis at the tuned values; it is logarithmic if these span a large ratio."""
    if values[0] > 0 and values[-1] >= LOG_AXIS_FROM_RATIO * values[0]:
        ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xlabel(key)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["top"].set_visible(False)
