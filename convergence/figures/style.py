"""The style that all figures share: colours, axes, legends, and how figures are saved."""

from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from diffusion.files import atomic_write

Style = dict[str, Any]  # keyword arguments of a line

# Okabe & Ito 2008, "Color Universal Design", without yellow, which is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "p", "h", ">")  # none looks like the cross of a failed run
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)))
DPI = 200
LOG_AXIS_FROM_RATIO = 3  # a range of values above this ratio is drawn on a log axis
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "svg.hashsalt": "curves",  # without a salt the ids in an SVG are random
}


def draw_legend(
    figure: FigureBase,
    handles: list[Line2D],
    width: float,
    loc: Literal["outside lower center", "outside upper center"],
) -> int:
    """Adds a legend with as few rows as possible to a figure of `width` inches. Returns the number of rows."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(width / (0.65 + 0.08 * longest)))  # inches of a handle and of a letter
    rows = -(-len(handles) // fitting)
    figure.legend(
        handles=handles, loc=loc, ncols=-(-len(handles) // rows), frameon=False, handlelength=3, columnspacing=1.2
    )
    return rows


def line_style(index: int) -> Style:
    """Returns colour, marker and dashes of arm number `index`. Arms differ even without colour."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def set_log_axis(ax: Axes) -> None:
    """Makes the y axis logarithmic with ticks at round numbers, even if it spans less than one decade.

    Call this function after plotting, because the ticks depend on the limits of the axis.
    """
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    digits = (1,) if high > 1000 * low else (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    ax.yaxis.set_major_locator(LogLocator(subs=digits))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def set_image_axis(ax: Axes, panel: pd.DataFrame) -> None:
    """Labels the x axis with training images and, if all rows have one batch size, the top axis with optimizer steps.

    Args:
        ax: the axes, with training images as x.
        panel: table with the columns `images` and `step`.
    """
    last = panel["images"].max() or 1
    ax.set_xlim(-0.03 * last, 1.04 * last)
    ax.set_xlabel("training images")
    trained = panel[panel["step"] > 0]
    batch_sizes = (trained["images"] / trained["step"]).unique()
    shown: list[Any] = [ax]
    if len(batch_sizes) == 1 and batch_sizes[0] > 1:  # tables without a column step have step = images
        (batch_size,) = batch_sizes
        steps = ax.secondary_xaxis("top", functions=(lambda x: x / batch_size, lambda step: step * batch_size))
        steps.set_xlabel("optimizer steps")
        shown.append(steps)
    else:
        ax.spines["top"].set_visible(False)
    for axis in shown:
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True))
        axis.xaxis.set_major_formatter(lambda value, _: short_count(value))


def set_hour_axis(ax: Axes, last: float) -> None:
    """Labels the x axis with reference hours, from 0 to the `last` ones."""
    ax.set_xlim(-0.03 * (last or 1), 1.04 * (last or 1))
    ax.set_xlabel("reference hours")
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    ax.spines["top"].set_visible(False)


def short_count(count: float) -> str:
    """Returns a count as text with three digits: 500, 3.2k, 1.25M."""
    count = float(f"{count:.3g}")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def save_figure(figure: Figure, paths: list[Path]) -> None:
    """Saves a figure to each path in the format of the suffix (png, svg or pdf). Equal figures give equal bytes."""
    for path in paths:
        with atomic_write(path) as file:
            # A date or a version in the file would make files with equal data differ.
            metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
            kind = path.suffix.removeprefix(".")
            figure.savefig(file, format=kind, dpi=DPI, metadata=metadata.get(kind))
