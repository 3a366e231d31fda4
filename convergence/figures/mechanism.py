"""Why arms differ: their loss on each part of the timesteps, and how noisy their gradients are. The figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from scipy.stats import gmean

from convergence.analysis.mechanism import compare_probes
from convergence.figures.style import STYLE, draw_legend, line_style, save_figure, set_image_axis, set_log_axis
from convergence.tables import ALL

WIDTH_INCHES = 10.0
BLOCK_INCHES = 7.6
SPREAD = 0.5  # of a bin's width: arms side by side
NOISE_SCALE = "noise scale tr(Σ)/|g|², images"


def draw_mechanism(probes: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any]], paths: list[Path]) -> None:
    """Draw the probes of each study, and save the figure to each path.

    A study is a block of four panels. Above, what each candidate changes in the two terms of the loss, in bins of
    timesteps, averaged over training images, with 95% t-intervals over seeds. Below, the noise scale of each arm's
    gradient: in bins, and of the whole gradient over training images (geometric means; thin lines are seeds). Equal
    tables give equal bytes.

    Args:
        probes: `reports/mechanism.csv`.
        comparisons: study -> its `baseline` and `candidates`, also where the study compares nothing.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(probes, comparisons), paths)


def _draw(probes: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any]]) -> Figure:
    studies = list(probes["study"].unique())
    if not studies:
        figure = Figure((WIDTH_INCHES, 1))
        figure.text(0.5, 0.5, "No study is probed.", ha="center", va="center")
        return figure
    styles = {arm: line_style(index) for index, arm in enumerate(probes["arm"].unique())}
    figure = Figure((WIDTH_INCHES, BLOCK_INCHES * len(studies)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for block, study in zip(figure.subfigures(len(studies), squeeze=False)[:, 0], studies, strict=True):
        _draw_block(block, probes[probes["study"] == study], comparisons[study], styles)
    return figure


def _draw_block(
    block: SubFigure, probes: pd.DataFrame, compare: Mapping[str, Any], styles: Mapping[str, Mapping[str, object]]
) -> None:
    study, baseline = probes["study"].iloc[0], compare["baseline"]
    styles = {arm: style for arm, style in styles.items() if arm in set(probes["arm"])}
    of_bins = probes[probes["timesteps"] != ALL]
    bins = {name: place for place, name in enumerate(of_bins["timesteps"].unique())}
    changed = compare_probes(of_bins, {study: compare})
    whose = "held-out" if probes["held_out"].all() else "training"
    block.suptitle(f"{study}: probed on {probes['n'].max():,} {whose} images", fontsize=12, weight="bold")
    axes = block.subplots(2, 2)
    for ax, term in zip(axes[0], ("mse", "vb"), strict=True):
        _draw_changes(ax, changed[changed["metric"] == term], bins, styles)
        ax.set_title(f"{whose} {term}, unweighted")
        ax.set_ylabel(f"change against {baseline}, %\n← lower is better")
    noise = probes[(probes["metric"] == "noise_scale") & probes["value"].notna()]
    _draw_noise_in_bins(axes[1, 0], noise[noise["timesteps"] != ALL], bins, styles)
    _draw_noise_over_images(axes[1, 1], noise[noise["timesteps"] == ALL], probes, styles)
    handles = [Line2D([], [], label=arm, linewidth=1.8, markersize=6, **style) for arm, style in styles.items()]
    draw_legend(block, handles, WIDTH_INCHES, "outside lower center")


def _set_bins(ax: Axes, bins: Mapping[str, int]) -> None:
    ax.set_xticks(list(bins.values()), list(bins), rotation=45, ha="right", fontsize=8)
    ax.set_xlim(-0.6, len(bins) - 0.4)
    ax.set_xlabel("timesteps t  (0: least noise)")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["top"].set_visible(False)


def _draw_changes(
    ax: Axes, changed: pd.DataFrame, bins: Mapping[str, int], styles: Mapping[str, Mapping[str, object]]
) -> None:
    """Changes of one term of the loss in percent, candidates side by side in each bin."""
    _set_bins(ax, bins)
    ax.axhline(0, color="0.3", linewidth=0.8)
    logs = changed[(changed["quantity"] == "average") & changed["seed"].isna() & (changed["scale"] == "log")]
    if logs.empty:
        ax.text(0.5, 0.6, "nothing to compare", transform=ax.transAxes, ha="center", color="0.3")
        return
    candidates = list(logs["candidate"].unique())
    for index, candidate in enumerate(candidates):
        rows = logs[logs["candidate"] == candidate]
        place = rows["timesteps"].map(bins) + SPREAD * ((index + 0.5) / len(candidates) - 0.5)
        value, upper, lower = (100 * np.expm1(-rows[of].to_numpy(float)) for of in ("effect", "low", "high"))
        style = {**styles[candidate], "linestyle": ""}
        known = np.isfinite(upper) & np.isfinite(lower)
        ax.vlines(place[known], lower[known], upper[known], color=style["color"], linewidth=1.2)
        ax.plot(place, value, markersize=5, **style)


def _draw_noise_in_bins(
    ax: Axes, noise: pd.DataFrame, bins: Mapping[str, int], styles: Mapping[str, Mapping[str, object]]
) -> None:
    _set_bins(ax, bins)
    ax.set_title("gradient noise in bins")
    ax.set_ylabel(NOISE_SCALE)
    for arm, rows in noise.groupby("arm", sort=False):
        means = rows.groupby("timesteps", sort=False)["value"].apply(gmean)
        order = means.index.map(bins).argsort()
        ax.plot(means.index.map(bins)[order], means.iloc[order], linewidth=1.8, markersize=5, **styles[arm])
    _finish_noise(ax, noise)


def _draw_noise_over_images(
    ax: Axes, noise: pd.DataFrame, probes: pd.DataFrame, styles: Mapping[str, Mapping[str, object]]
) -> None:
    ax.set_title("gradient noise, all timesteps")
    ax.set_ylabel(NOISE_SCALE)
    for arm, rows in noise.groupby("arm", sort=False):
        of_seeds = rows.pivot(index="images", columns="seed", values="value")
        for seed in of_seeds:
            line = of_seeds[seed].dropna()
            ax.plot(line.index, line, color=styles[arm]["color"], linewidth=0.6, alpha=0.5)
        complete = of_seeds.dropna()
        ax.plot(complete.index, gmean(complete, axis=1), linewidth=1.8, markersize=5, **styles[arm])
    ax.grid(color="0.9", linewidth=0.6)
    set_image_axis(ax, probes)
    _finish_noise(ax, noise)


def _finish_noise(ax: Axes, noise: pd.DataFrame) -> None:
    if noise.empty:
        ax.text(0.5, 0.5, "no gradient stands out of its noise", transform=ax.transAxes, ha="center", color="0.3")
    else:
        set_log_axis(ax)
