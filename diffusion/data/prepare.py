"""Preparation of a dataset: images of any size become one array of square images of equal size, with a manifest."""

import hashlib
import io
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from diffusion.data.files import FILES
from diffusion.errors import InputError
from diffusion.files import atomic_write, read_json, write_npy_header
from diffusion.progress import with_progress

logger = logging.getLogger(__name__)

MAX_SKIPPED_FRACTION = 0.01
SECONDS_BETWEEN_SAVES = 5
LICENCE_UNKNOWN = "not stated"
LOGGED_NAMES = 5  # skipped images that the log names
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Maps the EXIF orientation of an image to the transposition that makes the image upright."""


class ImageSource(NamedTuple):
    """Images in a fixed order that are read one by one."""

    names: Sequence[str]
    """Name of each image."""
    read: Callable[[int], Image.Image]
    """Function that returns the image at an index, as upright RGB. The function may raise any exception."""
    description: str
    """Origin of the images, for the manifest."""
    licence: str
    """Licence of the images, for the manifest."""
    files: Mapping[str, list[int]] = {}
    """`snapshot` of the source: size and modification time of each file. Empty if the images are not files."""
    other_files: Mapping[str, int] = {}
    """Number of files that are not images, by suffix."""


# Decode and resize


def decode_image(file: IO[bytes]) -> Image.Image:
    """Decodes an image file to RGB. EXIF orientation is applied, and transparent pixels are blended with white.

    Raises an exception of any type if the image is damaged or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with warnings.catch_warnings():
        # Above MAX_IMAGE_PIXELS, Pillow only warns; it raises an error above twice that size.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            return upright_rgb(opened)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB. EXIF orientation is applied, and transparent pixels are blended with white.

    If the original has 16 bits per value, `info["range"]` of the result is the pair of the least and the largest value
    in the original. Otherwise, `info` is empty.

    Raises:
        ValueError: if the range of the pixel values is not known (modes I and F).
    """
    # Pillow keeps 16 bits of grey values, but only the upper 8 of colours: then the decoder's raw mode names the bits.
    has_16_bits = re.search("I;16|;16[BLN]", f"{image.mode} {getattr(image, 'tile', '')}")
    image = _upright(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    info: dict[str | tuple[int, int], Any] = {}
    if has_16_bits:
        values = np.asarray(image)
        scale, rest = (1, 0) if values.itemsize == 2 else (256, 255)
        info["range"] = int(values.min()) * scale, int(values.max()) * scale + rest
    if image.mode.startswith("I;16"):
        # Pillow's conversion clips 16-bit values to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = info
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation to an image.

    `ImageOps.exif_transpose` is not used, because it also rewrites the EXIF data and fails if these data are unusual.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises exceptions of many types on unusual data.
        return image
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def resize_and_crop(image: Image.Image, image_size: int, pad: int = 0) -> np.ndarray:
    """Pads an RGB image, resizes it so that the shorter side is `image_size`, and crops the centre.

    As in ADM (Dhariwal & Nichol 2021, arXiv 2105.05233), a box filter halves the image while its shorter side is at
    least 2 * image_size. A bicubic filter then resizes the image to its final size.

    Args:
        image: RGB image.
        image_size: height and width of the result, in pixels.
        pad: number of black pixels added on each side before resizing.

    Returns:
        uint8 [image_size, image_size, 3].

    Raises:
        ValueError: if the resized image would be larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if pad:
        image = ImageOps.expand(image, pad)
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too long and thin to be enlarged to {width}x{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


# Write


def prepare_images(directory: Path, source: ImageSource, image_size: int, pad: int = 0) -> None:
    """Resizes and crops the images of a source, and writes `images.npy` and `manifest.json`.

    Images that cannot be read are skipped. The manifest names all skipped images, and the log names the first five.

    During the work, `images.partial.npy` contains the images written so far, and `images.partial.json` the number of
    images read. If the work is interrupted, the next call with equal arguments continues from these files, and the
    result is the same.

    Args:
        directory: directory of the files; created if missing.
        source: images to prepare.
        image_size: height and width of the prepared images, in pixels.
        pad: number of black pixels added on each side of an image before resizing.

    Raises:
        InputError: if more than 1% of the images cannot be read.
    """
    versions = library_versions("jpg", "libjpeg_turbo", "jpg_2000", "zlib", "webp", "avif", "libtiff")
    manifest = {"source": source.description, "licence": source.licence, "versions": versions}
    names = source.names
    call = json.dumps([manifest, list(names), source.files, image_size, pad])
    key = hashlib.sha256(call.encode()).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    partial, state = directory / "images.partial.npy", directory / "images.partial.json"
    done, skipped = _read_state(state, key)
    partial.touch()
    with partial.open("r+b") as file:
        available = file.seek(0, io.SEEK_END)
        file.seek(0)
        write_npy_header(file, (0, image_size, image_size, 3))
        bytes_per_image = 3 * image_size**2
        if available < file.tell() + bytes_per_image * (done - len(skipped)):
            done, skipped = 0, {}
        file.truncate(file.tell() + bytes_per_image * (done - len(skipped)))
        file.seek(0, io.SEEK_END)
        last_save = time.monotonic()
        ranges: list[tuple[int, int]] = []
        for index in with_progress(range(done, len(names)), "images read"):
            if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                file.flush()
                os.fsync(file.fileno())
                with atomic_write(state) as state_file:
                    state_file.write(json.dumps({"key": key, "done": index, "skipped": skipped}).encode())
                last_save = time.monotonic()
            try:
                image = source.read(index)
                pixels = resize_and_crop(image, image_size, pad)
            except Exception as error:  # Decoders raise exceptions of any type on damaged files.
                skipped[names[index]] = f"{type(error).__name__}: {error}"
                if len(skipped) <= LOGGED_NAMES:
                    logger.warning("skipped %s: %s", names[index], skipped[names[index]])
            else:
                file.write(pixels.tobytes())
                ranges += image.info.values()
        if len(skipped) > MAX_SKIPPED_FRACTION * len(names):
            for path in (partial, state):
                path.unlink(missing_ok=True)
            first = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
            raise InputError(
                f"{source.description}: {len(skipped)} of the {len(names)} images cannot be used, which is more than "
                f"{MAX_SKIPPED_FRACTION:.0%}: replace or remove them, first {first}"
            )
        if len(skipped) > LOGGED_NAMES:
            logger.warning("skipped %d of the %d images; the manifest names all of them", len(skipped), len(names))
        _warn_of_dark_images(ranges)
        if source.files:
            with atomic_write(directory / FILES) as files:
                files.write(json.dumps(source.files).encode())
        entries = manifest | {"other_files": source.other_files, "skipped": skipped}
        _finish(directory, file, len(names) - len(skipped), image_size, entries)
    state.unlink(missing_ok=True)


def _warn_of_dark_images(ranges: Sequence[tuple[int, int]]) -> None:
    """Logs a warning if images of 16 bits per value use less than half of the range 0..65535.

    Such images may contain 12-bit values.
    """
    if ranges and (highest := max(high for _, high in ranges)) < 2**15:
        lowest = min(low for low, _ in ranges)
        logger.warning(
            "the values of %d images of 16 bits range from %d to %d, and 65535 is white, so these images are dark: "
            "if %d should be white, multiply their values by %d",
            len(ranges), lowest, highest, highest, 65535 // max(highest, 1),
        )  # fmt: skip


def _read_state(path: Path, key: str) -> tuple[int, dict[str, str]]:
    """Returns how many images an interrupted call with the same key has read, and which images the call skipped."""
    try:
        state = read_json(path)
        return (state["done"], state["skipped"]) if state["key"] == key else (0, {})
    except (InputError, KeyError):
        return 0, {}


def write_dataset(directory: Path, image_size: int, images: Iterable[np.ndarray], manifest: dict[str, Any]) -> None:
    """Writes images one by one to `images.npy`, and then writes `manifest.json`.

    Args:
        directory: directory of the files; created if missing.
        image_size: height and width of the images, in pixels.
        images: images, each uint8 [image_size, image_size, 3].
        manifest: entries of `manifest.json`. This dict is read after the last image, so the iterator `images` may still
            change the dict. The file also states the number of images, the image size, and the SHA-256 digest of all
            pixels.
    """
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "images.partial.npy"
    try:
        with partial.open("w+b") as file:
            write_npy_header(file, (0, image_size, image_size, 3))
            count = 0
            for image in images:
                file.write(image.tobytes())
                count += 1
            _finish(directory, file, count, image_size, manifest)
    finally:
        partial.unlink(missing_ok=True)


def _finish(directory: Path, file: IO[bytes], count: int, image_size: int, manifest: dict[str, Any]) -> None:
    """Completes the array header in `file`, renames the file to `images.npy`, and writes the manifest."""
    file.seek(0)
    # NumPy pads the header so that the first axis can grow: the final count fits.
    write_npy_header(file, (count, image_size, image_size, 3))
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.flush()
    (directory / "manifest.json").unlink(missing_ok=True)
    Path(file.name).replace(directory / "images.npy")
    entries = manifest | {"count": count, "image_size": image_size, "sha256": digest}
    with atomic_write(directory / "manifest.json") as manifest_file:
        manifest_file.write(json.dumps(entries, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    logger.info("%d images of %d pixels written to %s", count, image_size, directory)


def library_versions(*libraries: str) -> dict[str, str | None]:
    """Returns the versions of Pillow and of libraries in Pillow. The version of a library that Pillow lacks is None."""
    return {"pillow": Image.__version__} | {library: features.version(library) for library in libraries}
