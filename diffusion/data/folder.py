"""Images of a folder or zip file, prepared as a dataset or read as one array."""

import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from diffusion.data.files import Opener, image_names, open_source, other_files, printable, snapshot
from diffusion.data.prepare import LICENCE_UNKNOWN, ImageSource, decode_image, prepare_images
from diffusion.errors import FileError
from diffusion.progress import with_progress

MAX_LICENCE_BYTES = 10_000
ARRAY = "arr_0"  # the name that `numpy.savez` gives to the first array


def prepare_folder(directory: Path, source: Path, image_size: int, pad: int = 0) -> None:
    """Prepares the images in a folder (with its subfolders) or zip file as a dataset.

    The images are in the order of their relative paths. EXIF orientation is applied, transparent pixels are blended
    with white, and only the first frame of an animation is used. Links to folders are followed. A zip file is not
    extracted.

    Hidden files are ignored. Files without the suffix of an image format are not read; the log and the manifest state
    how many there are. Images that cannot be read, or that are larger than `PIL.Image.MAX_IMAGE_PIXELS` (89
    megapixels), are skipped; the manifest names them. The manifest also quotes the first line of a file LICENSE or
    LICENCE (with any suffix) at the top level or one folder below.

    If a call is interrupted, the next call continues the work, and the result is the same.

    Args:
        directory: directory of `images.npy`, `manifest.json` and `files.json`; created if missing.
        source: folder or zip file.
        image_size: height and width of the prepared images, in pixels, at least 8.
        pad: number of black pixels added on each side of an image before resizing.

    Raises:
        FileError: if the source does not exist or contains no images.
        InputError: if more than 1% of the images cannot be read.
    """
    with open_source(source) as files:
        names = image_names(files, source)

        def read(index: int) -> Image.Image:
            with files[names[index]]() as file:
                return decode_image(file)

        images = ImageSource(
            [printable(name) for name in names], read, str(source), find_licence(files), snapshot(source),
            other_files(files),
        )  # fmt: skip
        prepare_images(directory, images, image_size, pad)


def read_images(source: Path) -> np.ndarray:
    """Reads images of equal size, without cropping or resizing.

    Args:
        source: folder or zip file, read as `prepare_folder` reads it; .npy file; or .npz file with the array `arr_0`.

    Returns:
        images, uint8 [N, H, W, 3] in 0..255. For a .npz file, the array is in memory. Otherwise, the array is a
        read-only memory map of a file.

    Raises:
        FileError: if the source does not exist or contains no images; if an image cannot be read or differs in size
            from the first image; if an array is damaged, has another shape or dtype, or is not scaled to 0..255.
        OSError: if the temporary directory is full.
    """
    if source.suffix in (".npy", ".npz"):
        return _read_array(source)
    # On disk, because thousands of large images do not fit in memory.
    with open_source(source) as files, _temporary_file() as array:
        names = image_names(files, source)
        shape: tuple[int, ...] = ()
        for name in with_progress(names, "images read"):
            try:
                with files[name]() as file:
                    pixels = np.asarray(decode_image(file))
            except Exception as error:  # Decoders raise exceptions of any type on damaged files.
                reason = f"{type(error).__name__}: {error}"
                raise FileError(source, f"{name} cannot be read ({reason}): replace or remove it") from error
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise FileError(
                    source,
                    f"{name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, but the first image has "
                    f"{shape[1]}x{shape[0]}: resize all images to one size",
                )
            # Not through a memory map: on a full disk, that would end this process without a message.
            array.write(pixels.tobytes())
        array.flush()
        return np.memmap(array, np.uint8, "r", shape=(len(names), *shape))


@contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    """Yields a temporary file that is deleted when it is closed.

    Raises:
        OSError: if the temporary directory is full. The error names this directory.
    """
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        error.filename = error.filename or tempfile.gettempdir()
        raise


def _read_array(path: Path) -> np.ndarray:
    """Reads images [N, H, W, 3] from a .npy file, as a read-only memory map, or from the array `arr_0` of a .npz file.

    Raises:
        FileError: if the file is missing or damaged, or if the array is missing, is not uint8 [N, H, W, 3], or is not
            scaled to 0..255.
    """
    try:
        content = np.load(path, mmap_mode="r")
        if isinstance(content, np.lib.npyio.NpzFile):
            with content as arrays:
                content = arrays[ARRAY]
    except KeyError:
        names = ", ".join(arrays) or "none"
        raise FileError(path, f"has no array {ARRAY} (it has {names}): save the images under that name") from None
    except FileNotFoundError:
        raise FileError(path, "does not exist: correct the path") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        unknown = "pickle" in str(error)  # numpy takes every unknown format for a pickle
        reason = "it is no array, or holds Python objects, which are not loaded" if unknown else error
        raise FileError(path, f"cannot be read as an array ({reason}): save the images again") from error
    images: np.ndarray = content
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise FileError(
            path,
            f"contains {images.dtype} {list(images.shape)}, but uint8 [N, H, W, 3] with values in 0..255 is needed: "
            "convert the images",
        )
    if images[:1000].max() == 1:
        raise FileError(path, "has no value above 1: scale the images to 0..255")
    return images


def find_licence(files: Mapping[str, Opener]) -> str:
    """Returns the first line and the name of a file LICENSE or LICENCE (with any suffix).

    The file may be at the top level or one folder below. Returns "not stated" if there is no such file.
    """
    for name in files:
        path = PurePosixPath(name)
        if path.stem.upper() in {"LICENSE", "LICENCE"} and len(path.parts) <= 2:
            with files[name]() as file:
                lines = file.read(MAX_LICENCE_BYTES).decode("utf-8", "replace").splitlines()
            return next((f"{line.strip()} ({printable(name)})" for line in lines if line.strip()), LICENCE_UNKNOWN)
    return LICENCE_UNKNOWN
