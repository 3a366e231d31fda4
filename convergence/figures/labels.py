"""Labels of lines, in place of a legend: names at the ends of lines, and a text in a place without lines."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from scipy.optimize import isotonic_regression

from convergence.figures.style import Style

FONT_SIZE = 9
GAP = 0.065  # between the middles of two labels, as a fraction of the height of the axes
LETTER, LINE = 0.019, 0.055  # of a label in bold, as fractions of the width and height of the axes
STEPS = 20  # points between two vertices of a line
GRID = 41  # places in each direction where a label may be
DARKER = 0.75  # of a colour, so that text in it is readable on white


def spread(places: np.ndarray, gap: float = GAP) -> np.ndarray:
    """Returns places [N] in 0..1 that are as near as possible to the given places and differ by at least `gap`.

    The order of the places stays the same. If N places with this gap do not fit into 0..1, the gap is smaller.
    """
    order = np.argsort(places, kind="stable")
    steps = np.minimum(gap, 1 / max(len(places) - 1, 1)) * np.arange(len(places))
    free = isotonic_regression(places[order] - steps).x
    spread_places = np.empty(len(places))
    spread_places[order] = np.clip(free, 0, 1 - steps.max(initial=0)) + steps
    return spread_places


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], styles: Mapping[str, Style]) -> None:
    """Writes the name of each line to the right of the axes and connects the name with the end of the line.

    The name of a line that ends earlier than others is next to the end of the line instead. Call this function after
    setting the limits of the axes.

    Args:
        ax: the axes.
        ends: name of each line -> last point of the line, in data coordinates.
        styles: name of each line -> style of the line.
    """
    to_axes = ax.transData - ax.transAxes
    last = max((x for x, _ in ends.values()), default=0.0)
    at_edge = {name: to_axes.transform(end)[1] for name, end in ends.items() if end[0] == last}
    places = dict(zip(at_edge, spread(np.clip(list(at_edge.values()), 0, 1)), strict=True))
    for name, end in ends.items():
        colour = styles[name]["color"]
        text: dict[str, Any] = {
            "va": "center",
            "fontsize": FONT_SIZE,
            "color": [DARKER * part for part in to_rgb(colour)],
        }
        if name in places:
            connection: dict[str, Any] = {
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 4,
            }
            connection["linestyle"] = styles[name]["linestyle"]
            place = (1.04, places[name])
            ax.annotate(name, end, place, textcoords="axes fraction", arrowprops=connection, **text)
        else:
            ax.annotate(name, end, (9, 0), textcoords="offset points", **text)


def free_place(points: np.ndarray, size: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Returns the middle [2] of a box of width and height `size` [2] that contains the fewest of `points` [P, 2].

    If several boxes contain equally few points, the result is the middle nearest to `near` [2]. All coordinates are
    fractions of the axes.
    """
    grid = np.linspace(size / 2 + 0.01, 1 - size / 2 - 0.01, GRID)  # [GRID, 2]
    middles = np.stack(np.meshgrid(*grid.T), axis=-1).reshape(-1, 2)
    covered = (np.abs(points[:, None] - middles) < size / 2).all(axis=-1).sum(axis=0)
    return middles[np.lexsort((np.linalg.norm(middles - near, axis=1), covered))[0]]


def label_in_free_place(ax: Axes, text: str, place: tuple[float, float]) -> None:
    """Writes text where it covers no line, and connects the text with `place`, which is in data coordinates.

    Call this function after drawing the lines.
    """
    paths = [line.get_path().transformed(line.get_transform() - ax.transAxes) for line in ax.lines]
    points = np.concatenate([path.interpolated(STEPS).vertices for path in paths if len(np.asarray(path.vertices)) > 1])
    lines = text.split("\n")
    size = np.array([LETTER * max(map(len, lines)), LINE * len(lines)])
    near = (ax.transData - ax.transAxes).transform(place)
    ax.annotate(
        text,
        place,
        tuple(free_place(points, size, near)),
        textcoords="axes fraction",
        arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2},
        ha="center",
        va="center",
        fontsize=FONT_SIZE,
        weight="bold",
        zorder=6,
    )
