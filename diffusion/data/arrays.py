"""A prepared dataset on disk: `images.npy` (uint8 [N, H, W, 3], C order) and `manifest.json`."""

import hashlib
import json
from pathlib import Path

import numpy as np

from diffusion.errors import FileError, InputError


def load_images(directory: Path, verify: bool = False) -> np.ndarray:
    """Opens a prepared dataset as a read-only memory map.

    Args:
        directory: Directory that holds `images.npy` and `manifest.json`.
        verify: Whether to read all pixels and compare their SHA-256 digest with the manifest. Shape and dtype are
            always compared.

    Returns:
        uint8 [N, H, W, 3], values in 0..255.

    Raises:
        FileError: If a file is missing, truncated or unreadable, or if images and manifest do not match.
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
    """Splits the images of a dataset into those used for training and those held out.

    The held-out images are the last ones of one fixed permutation, so a larger `held_out` includes a smaller one.

    Args:
        count: Number of images in the dataset.
        held_out: Number of images to hold out.

    Returns:
        Indices of the training images, int64 [count - held_out], and of the held-out images, int64 [held_out], both in
        ascending order.

    Raises:
        InputError: If no image is left for training.
    """
    if held_out >= count:
        raise InputError(
            f"the dataset has {count} images, and held_out is {held_out}, so no image is left for training: add images "
            "or lower held_out"
        )
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count - held_out]), np.sort(order[count - held_out :])
