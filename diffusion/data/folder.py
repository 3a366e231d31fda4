"""Images of a folder or a zip file, as a prepared dataset or as one array."""

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from diffusion.config import IMAGE_SUFFIXES
from diffusion.data.prepare import LICENCE_UNKNOWN, ImageSource, decode_image, prepare_images
from diffusion.errors import FileError
from diffusion.progress import with_progress

MAX_LICENCE_BYTES = 10_000

Opener = Callable[[], Any]
"""Opens a file for reading bytes."""


def prepare_folder(directory: Path, source: Path, image_size: int, pad: int = 0) -> None:
    """Prepare the images below a folder, or in a zip file, as a dataset, in the order of their relative paths.

    EXIF orientation is applied, transparency is blended over white, and an animation counts as its first frame.
    Hidden files are ignored. Images that cannot be read, or that are larger than `PIL.Image.MAX_IMAGE_PIXELS`
    (89 megapixels), are skipped; the log and the manifest name them. A zip file is not extracted. The manifest quotes
    the first line of a file LICENSE or LICENCE (with any suffix) at the top level. A call that was interrupted is
    resumed by the next one, with the same result.

    Args:
        directory: Receives `images.npy` and `manifest.json`; created if missing.
        source: A folder or a zip file.
        image_size: Height and width of the images, in pixels, at least 8.
        pad: Black pixels added on each side of an image before it is resized.

    Raises:
        FileError: The source does not exist, or contains no images.
        InputError: More than 1% of its images cannot be read.
    """
    with open_source(source) as files:
        names = image_names(files, source)

        def read(index: int) -> Image.Image:
            with files[names[index]]() as file:
                return decode_image(file)

        images = ImageSource(names, read, str(source), find_licence(files), _fingerprint(source))
        prepare_images(directory, images, image_size, pad)


def read_images(source: Path) -> np.ndarray:
    """Read images of equal size as they are, neither cropped nor resized.

    Args:
        source: A folder or a zip file, read as `prepare_folder` reads it, or a .npy file.

    Returns:
        uint8 [N, H, W, 3] in 0..255, read-only and stored on disk.

    Raises:
        FileError: The source does not exist, contains no images, or a .npy file is damaged or has another shape or
            type; an image cannot be read or differs in size from the first one.
        OSError: The temporary directory is full.
    """
    if source.suffix == ".npy":
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
    """A file that is deleted when it is closed.

    Raises:
        OSError: The temporary directory is full. The error names it.
    """
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        error.filename = error.filename or tempfile.gettempdir()
        raise


def _read_array(path: Path) -> np.ndarray:
    """Open a .npy file as a read-only memory map, uint8 [N, H, W, 3].

    Raises:
        FileError: The file is missing or damaged, or the array has another shape or type.
    """
    try:
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise FileError(path, f"cannot be read as an array ({error})") from error
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise FileError(path, f"contains {images.dtype} {list(images.shape)}, but uint8 [N, H, W, 3] is needed")
    return images


@contextmanager
def open_source(source: Path) -> Iterator[dict[str, Opener]]:
    """Yield the files of a folder or zip file in the order of their relative paths, each with a function to open it.

    Raises:
        FileError: The source does not exist, or is neither a folder nor a complete zip file.
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
            raise FileError(source, f"is neither a folder nor a complete zip file ({error})") from error
    else:
        raise FileError(source, "does not exist: name the folder or zip file that contains the images")


def image_names(files: Mapping[str, Opener], source: Path) -> list[str]:
    """Names of the files that are images, judged by their suffix; hidden files are ignored.

    Raises:
        FileError: No file is an image.
    """
    if names := [name for name in files if _is_image(name)]:
        return names
    raise FileError(source, f"contains no images, that is, no files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def find_licence(files: Mapping[str, Opener]) -> str:
    """First line and name of a licence file next to the images, or at the top of the only folder of a zip file."""
    for name in files:
        path = PurePosixPath(name)
        if path.stem.upper() in {"LICENSE", "LICENCE"} and len(path.parts) <= 2:
            with files[name]() as file:
                lines = file.read(MAX_LICENCE_BYTES).decode("utf-8", "replace").splitlines()
            return next((f"{line.strip()} ({name})" for line in lines if line.strip()), LICENCE_UNKNOWN)
    return LICENCE_UNKNOWN


def _fingerprint(source: Path) -> str:
    """Sizes and modification times of a zip file, or of all files of a folder."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return json.dumps([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])
