"""The forest plot: what every comparison found, seed by seed and over all."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from convergence.analysis.comparison import PAIR, over_seeds, verdict
from convergence.figures.style import COLOURS, STYLE, draw_legend, save_figure
from convergence.tables import metric_name

WIDTH_INCHES = 11.0
ROW_INCHES = 0.27
GAP_ROWS = 1.8  # above each comparison, for its name
REACH = 2.0  # of the axis beyond estimates and seeds, in units of their span: longer intervals end in an arrow
PRIMARY, SECONDARY, SEED = COLOURS[1], "0.15", "0.55"
PANELS = {"average": 0, "final": 0, "images": 1, "seconds": 1}


def draw_forest(table: pd.DataFrame, paths: list[Path]) -> None:
    """Draw every comparison of `convergence.analysis.comparison.speedup_table`, and save it to each path.

    Left the advantage in the metric, right the speed-up at each threshold: right of the line the candidate is better.
    The primary endpoint is coloured. Dots are seeds, triangles among them the bounds of censored ones, squares the
    estimates over seeds with their 95% intervals. An arrow ends what leaves the axis. Equal tables give equal bytes.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(table), paths)


def _draw(table: pd.DataFrame) -> Figure:
    if table.empty:
        figure = Figure((WIDTH_INCHES, 1))
        figure.text(0.5, 0.5, "Nothing is compared.", ha="center", va="center")
        return figure
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    table = _as_shown(table)
    panel = table["quantity"].map(PANELS)
    limits = [_limits(table[panel == index]) for index in (0, 1)]
    labels: list[dict[float, str]] = [{}, {}]
    top = 0.0
    for _, group in table.groupby(PAIR, sort=False):
        top -= GAP_ROWS
        title = axes[0].text(0, top + 0.8, _title(group), transform=axes[0].get_yaxis_transform(), weight="bold")
        title.set_in_layout(False)  # it reaches over both panels
        title.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        lowest = top
        for index in (0, 1):
            rows = group[panel[group.index] == index].groupby(["threshold", "quantity"], sort=False, dropna=False)
            for at, (_, row) in enumerate(rows):
                _draw_row(axes[index], top - at, row, limits[index])
                labels[index][top - at] = _label(row.iloc[0])
                lowest = min(lowest, top - at)
        top = lowest
    for ax, of_rows, (low, high) in zip(axes, labels, limits, strict=True):
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set_yticks(list(of_rows), list(of_rows.values()))
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
        Line2D([], [], marker="o", markersize=4, color=SEED, linestyle="", label="a seed"),
        Line2D([], [], marker=">", markersize=5, color=SEED, linestyle="", label="a censored seed: there or beyond"),
    ]
    figure.set_size_inches(WIDTH_INCHES, 1.2 - ROW_INCHES * top)
    draw_legend(figure, handles, WIDTH_INCHES, "outside lower center")
    return figure


def _as_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Advantages in the metric in percent of the baseline's, or in points for plain scales; the others as they are."""
    table, numbers = table.copy(), ["effect", "low", "high"]
    levels = table["quantity"].isin(["average", "final"])
    logs = levels & (table["scale"] == "log")
    table.loc[logs, numbers] = -np.expm1(-table.loc[logs, numbers].astype(float))
    table.loc[levels, numbers] *= 100
    return table


def _draw_row(ax: Axes, y: float, rows: pd.DataFrame, limits: tuple[float, float]) -> None:
    """One quantity: its seeds and its interval, cut at the limits of the axis."""
    seeds, summary = rows[rows["seed"].notna()], rows[rows["seed"].isna()].iloc[0]
    exact = seeds["effect"].dropna()
    if len(exact):  # an empty line that is not clipped has the layout think that it lies at pixel (0, 0)
        ax.plot(exact, np.full(len(exact), y), "o", markersize=4, color=SEED, zorder=3, clip_on=False)
    for bound, marker in (("low", ">"), ("high", "<")):
        bounds = seeds[(seeds["censored"] > 0) & np.isfinite(seeds[bound])][bound]
        ax.plot(bounds, np.full(len(bounds), y), marker, markersize=5, color=SEED, zorder=3)
    colour = PRIMARY if summary["primary"] and summary["quantity"] == "average" else SECONDARY
    low, high = np.clip([summary["low"], summary["high"]], *limits)
    unknown = np.isinf([summary["low"], summary["high"]]).all()
    ax.plot([low, high], [y, y], color=colour, linewidth=0.8 if unknown else 1.6, alpha=0.4 if unknown else 1)
    for end, cut, marker in ((low, summary["low"] < limits[0], "<"), (high, summary["high"] > limits[1], ">")):
        if cut:
            ax.plot(end, y, marker, markersize=7, color=colour, alpha=0.4 if unknown else 1, clip_on=False)
    ax.plot(summary["effect"], y, "s", markersize=6, color=colour, zorder=4)


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Ends of an axis that shows zero, all estimates and seeds, and intervals as far as they do not dwarf these."""
    bounds = rows.loc[rows["seed"].notna(), ["low", "high"]].to_numpy().ravel()
    inner = np.concatenate([[0.0], rows["effect"].dropna(), bounds[np.isfinite(bounds)]])
    low, high = inner.min(), inner.max()
    reach = REACH * (high - low or 1.0)
    outer = rows[["low", "high"]].to_numpy().ravel()
    outer = np.clip([low, high, *outer[np.isfinite(outer)]], low - reach, high + reach)
    margin = 0.05 * (outer.max() - outer.min() or 1.0)
    return outer.min() - margin, outer.max() + margin


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios between exp(low) and exp(high), dense where the axis is short."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = sorted({digit * 10.0**power for digit in digits for power in range(-6, 7)})
        ticks = [float(f"{tick:.3g}") for tick in ticks if low <= np.log(tick) <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _title(group: pd.DataFrame) -> str:
    row = over_seeds(group, "average")
    role = "primary" if row["primary"] else "secondary"
    name = metric_name(row["features"], row["metric"])
    return f"{row['study']}: {row['candidate']} against {row['baseline']}, {name} ({role}): {verdict(row)}"


def _label(row: pd.Series) -> str:
    if row["quantity"] in ("images", "seconds"):
        return f"{row['quantity']} to {row['threshold']:.4g}"
    return {"average": "average", "final": "at the end"}[row["quantity"]]
