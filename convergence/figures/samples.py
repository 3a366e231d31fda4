"""The grid of sample previews: a row per arm, a column per checkpoint."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from convergence.errors import StudyError
from convergence.figures.style import _short
from convergence.tables import diverged
from diffusion.files import atomic_write

CELL_PIXELS = 480
CELL_GAP = 12
GRID_COLUMNS = 6
FONT_PIXELS = 26
EMPTY_CELL = (236, 236, 236)
INK = (0, 0, 0)
PALE_INK = (90, 90, 90)


# --- Samples ------------------------------------------------------------------------------------------------


def preview_grid(
    cells: Iterable[tuple[str, str, int, int, int, str]], metrics: pd.DataFrame
) -> tuple[dict[str, dict[int, Path | None]], dict[int, int]]:
    """What `samples_grid` takes, grids and steps: a row per arm of each study, without what diverged.

    Args:
        cells: (study, arm, seed, step, training images, its preview) of every checkpoint to be shown.
        metrics: the long table of metrics, which tells what diverged.

    Returns:
        The grids, and the steps of those numbers of images that are one step in all arms.
    """
    cells, keys = list(cells), ["study", "arm", "seed", "step"]
    without_samples = set(metrics.loc[diverged(metrics), keys].itertuples(index=False, name=None))
    several = len({study for study, *_ in cells}) > 1
    grids: dict[str, dict[int, Path | None]] = defaultdict(dict)
    steps: dict[int, set[int]] = defaultdict(set)
    for study, arm, seed, step, images, preview in cells:
        shown = (study, arm, seed, step) not in without_samples
        grids[f"{study} {arm}" if several else arm][images] = Path(preview) if shown else None
        steps[images].add(step)
    return grids, {images: s.pop() for images, s in steps.items() if len(s) == 1}


def samples_grid(grids: Mapping[str, Mapping[int, Path | None]], destination: Path, steps: Mapping[int, int]) -> None:
    """Save one PNG of previews: a row per arm, a column per checkpoint (six at most, from first to last).

    Small images are enlarged by a whole factor without smoothing, large ones reduced by a whole factor.

    Args:
        grids: arm -> training images -> its preview; None where there is none, as after a divergence.
        destination: the PNG.
        steps: training images -> optimiser step, for the headings; a column without one names images only.

    Raises:
        StudyError: a preview cannot be read.
    """
    columns = sorted({images for row in grids.values() for images in row})
    chosen = np.linspace(0, len(columns) - 1, min(len(columns), GRID_COLUMNS)).round().astype(int)
    columns = [columns[index] for index in chosen]
    cells = {
        (arm, images): _load_cell(path)
        for arm, row in grids.items()
        for images, path in row.items()
        if images in columns and path is not None
    }
    width = max((cell.width for cell in cells.values()), default=CELL_PIXELS)
    height = max((cell.height for cell in cells.values()), default=CELL_PIXELS // 2)
    margin = 2 * FONT_PIXELS

    size = (margin + len(columns) * (width + CELL_GAP), 2 * margin + len(grids) * (height + CELL_GAP))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, images in enumerate(columns):
        heading = f"{_short(images)} images" + (f" (step {steps[images]:,})" if images in steps else "")
        _write(page, heading, (margin + column * (width + CELL_GAP) + width // 2, margin // 2), width)
    for row, arm in enumerate(grids):
        top = margin + row * (height + CELL_GAP)
        _write(page, arm, (margin // 2, top + height // 2), height, upwards=True)
        for column, images in enumerate(columns):
            left = margin + column * (width + CELL_GAP)
            if cell := cells.get((arm, images)):
                page.paste(cell, (left, top))
            else:
                draw.rectangle((left, top, left + width - 1, top + height - 1), fill=EMPTY_CELL)
                _write(page, "no samples", (left + width // 2, top + height // 2), width, PALE_INK)
    caption = "Every cell starts from the same latents, in the same order."
    _write(page, caption, (size[0] // 2, size[1] - margin // 2), size[0], PALE_INK)
    _save_png(page, destination)


def _load_cell(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except OSError as error:
        raise StudyError(
            f"The preview {path} cannot be read ({error}): delete it and run the same command again"
        ) from error
    if image.width > CELL_PIXELS:
        return image.reduce(round(image.width / CELL_PIXELS))
    factor = round(CELL_PIXELS / image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _write(
    page: Image.Image,
    text: str,
    centre: tuple[int, int],
    room: int,
    ink: tuple[int, int, int] = INK,
    upwards: bool = False,
) -> None:
    """Put one line of text around a point, smaller where it would be longer than the room in pixels."""
    file = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    font = ImageFont.truetype(file, FONT_PIXELS)
    if font.getlength(text) > room:
        font = ImageFont.truetype(file, FONT_PIXELS * room / font.getlength(text))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, anchor="mm"))
    label = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(label).text((1 - left, 1 - top), text, fill=255, font=font, anchor="mm")
    if upwards:
        label = label.transpose(Image.Transpose.ROTATE_90)
    page.paste(ink, (centre[0] - label.width // 2, centre[1] - label.height // 2), label)


def _save_png(image: Image.Image, destination: Path) -> None:
    with atomic_write(destination) as file:
        image.save(file, format="PNG")
