"""The figure of samples: a row per arm, a column per checkpoint, and a row of real images."""

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

MOST_COLUMNS = 4
CELL_ROWS, CELL_COLUMNS = 2, 4  # images of a cell: the upper left quarter of a preview
IMAGE_PIXELS = 128  # about the size of one image: it is recognisable, and the heading of a cell fits
GAP_PIXELS = 24
HEAD_PIXELS = 110
CAPTION_PIXELS = 80
EMPTY_CELL = "0.93"
REAL = "real images"


def preview_grid(
    cells: Iterable[tuple[str, int, int, int, str]], metrics: pd.DataFrame
) -> tuple[dict[str, dict[int, Path | None]], dict[int, int]]:
    """Arranges the previews of one study by arm and training images.

    A preview is an image of the first samples of a checkpoint. A checkpoint without samples has None in place of a
    preview.

    Args:
        cells: (arm, seed, step, training images, path of the preview) of each checkpoint to show.
        metrics: the long table of metrics of the study; `n` is 0 at a checkpoint without samples.

    Returns:
        the arguments `grids` and `steps` of `samples_grid`.
    """
    without_samples = set(metrics.loc[metrics["n"] == 0, ["arm", "seed", "step"]].itertuples(index=False, name=None))
    grids: dict[str, dict[int, Path | None]] = {}
    steps: dict[int, set[int]] = {}
    for arm, seed, step, images, preview in cells:
        grids.setdefault(arm, {})[images] = None if (arm, seed, step) in without_samples else Path(preview)
        steps.setdefault(images, set()).add(step)
    return grids, {images: step for images, (step, *others) in steps.items() if not others}


def samples_grid(
    grids: Mapping[str, Mapping[int, Path | None]], steps: Mapping[int, int], seed: int, real: np.ndarray, path: Path
) -> None:
    """Draws the samples of one seed and saves the figure: a row per arm, a column per trained checkpoint.

    The figure has at most four columns, and its last row shows real images. Small images are enlarged by a whole factor
    without smoothing. Large images are reduced by a whole factor.

    Args:
        grids: arm -> training images -> path of the preview, an image of the first samples of the checkpoint. The path
            is None if there is no preview, for instance after a divergence.
        steps: training images -> optimizer step, for the headings. A column without a step shows only training images.
        seed: seed of the runs, for the caption.
        real: [N, H, H, 3] uint8, the images of the dataset; images at equal distances in this array are shown.
        path: file to write; the suffix chooses the format ("png", "svg", "pdf").

    Raises:
        FileError: a preview cannot be read.
    """
    columns = sorted({images for row in grids.values() for images in row})
    columns = columns[columns[0] == 0 and len(columns) > 1 :]  # an untrained net gives noise
    chosen = np.linspace(0, len(columns) - 1, min(len(columns), MOST_COLUMNS)).round().astype(int)
    columns = [columns[index] for index in chosen]
    rows = {arm: [_read(row.get(images)) for images in columns] for arm, row in grids.items()}
    heads = [
        f"{short_count(images)} images" + (f"\nstep {steps[images]:,}" if images in steps else "") for images in columns
    ]
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_grid(rows | {REAL: _strips(real, len(columns))}, heads, seed, real.shape[1]), [path])


def _draw_grid(rows: Mapping[str, list[Image.Image | None]], heads: list[str], seed: int, size: int) -> Figure:
    """Draws rows of cells. Images have `size` x `size` pixels, and all pixels are drawn equally large."""
    enlarged, reduced = max(1, round(IMAGE_PIXELS / size)), max(1, round(size / IMAGE_PIXELS))
    width = enlarged * -(-_with_gaps(size, CELL_COLUMNS) // reduced)
    heights = [enlarged * -(-_with_gaps(size, 1 if row == REAL else CELL_ROWS) // reduced) for row in rows]
    longest = max(TextPath((0, 0), row, size=STYLE["axes.labelsize"]).get_extents().width for row in rows)
    left = round(longest / 72 * DPI) + 2 * GAP_PIXELS
    full_width = left + len(heads) * (width + GAP_PIXELS)
    full_height = HEAD_PIXELS + sum(heights) + GAP_PIXELS * (len(rows) - 1) + CAPTION_PIXELS
    figure = Figure((full_width / DPI, full_height / DPI), dpi=DPI)
    layout = {
        "left": left / full_width,
        "right": 1 - GAP_PIXELS / full_width,
        "bottom": CAPTION_PIXELS / full_height,
        "top": 1 - HEAD_PIXELS / full_height,
        "wspace": GAP_PIXELS / width,
        "hspace": GAP_PIXELS / (sum(heights) / len(rows)),
    }
    axes = figure.subplots(len(rows), len(heads), squeeze=False, height_ratios=heights, gridspec_kw=layout)
    for line, (row, cells) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(row, rotation=0, ha="right", va="center")
        for ax, cell in zip(line, cells, strict=True):
            ax.set(xticks=[], yticks=[], facecolor=EMPTY_CELL)
            ax.spines[:].set_visible(False)
            if cell is None:
                ax.text(0.5, 0.5, "no samples", ha="center", va="center", color="0.35", transform=ax.transAxes)
            else:
                ax.imshow(cell.reduce(reduced), interpolation="nearest", aspect="auto")
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head)
    caption = f"Seed {seed}: all cells start from\nthe same latents, in the same order."
    figure.text(
        GAP_PIXELS / full_width, 0.45 * CAPTION_PIXELS / full_height, caption, va="center", fontsize=8, color="0.25"
    )
    return figure


def _with_gaps(size: int, count: int) -> int:
    """Returns the length in pixels of `count` images in a preview, which have gaps of one pixel."""
    return count * (size + 1) + 1


def _strips(real: np.ndarray, count: int) -> list[Image.Image | None]:
    """Returns `count` strips of real images, with the gaps of a preview."""
    chosen = np.linspace(0, len(real) - 1, count * CELL_COLUMNS).round().astype(int)
    framed = np.pad(real[chosen], ((0, 0), (1, 1), (1, 0), (0, 0)), constant_values=255)  # [N, H + 2, W + 1, 3]
    strips = [
        np.pad(np.hstack(list(part)), ((0, 0), (0, 1), (0, 0)), constant_values=255) for part in np.split(framed, count)
    ]
    return [Image.fromarray(strip) for strip in strips]


def _read(path: Path | None) -> Image.Image | None:
    """Reads the upper left quarter of a preview; returns None if there is no path.

    Raises:
        FileError: the preview cannot be read.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise FileError(path, f"is not a readable image ({error})") from error
    return image.crop((0, 0, image.width // 2 + 1, image.height // 2 + 1))
