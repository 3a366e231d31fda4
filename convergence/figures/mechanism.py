"""The figure of the mechanism: where arms differ in their loss over timesteps, and how noisy their gradients are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from scipy.stats import gmean

from convergence.analysis.mechanism import probe_effects
from convergence.analysis.results import ProbeEffect
from convergence.figures.style import STYLE, Style, draw_legend, line_style, save_figure, set_image_axis, set_log_axis
from convergence.tables import ALL

WIDTH_INCHES = 10.0
HEIGHT_INCHES = 7.6
SPREAD = 0.5  # width of the arms of a bin, side by side, over the width of the bin
NOISE_SCALE = "noise scale tr(Σ)/|g|², images"
TERMS = {"mse": "MSE", "vb": "Variational bound"}
CAPTION = (
    "Upper panels: unweighted terms of the loss, means over training images; bars: 95% t-intervals over seeds.\n"
    "Lower panels: geometric means, on the left over checkpoints and seeds, on the right over seeds (thin lines)."
)


def draw_mechanism(probes: pd.DataFrame, compare: Mapping[str, Any], paths: list[Path]) -> None:
    """Draws the probes of one study and saves the figure to each path.

    The upper two panels show how much each candidate changes the two terms of the loss, in bins of timesteps, averaged
    over training images, with 95% t-intervals over seeds. The lower two show the noise scale of each arm's gradient: in
    bins of timesteps (averaged over checkpoints and seeds), and of the whole gradient over training images. Averages of
    noise scales are geometric; thin lines are single seeds. Equal tables give equal bytes.

    Args:
        probes: long table of probes (`convergence.tables.PROBE_COLUMNS`), which may be empty.
        compare: `baseline` and `candidates`, also of a study that compares nothing.
        paths: where to save; the suffix chooses the format ("png", "svg", "pdf").
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(probes, compare), paths)


def _draw(probes: pd.DataFrame, compare: Mapping[str, Any]) -> Figure:
    if probes.empty:
        figure = Figure((WIDTH_INCHES, 1))
        figure.text(0.5, 0.5, "The study has no probes.", ha="center", va="center")
        return figure
    styles = {arm: line_style(index) for index, arm in enumerate(probes["arm"].unique())}
    binned = probes[probes["timesteps"] != ALL]
    bins = {name: place for place, name in enumerate(binned["timesteps"].unique())}
    changes = probe_effects(binned, compare["baseline"], compare["candidates"])
    subset = "held-out" if probes["held_out"].all() else "training"
    figure = Figure((WIDTH_INCHES, HEIGHT_INCHES), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    title = f"{probes['study'].iloc[0]}: probes on {probes['n'].max():,} {subset} images"
    figure.suptitle(title, fontsize=12, weight="bold")
    figure.supxlabel(CAPTION, x=0.02, ha="left", fontsize=9, color="0.25")
    panels = figure.subfigures(1, squeeze=False)[0, 0]  # keeps the legend clear of the title
    axes = panels.subplots(2, 2)
    for ax, (term, name) in zip(axes[0], TERMS.items(), strict=True):
        _draw_changes(ax, [change for change in changes if change.metric == term], bins, styles)
        ax.set_title(f"{name} on {subset} images")
        ax.set_ylabel(f"change from {compare['baseline']}, %\n← lower is better")
    noise = probes[(probes["metric"] == "noise_scale") & probes["value"].notna()]
    _draw_noise_in_bins(axes[1, 0], noise[noise["timesteps"] != ALL], bins, styles)
    _draw_noise_over_images(axes[1, 1], noise[noise["timesteps"] == ALL], probes, styles)
    handles = [Line2D([], [], label=arm, linewidth=1.8, markersize=6, **style) for arm, style in styles.items()]
    draw_legend(panels, handles, WIDTH_INCHES, "outside upper center")
    return figure


def _set_bins(ax: Axes, bins: Mapping[str, int]) -> None:
    ax.set_xticks(list(bins.values()), list(bins), rotation=45, ha="right", fontsize=8)
    ax.set_xlim(-0.6, len(bins) - 0.4)
    ax.set_xlabel("timesteps t  (0: least noise)")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["top"].set_visible(False)


def _draw_changes(
    ax: Axes, changes: Sequence[ProbeEffect], bins: Mapping[str, int], styles: Mapping[str, Style]
) -> None:
    """Draws the changes of one term of the loss in percent, the candidates side by side in each bin."""
    _set_bins(ax, bins)
    ax.axhline(0, color="0.3", linewidth=0.8)
    logs = [change for change in changes if change.scale == "log"]
    if not logs:
        ax.set_yticks([])
        ax.text(0.5, 0.6, "nothing to compare", transform=ax.transAxes, ha="center", color="0.3")
        return
    candidates = list(dict.fromkeys(change.candidate for change in logs))
    for index, candidate in enumerate(candidates):
        shown = [change for change in logs if change.candidate == candidate]
        shift = SPREAD * ((index + 0.5) / len(candidates) - 0.5)
        place = np.array([bins[change.timesteps] + shift for change in shown])
        advantages = np.array([[change.average.estimate, change.average.low, change.average.high] for change in shown])
        value, upper, lower = 100 * np.expm1(-advantages.T)
        style = {**styles[candidate], "linestyle": ""}
        known = np.isfinite(upper) & np.isfinite(lower)
        ax.vlines(place[known], lower[known], upper[known], color=style["color"], linewidth=1.2)
        ax.plot(place, value, markersize=5, **style)


def _draw_noise_in_bins(ax: Axes, noise: pd.DataFrame, bins: Mapping[str, int], styles: Mapping[str, Style]) -> None:
    _set_bins(ax, bins)
    ax.set_title("Gradient noise in bins of timesteps")
    ax.set_ylabel(NOISE_SCALE)
    for arm, rows in noise.groupby("arm", sort=False):
        means = rows.groupby("timesteps", sort=False)["value"].apply(gmean)
        order = means.index.map(bins).argsort()
        ax.plot(means.index.map(bins)[order], means.iloc[order], linewidth=1.8, markersize=5, **styles[arm])
    _finish_noise(ax, noise)


def _draw_noise_over_images(ax: Axes, noise: pd.DataFrame, probes: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    ax.set_title("Gradient noise over all timesteps")
    ax.set_ylabel(NOISE_SCALE)
    for arm, rows in noise.groupby("arm", sort=False):
        values = rows.pivot(index="images", columns="seed", values="value")
        for seed in values:
            line = values[seed].dropna()
            ax.plot(line.index, line, color=styles[arm]["color"], linewidth=0.6, alpha=0.5)
        complete = values.dropna()
        ax.plot(complete.index, gmean(complete, axis=1), linewidth=1.8, markersize=5, **styles[arm])
    ax.grid(color="0.9", linewidth=0.6)
    set_image_axis(ax, probes)
    _finish_noise(ax, noise)


def _finish_noise(ax: Axes, noise: pd.DataFrame) -> None:
    if noise.empty:
        ax.set_yticks([])
        text = "no gradient can be distinguished from its noise"
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color="0.3")
    else:
        set_log_axis(ax)
