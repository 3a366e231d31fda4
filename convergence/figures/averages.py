"""The figure of a metric against the width of the average of the weights, at the last checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from convergence.analysis.intervals import t_interval
from convergence.figures.labels import label_ends
from convergence.figures.style import STYLE, line_style, save_figure
from convergence.tables import averages_in, metric_name

INCHES = (7.0, 4.5)
CAPTION = "Intervals: 95% t-intervals of the mean over seeds (computed on logs); dots: single seeds."


def draw_averages(metrics: pd.DataFrame, widths: Mapping[tuple[str, str], float], paths: list[Path]) -> None:
    """Draws FD at the last checkpoint against the relative width of the averages, with a line per arm.

    The figure shows the first feature extractor. Failed runs have no value. Equal tables give files with equal bytes.

    Args:
        metrics: table of the metrics of one study, with the column `ema`.
        widths: (arm, name of an average) -> relative width of the average at the last checkpoint.
        paths: files to write; the suffix chooses the format ("png", "svg", "pdf").
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(metrics, widths), paths)


def _draw(metrics: pd.DataFrame, widths: Mapping[tuple[str, str], float]) -> Figure:
    study, features, last = metrics["study"].iloc[0], metrics["features"].iloc[0], metrics["step"].max()
    at_end = (metrics["features"] == features) & (metrics["metric"] == "fd") & (metrics["step"] == last)
    rows = metrics[at_end & metrics["value"].notna()]
    figure = Figure(INCHES, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    ax = figure.subplots()
    styles = {arm: line_style(place) for place, arm in enumerate(dict.fromkeys(metrics["arm"]))}
    ends, places = {}, {name: [widths[arm, name] for arm in styles] for name in averages_in(metrics)}
    for arm, of_arm in rows.groupby("arm", sort=False):
        values = {widths[arm, name]: np.log(seeds["value"].to_numpy()) for name, seeds in of_arm.groupby("ema")}
        points = sorted(values)
        mean, low, high = np.exp([t_interval(values[point]) for point in points]).T
        ax.plot(points, mean, linewidth=1.8, markersize=6, zorder=4, **styles[arm])
        known = np.isfinite([low, high]).all(axis=0)  # one seed has no interval
        ax.vlines(np.array(points)[known], low[known], high[known], color=styles[arm]["color"], linewidth=1.2)
        for point in points:
            seeds = np.exp(values[point])
            ax.plot([point] * len(seeds), seeds, ".", color=styles[arm]["color"], markersize=4, alpha=0.5)
        ends[arm] = (points[-1], mean[-1])
    label_ends(ax, ends, styles)
    for name, of_arms in places.items():
        ax.annotate(name, (float(np.mean(of_arms)), 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                    textcoords="offset points", ha="center", fontsize=8, color="0.3")  # fmt: skip
        for width in set(of_arms):
            ax.axvline(width, color="0.9", linewidth=0.8, zorder=0)
    ax.set_xlabel("relative width of the average of the weights at the last checkpoint")
    ax.set_ylabel(f"{metric_name(features, 'fd')}, step {last:,}\n← lower is better")
    ax.set_title(f"{study}: averages of the weights", loc="left", weight="bold", pad=18)
    figure.supxlabel(CAPTION, x=0.02, ha="left", fontsize=8, color="0.25")
    return figure
