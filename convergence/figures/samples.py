"""The figure of sample previews: a row per arm, a column per checkpoint."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from PIL import Image

from convergence.figures.style import DPI, STYLE, save_figure, short_count
from diffusion.errors import FileError

MOST_COLUMNS = 6
CELL_PIXELS = 480  # the least width of a cell: its heading fits, and images are recognisable
GAP_PIXELS = 12
HEAD_PIXELS = 100
CAPTION_PIXELS = 70
EMPTY_CELL = "0.93"


def preview_grid(
    cells: Iterable[tuple[str, int, int, int, str]], metrics: pd.DataFrame
) -> tuple[dict[str, dict[int, Path | None]], dict[int, int]]:
    """Sorts the previews of one study into a row per arm, without those of checkpoints without samples.

    Args:
        cells: (arm, seed, step, training images, path of the preview) of every checkpoint to show.
        metrics: long table of metrics of the study; `n` is 0 where there are no samples.

    Returns:
        The arguments `grids` and `steps` of `samples_grid`.
    """
    without_samples = set(metrics.loc[metrics["n"] == 0, ["arm", "seed", "step"]].itertuples(index=False, name=None))
    grids: dict[str, dict[int, Path | None]] = {}
    steps: dict[int, set[int]] = {}
    for arm, seed, step, images, preview in cells:
        grids.setdefault(arm, {})[images] = None if (arm, seed, step) in without_samples else Path(preview)
        steps.setdefault(images, set()).add(step)
    return grids, {images: step for images, (step, *others) in steps.items() if not others}


def samples_grid(grids: Mapping[str, Mapping[int, Path | None]], path: Path, steps: Mapping[int, int]) -> None:
    """Draws previews and saves the figure: a row per arm, a column per checkpoint (six at most).

    Small previews are enlarged by a whole factor without smoothing, large ones are reduced by a whole factor.

    Args:
        grids: arm -> training images -> path of the preview; None if there is none, for instance after a divergence.
        path: where to save; the suffix chooses the format ("png", "svg", "pdf").
        steps: training images -> optimizer step, for the headings. A column without a step shows its images alone.

    Raises:
        FileError: a preview cannot be read.
    """
    columns = sorted({images for row in grids.values() for images in row})
    chosen = np.linspace(0, len(columns) - 1, min(len(columns), MOST_COLUMNS)).round().astype(int)
    columns = [columns[index] for index in chosen]
    cells = {(arm, images): _read(row.get(images)) for arm, row in grids.items() for images in columns}
    shapes = (cell.shape[:2] for cell in cells.values() if cell is not None)
    height, width = next(shapes, (CELL_PIXELS // 2, CELL_PIXELS))
    factor = -(-CELL_PIXELS // width)
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_grid(cells, list(grids), columns, steps, factor * height, factor * width), [path])


def _draw_grid(
    cells: Mapping[tuple[str, int], np.ndarray | None],
    arms: list[str],
    columns: list[int],
    steps: Mapping[int, int],
    height: int,
    width: int,
) -> Figure:
    """Draws cells, by arm and images, of exactly `height` times `width` pixels each."""
    longest = max(TextPath((0, 0), arm, size=STYLE["axes.labelsize"]).get_extents().width for arm in arms)
    left = round(longest / 72 * DPI) + 3 * GAP_PIXELS
    full_width = left + len(columns) * (width + GAP_PIXELS)
    full_height = HEAD_PIXELS + len(arms) * (height + GAP_PIXELS) - GAP_PIXELS + CAPTION_PIXELS
    figure = Figure((full_width / DPI, full_height / DPI), dpi=DPI)
    layout = {
        "left": left / full_width,
        "right": 1 - GAP_PIXELS / full_width,
        "bottom": CAPTION_PIXELS / full_height,
        "top": 1 - HEAD_PIXELS / full_height,
        "wspace": GAP_PIXELS / width,
        "hspace": GAP_PIXELS / height,
    }
    axes = figure.subplots(len(arms), len(columns), squeeze=False, gridspec_kw=layout)
    for ax, (arm, images) in zip(axes.flat, itertools.product(arms, columns), strict=True):
        ax.set(xticks=[], yticks=[], facecolor=EMPTY_CELL)
        ax.spines[:].set_visible(False)
        if (cell := cells[arm, images]) is None:
            ax.text(0.5, 0.5, "no samples", ha="center", va="center", color="0.35", transform=ax.transAxes)
        else:
            ax.imshow(cell, interpolation="nearest", aspect="auto")
    for ax, images in zip(axes[0], columns, strict=True):
        ax.set_title(f"{short_count(images)} images" + (f"\nstep {steps[images]:,}" if images in steps else ""))
    for ax, arm in zip(axes[:, 0], arms, strict=True):
        ax.set_ylabel(arm, rotation=0, ha="right", va="center")
    caption = "All cells start from the same latents,\nin the same order."
    figure.text(left / full_width, 0.4 * CAPTION_PIXELS / full_height, caption, va="center", fontsize=8, color="0.25")
    return figure


def _read(path: Path | None) -> np.ndarray | None:
    """Reads a preview as uint8 [H, W, 3]. One of twice `CELL_PIXELS` and more is reduced by a whole factor.

    Raises:
        FileError: it cannot be read.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise FileError(path, f"is not a readable image ({error})") from error
    return np.asarray(image.reduce(max(1, image.width // CELL_PIXELS)))
