"""Images of a folder or a zip file: as a dataset, or as an array."""

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from diffusion.config import IMAGE_SUFFIXES
from diffusion.data.prepare import NOT_STATED, Pictures, _decode, _prepare
from diffusion.errors import InputError
from diffusion.progress import with_progress

LICENCE_BYTES = 10_000

Opener = Callable[[], Any]


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
        InputError: there is no such source, it holds no image, or more than 1% of its images cannot be read.
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
        InputError: there is no such folder or zip.
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
            raise InputError(f"{source} is neither a folder nor a whole zip file ({error}): name one.") from error
    else:
        raise InputError(f"There is no {source}: name the folder or zip file that holds the images.")


def _stamp(source: Path) -> str:
    """Sizes and times of a zip or of all files of a folder."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return json.dumps([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _image_names(files: Mapping[str, Opener], source: Path) -> list[str]:
    """Which of the files are pictures.

    Raises:
        InputError: none is.
    """
    if names := [name for name in files if _is_image(name)]:
        return names
    raise InputError(f"{source} holds no images: put files ending in {', '.join(sorted(IMAGE_SUFFIXES))} there.")


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


def read_images(source: Path) -> np.ndarray:
    """Images as they are, neither cropped nor resized: uint8 [N, H, W, 3] in 0..255.

    Args:
        source: a folder or a zip, read as `prepare_folder` does except for the size, or a .npy file of such an array.

    Raises:
        InputError: it is none of these, an image cannot be read, or the images differ in size.
    """
    if source.suffix == ".npy":
        try:
            images = np.load(source, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{source} is not a whole array ({error}): delete it and make it again, or name another."
            ) from error
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise InputError(f"{source} holds {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]: convert it.")
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
                raise InputError(f"{name} in {source} cannot be read ({reason}): replace or remove it.") from error
            if images is None:
                # On disk: thousands of large images are more than memory holds.
                with tempfile.TemporaryFile() as array:
                    images = np.memmap(array, np.uint8, "w+", shape=(len(names), *pixels.shape))
            if pixels.shape != images.shape[1:]:
                height, width, _ = images.shape[1:]
                raise InputError(
                    f"{name} in {source} has {pixels.shape[1]}x{pixels.shape[0]} pixels where others have "
                    f"{width}x{height}: reduce all to one size first."
                )
            images[index] = pixels
    images.setflags(write=False)
    return images
