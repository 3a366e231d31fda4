"""The files of a folder or zip file: which files are images, how they are opened, and whether they have changed."""

import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from diffusion.errors import FileError

logger = logging.getLogger(__name__)

# Formats that Pillow opens, but that hold scientific data, video, or vectors drawn by other programs.
NO_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

FILES = "files.json"
"""Name of the file in the directory of a dataset that contains the `snapshot` of the source images."""

Opener = Callable[[], Any]
"""Function that opens a file for reading bytes."""


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes, in lower case, of the raster image formats that the installed Pillow decodes."""
    Image.init()
    decoded = ({*Image.OPEN} | {"MPO"}) - NO_RASTER  # the decoder of JPEG opens MPO
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in decoded)


def is_image(name: str) -> bool:
    """Returns whether a file name has the suffix of an image format."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def image_names(files: Iterable[str], source: Path) -> list[str]:
    """Returns the names of the files that are images. Logs how many other files there are, by suffix.

    Raises:
        FileError: if no file is an image.
    """
    names = [name for name in files if is_image(name)]
    if not names:
        suffixes = ", ".join(sorted(image_suffixes()))
        raise FileError(source, f"contains no images, that is, no files ending in {suffixes}")
    if others := other_files(files):
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.items())
        logger.info("%s: not read, since their suffix is not that of an image: %s", source, counts)
    return names


def other_files(files: Iterable[str]) -> dict[str, int]:
    """Returns the number of files that are not images, by suffix, with the most frequent suffix first."""
    suffixes = (printable(os.path.splitext(name)[1].lower()) for name in files if not is_image(name))
    return dict(Counter(suffix or "no suffix" for suffix in suffixes).most_common())


@contextmanager
def open_source(source: Path) -> Iterator[dict[str, Opener]]:
    """Opens a folder or zip file, and yields a dict of its files.

    The dict maps the relative path of each file to a function that opens the file, in the order of the paths. Hidden
    files, and files in folders `__MACOSX` (from a Mac), are left out.

    Raises:
        FileError: if the source does not exist, or is neither a folder nor a complete zip file.
    """
    if source.is_dir():
        files = {name: partial(open, entry.path, "rb") for name, entry in _walk(source)}
        yield dict(sorted(files.items()))
    elif source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                names = sorted({info.filename for info in archive.infolist() if not info.is_dir()})
                visible = [name for name in names if not any(map(_is_hidden, PurePosixPath(name).parts))]
                yield {name: partial(archive.open, name) for name in visible}
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:  # the second one: of a name in the zip file
            raise FileError(source, f"is neither a folder nor a complete zip file ({error})") from error
    else:
        raise FileError(source, "does not exist: name the folder or zip file that contains the images")


def snapshot(source: Path, seconds: float = float("inf")) -> dict[str, list[int]]:
    """Returns a dict that maps file names to [size in bytes, modification time in ns].

    For a folder, the dict has one entry per image. For a zip file, the only entry is the zip file itself. No file is
    opened.

    Raises:
        TimeoutError: if listing the folder takes more than `seconds`.
    """
    deadline, stats = time.monotonic() + seconds, {}
    for name, entry in _walk(source) if source.is_dir() else []:
        if time.monotonic() > deadline:
            raise TimeoutError(f"its files are not listed in {seconds:g} s")
        if is_image(name):
            stats[name] = entry.stat()
    if source.is_file():
        stats[source.name] = source.stat()
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}


def differences(before: Mapping[str, list[int]], after: Mapping[str, list[int]]) -> str:
    """Describes in words how two snapshots differ. Returns "" if the snapshots are equal."""
    both = before.keys() & after.keys()
    resized = sum(before[name][0] != after[name][0] for name in both)
    counts = {
        "added": len(after.keys() - both),
        "removed": len(before.keys() - both),
        "with another size": resized,
        "with another modification time": sum(before[name] != after[name] for name in both) - resized,
    }
    return ", ".join(f"{count} {change}" for change, count in counts.items() if count)


def printable(name: str) -> str:
    """Returns a file name as printable text. Control characters and bytes that are not UTF-8 are escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "__MACOSX"))


def _walk(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yields the relative path and the directory entry of each file below a folder.

    Hidden files and folders are left out. Links to folders are followed after all other folders have been read. Each
    folder is read only once, even if there are loops of links or several links to the folder.
    """
    folders, seen = [("", str(folder), os.path.realpath(folder))], set()
    links: list[tuple[str, str, str]] = []
    while folders or links:
        if not folders:
            links.sort()
            folders.append(links.pop(0))
        prefix, path, real = folders.pop()
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(path) as scan:
                entries = [entry for entry in scan if not _is_hidden(entry.name)]
        except OSError as error:
            logger.warning("the folder %s is skipped: %s", printable(path), error.strerror)
            continue
        for entry in entries:
            name, kind = prefix + entry.name, _kind(entry)
            if kind == "file":
                yield name, entry
            elif kind == "folder":
                folders.append((f"{name}/", entry.path, os.path.join(real, entry.name)))
            elif kind == "link":
                target = os.path.realpath(entry.path)
                if os.path.commonpath([target, real]) != target:  # a link to a folder above it is a loop
                    links.append((f"{name}/", entry.path, target))


def _kind(entry: os.DirEntry[str]) -> str | None:
    """Returns "file", "folder", "link" (to a folder), or None for anything else, such as a broken link."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
    except OSError:  # a link to itself
        pass
    return None
