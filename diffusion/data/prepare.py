"""Writes a prepared dataset from images of any size."""

import hashlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, features

from diffusion.errors import InputError
from diffusion.files import atomic_write, read_json, write_npy_header
from diffusion.progress import with_progress

logger = logging.getLogger(__name__)

MAX_SKIPPED_FRACTION = 0.01
SECONDS_BETWEEN_NOTES = 5
NOT_STATED = "not stated"


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


# Writing a prepared dataset


def _prepare(directory: Path, pictures: Pictures, image_size: int, pad: int) -> None:
    """Reduce pictures to a dataset; those that cannot be read are skipped.

    Until all is done it lies in `images.partial.npy`, beside a note of how far it is: there a next call goes on.

    Raises:
        InputError: too many pictures cannot be read.
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
                with atomic_write(note) as text:
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
            raise InputError(
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
    except (InputError, KeyError):
        return 0, {}


def _write_dataset(directory: Path, image_size: int, images: Iterable[np.ndarray], manifest: dict) -> None:
    """Stream uint8 [image_size, image_size, 3] images to `images.npy`, then write the completed manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    count, digest = 0, hashlib.sha256()
    with atomic_write(directory / "images.npy") as file:
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
    with atomic_write(directory / "manifest.json") as file:
        file.write(json.dumps(manifest | facts, indent=2, ensure_ascii=False).encode() + b"\n")
    logger.info("%d images of %d pixels written to %s", count, image_size, directory)


def _versions(*codecs: str) -> dict[str, str | None]:
    """Versions of Pillow and of those of its libraries that determine the pixels; None for one it lacks."""
    return {"pillow": Image.__version__} | {codec: features.version(codec) for codec in codecs}
