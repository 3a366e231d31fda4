"""The style that all figures share: colours, axes, legends, files."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from diffusion.files import atomic_write

# Okabe & Ito 2008, "Color Universal Design"; yellow is left out: too pale for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "h", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)))
DPI = 200
LOG_AXIS_FROM_RATIO = 3
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "svg.hashsalt": "curves",  # ids in the SVG are random without it
}


def draw_legend(figure: FigureBase, handles: list[Line2D], width: float, loc: str) -> None:
    """A legend over a figure of this width in inches: in as few rows as hold its labels."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(width / (0.65 + 0.08 * longest)))  # inches of a handle and of a letter
    rows = -(-len(handles) // fitting)
    figure.legend(
        handles=handles, loc=loc, ncols=-(-len(handles) // rows), frameon=False, handlelength=3, columnspacing=1.2
    )


def line_style(index: int) -> dict[str, object]:
    """Colour, marker and dashes of arm `index`: in grey, marker and dashes still tell arms apart."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def set_log_axis(ax: Axes) -> None:
    """Make the y axis of what is drawn already logarithmic, with ticks at round numbers however short it is."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def set_image_axis(ax: Axes, panel: pd.DataFrame) -> None:
    """Training images below and, where one batch size holds for all, optimiser steps above."""
    last = panel["images"].max() or 1
    ax.set_xlim(-0.03 * last, 1.04 * last)
    ax.set_xlabel("training images")
    trained = panel[panel["step"] > 0]
    batch_sizes = (trained["images"] / trained["step"]).unique()
    shown = [ax]
    if len(batch_sizes) == 1 and batch_sizes[0] > 1:  # curves from elsewhere may know images alone
        (batch_size,) = batch_sizes
        steps = ax.secondary_xaxis("top", functions=(lambda x: x / batch_size, lambda step: step * batch_size))
        steps.set_xlabel("optimiser steps")
        shown.append(steps)
    else:
        ax.spines["top"].set_visible(False)
    for axis in shown:
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True))
        axis.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(count: float) -> str:
    """A count to three digits: 500, 3.2k, 1.25M."""
    count = float(f"{count:.3g}")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


# --- Files --------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, paths: list[Path]) -> None:
    """Save a figure drawn in `STYLE` to each path, in the format that the suffix names. Equal figures, equal bytes."""
    for path in paths:
        with atomic_write(path) as file:
            # a date or a version would make equal data differ
            metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
            kind = path.suffix.removeprefix(".")
            figure.savefig(file, format=kind, dpi=DPI, metadata=metadata.get(kind))
