"""A prepared dataset on disk: `images.npy` (uint8 [N, H, W, 3], C order) and `manifest.json`."""

import hashlib
import json
from pathlib import Path

import numpy as np

from diffusion.errors import FileError, InputError


def load_images(directory: Path, verify: bool = False) -> np.ndarray:
    """Opens the images of a prepared dataset as a read-only memory map.

    Args:
        directory: directory that contains `images.npy` and `manifest.json`.
        verify: whether to read all pixels and compare their SHA-256 digest with the digest in the manifest. Shape and
            dtype are always compared.

    Returns:
        images, uint8 [N, H, W, 3] in 0..255.

    Raises:
        FileError: if a file is missing, truncated or unreadable, or if the images do not match the manifest.
    """
    path = directory / "images.npy"
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        size = manifest["image_size"]
        expected = (manifest["count"], size, size, 3)
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise FileError(directory, f"is not a complete dataset ({type(error).__name__}: {error})") from error
    if images.shape != expected or images.dtype != np.uint8:
        raise FileError(path, f"is {images.dtype} {list(images.shape)}, but its manifest says uint8 {list(expected)}")
    if verify and hashlib.sha256(images).hexdigest() != manifest["sha256"]:
        raise FileError(path, "has changed since it was written (the sha256 of its pixels differs from the manifest)")
    return images


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the images of a dataset into training images and held-out images.

    The held-out images are the last images of a fixed permutation. Therefore, a larger `held_out` adds images to those
    that a smaller `held_out` selects.

    Args:
        count: number of images in the dataset.
        held_out: number of images to hold out.

    Returns:
        indices of the training images, int64 [count - held_out], and of the held-out images, int64 [held_out], both in
        ascending order.

    Raises:
        InputError: if no image is left for training.
    """
    if held_out >= count:
        raise InputError(
            f"the dataset has {count} images, and held_out is {held_out}, so no image is left for training: add images "
            "or lower held_out"
        )
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count - held_out]), np.sort(order[count - held_out :])
