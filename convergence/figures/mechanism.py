"""The figure of the mechanism: at which timesteps arms differ in their losses and in the variance of gradients."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from convergence.analysis.mechanism import BETWEEN, Mechanism, ProbeEffect, Quantity
from convergence.figures.style import STYLE, Style, draw_legend, line_style, save_figure, set_log_axis
from convergence.tables import ALL

WIDTH_INCHES = 11.0
HEIGHT_INCHES = 8.2
CAPTION_CHARACTERS = 155
SPREAD = 0.6  # width of the arms of a bin, side by side, over the width of the bin
MAX_BINS = 10  # with more bins, some of their edges have no label
TABLE_MARK: Style = {"marker": "_", "markersize": 12, "markeredgewidth": 1.6, "alpha": 0.6, "linestyle": ""}
CAPTION = (
    "Variance: tr(Σ) of the gradient of one image times the probability of the bin, after each arm's gradient is "
    "divided by its expected weight of the MSE."
)


def draw_mechanism(study: str, mechanisms: Sequence[Mechanism], arms: Sequence[str], paths: list[Path]) -> None:
    """Draws what the probes of one study show and saves the figure to each path.

    Probes measure losses and gradients in bins of timesteps. The upper panels show the change of each term of the loss
    in each candidate. The lower left panel shows the share of each bin in the variance of an arm's gradient. The lower
    right panel shows this variance in each candidate, divided by that of the baseline. All values have 95% t-intervals
    over seeds. Equal results give files with equal bytes.

    Args:
        study: name of the study, for the title.
        mechanisms: result of each candidate; candidates without probes are not drawn.
        arms: all arms of the study, in the order that fixes their styles.
        paths: files to write; the suffix chooses the format ("png", "svg", "pdf").
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(study, [found for found in mechanisms if found.effects], arms), paths)


def _draw(study: str, mechanisms: Sequence[Mechanism], arms: Sequence[str]) -> Figure:
    if not mechanisms:
        figure = Figure((WIDTH_INCHES, 1))
        figure.text(0.5, 0.5, "There are no probes of a baseline and a candidate.", ha="center", va="center")
        return figure
    first = mechanisms[0]
    names = dict.fromkeys(effect.timesteps for effect in first.effects)
    bins = [name for name in names if name not in (ALL, BETWEEN)]
    styles = {arm: line_style(index) | {"linestyle": "", "markersize": 6} for index, arm in enumerate(arms)}
    figure = Figure((WIDTH_INCHES, HEIGHT_INCHES), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(f"{study}: at which timesteps do the arms differ?", fontsize=13, weight="bold")
    figure.supxlabel(_caption(mechanisms), x=0.02, ha="left", fontsize=9, color="0.25")
    panels = figure.subfigures(1, squeeze=False)[0, 0]  # keeps the legend clear of the title
    (mse, vb), (share, variance) = panels.subplots(2, 2, sharex=True)
    vb.sharey(mse)

    def of(quantity: Quantity) -> dict[str, dict[str, ProbeEffect]]:
        return {found.candidate: found.of(quantity) for found in mechanisms}

    for ax, loss, title in (
        (mse, of("mse"), "Where is the MSE higher or lower?"),
        (vb, of("vb"), "Where is the variational bound higher or lower?"),
    ):
        _draw_effects(ax, loss, bins, styles)
        ax.axhline(0, color="0.3", linewidth=0.8, zorder=1)
        ax.set_title(title)
    mse.set_ylabel(f"change from {first.baseline}, %   (above 0: worse)")
    shares = {first.baseline: first.of("baseline_share")} | of("candidate_share")
    in_bins = {arm: {name: of_arm[name] for name in bins if name in of_arm} for arm, of_arm in shares.items()}
    _draw_effects(share, in_bins, bins, styles)
    share.set(title="Where does the variance of the gradient come from?", ylabel="share of the arm's variance, %")
    share.set_ylim(bottom=0)
    if any(of("by_tables").values()):
        _draw_effects(variance, of("by_tables"), bins, {arm: style | TABLE_MARK for arm, style in styles.items()})
    _draw_effects(variance, of("variance"), bins, styles)
    variance.axhline(1, color="0.3", linewidth=0.8, zorder=1)
    variance.set(title="Where is the gradient noisier?", ylabel=f"variance / that of {first.baseline}")
    set_log_axis(variance)
    by_tables = Line2D([], [], label="what densities and weights alone give", color="0.3", **TABLE_MARK)
    variance.legend(handles=[by_tables], loc="upper right", frameon=False, fontsize=9)
    for ax in (share, variance):
        ax.set_xlabel("timestep t  (0: least noise)")
    shown = [first.baseline, *(found.candidate for found in mechanisms)]
    handles = [Line2D([], [], label=arm, **styles[arm]) for arm in shown]
    draw_legend(panels, handles, WIDTH_INCHES, "outside upper center")
    return figure


def _draw_effects(
    ax: Axes, effects: Mapping[str, Mapping[str, ProbeEffect]], bins: Sequence[str], styles: Mapping[str, Style]
) -> None:
    """Draws effects with their intervals. In each bin, the arms are side by side; all timesteps are on the right."""
    places = {name: place for place, name in enumerate(bins)} | {ALL: len(bins) + 0.4}
    for index, (arm, of_arm) in enumerate(effects.items()):
        shown = [effect for name, effect in of_arm.items() if name in places]
        place = np.array([places[e.timesteps] for e in shown]) + SPREAD * ((index + 0.5) / len(effects) - 0.5)
        value, low, high = np.array([[e.estimate, e.low, e.high] for e in shown]).reshape(-1, 3).T
        known = np.isfinite(high)
        ax.vlines(place[known], low[known], high[known], color=styles[arm]["color"], linewidth=1.4)
        ax.plot(place, value, **styles[arm])
    if not any(effects.values()):
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.3")
    every = -(-len(bins) // MAX_BINS)
    edges = [*(int(name.split("-")[0]) for name in bins), int(bins[-1].split("-")[1]) + 1]
    labels = {place - 0.5: str(edge) for place, edge in list(enumerate(edges))[::every]}
    ax.set_xticks([*labels, places[ALL]], [*labels.values(), ALL])
    ax.set_xlim(-0.6, places[ALL] + 0.6)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    for edge in range(len(bins) + 1):
        ax.axvline(edge - 0.5, color="0.9", linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    ax.spines["top"].set_visible(False)


def _caption(mechanisms: Sequence[Mechanism]) -> str:
    first = mechanisms[0]
    pairs = sorted({effect.pairs for found in mechanisms for effect in found.effects if effect.quantity == "mse"})
    subset = "held-out" if first.held_out else "training"
    seeds = f"Bars: 95% t-intervals over {' or '.join(map(str, pairs))} paired seeds." if pairs[-1] > 1 else (
        "One pair of runs gives no interval."
    )  # fmt: skip
    means = (
        f"Means over {first.checkpoints} checkpoints from {first.first_images:,.0f} to {first.last_images:,.0f} "
        f"training images, each on {first.n:,} {subset} images."
    )
    return "\n".join(textwrap.fill(text, CAPTION_CHARACTERS) for text in (f"{means} {seeds}", CAPTION))
