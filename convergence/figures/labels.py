"""Labels next to the ends of lines, in place of a legend."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from scipy.optimize import isotonic_regression

from convergence.figures.style import Style

FONT_SIZE = 9
GAP = 0.065  # between the middles of two labels, as a fraction of the height of the axes
DARKER = 0.75  # of a colour, so that text in it is readable on white


def spread(places: np.ndarray, gap: float = GAP) -> np.ndarray:
    """Returns places in 0..1 that differ by `gap` or more, in the same order and as near as possible to `places`."""
    order = np.argsort(places, kind="stable")
    steps = np.minimum(gap, 1 / max(len(places) - 1, 1)) * np.arange(len(places))
    free = isotonic_regression(places[order] - steps).x
    spread_places = np.empty(len(places))
    spread_places[order] = np.clip(free, 0, 1 - steps[-1]) + steps
    return spread_places


def height_in_axes(ax: Axes, value: float) -> float:
    """Returns the height of a value of the y axis, as a fraction of the height of the axes."""
    return float((ax.get_yaxis_transform() + ax.transAxes.inverted()).transform((0, value))[1])


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], styles: Mapping[str, Style]) -> None:
    """Writes the name of each line to the right of the axes, connected with its end. Call it after setting the limits.

    Args:
        ax: the axes.
        ends: name -> the last point of its line, in data coordinates.
        styles: name -> style of its line.
    """
    if not ends:
        return
    heights = spread(np.clip([height_in_axes(ax, value) for _, value in ends.values()], 0, 1))
    for (name, end), height in zip(ends.items(), heights, strict=True):
        colour = styles[name]["color"]
        connection: dict[str, Any] = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4}
        ax.annotate(
            name,
            xy=end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            arrowprops=connection | {"linestyle": styles[name]["linestyle"]},
            annotation_clip=False,
            va="center",
            fontsize=FONT_SIZE,
            color=[DARKER * part for part in to_rgb(colour)],
        )
