"""The figure of a metric against the width of the average of the weights, at the last checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import ScaledTranslation

from convergence.analysis.intervals import t_interval
from convergence.figures.labels import label_ends, spread
from convergence.figures.style import STYLE, line_style, save_figure
from convergence.tables import averages_in, metric_name

INCHES = (7.5, 5.0)
ARM_INCHES = 0.05  # between the points of two arms, whose intervals would hide each other
NAME_GAP = 0.12  # between the names of two averages, as a fraction of the width of the axes
AXIS_MARGIN = 0.06
CAPTION = "Intervals: 95% t-intervals of the mean over seeds, on logs. Dots: single seeds. Arms are drawn side by side."


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
    widths_of = {name: [widths[arm, name] for arm in styles] for name in averages_in(metrics)}
    known_widths = [width for of_arms in widths_of.values() for width in of_arms]
    margin = 0.1 * (max(known_widths) - min(known_widths) or 1.0)
    left, right = ax.set_xlim(min(known_widths) - margin, max(known_widths) + margin)
    ends, edges = {}, list(rows["value"])
    for place, (arm, style) in enumerate(styles.items()):
        of_arm = rows[rows["arm"] == arm].groupby("ema")["value"]
        values = {widths[arm, name]: np.log(seeds.to_numpy()) for name, seeds in of_arm}
        if not (points := sorted(values)):
            continue
        mean, low, high = np.exp([t_interval(values[point]) for point in points]).T
        known = np.isfinite(high)  # one seed has no interval
        shift = ax.transData + ScaledTranslation(ARM_INCHES * place, 0, figure.dpi_scale_trans)
        ax.plot(points, mean, linewidth=1.8, markersize=6, zorder=4, transform=shift, **style)
        ax.vlines(np.array(points)[known], low[known], high[known], color=style["color"], transform=shift)
        for point in points:
            dots = np.exp(values[point])
            ax.plot([point] * len(dots), dots, ".", color=style["color"], markersize=4, alpha=0.5, transform=shift)
        ends[arm] = (points[-1], mean[-1])
        edges += [*low[known], *high[known]]
    if edges:
        margin = AXIS_MARGIN * (max(edges) - min(edges) or 1.0)
        ax.set_ylim(min(edges) - margin, max(edges) + margin)
    label_ends(ax, ends, styles)
    tops = [float(np.mean(of_arms)) for of_arms in widths_of.values()]
    for name, top, place in zip(
        widths_of, tops, spread((np.array(tops) - left) / (right - left), NAME_GAP), strict=True
    ):
        ax.annotate(name, (top, 1), (place, 1.05), xycoords=("data", "axes fraction"), textcoords="axes fraction",
                    ha="center", fontsize=8, color="0.3", arrowprops={"arrowstyle": "-", "color": "0.8"})  # fmt: skip
    for width in set(known_widths):
        ax.axvline(width, color="0.9", linewidth=0.8, zorder=0)
    ax.set_xlabel("relative width of the average of the weights at the last checkpoint")
    ax.set_ylabel(f"{metric_name(features, 'fd')}, step {last:,}\n← lower is better")
    ax.set_title(f"{study}: averages of the weights", loc="left", weight="bold", pad=26)
    figure.supxlabel(CAPTION, x=0.02, ha="left", fontsize=8, color="0.25")
    return figure
