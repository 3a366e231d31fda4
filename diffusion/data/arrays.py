"""A prepared dataset on disk: `images.npy` (uint8 [N, H, W, 3], C order) and `manifest.json`."""

import hashlib
import json
from pathlib import Path

import numpy as np

from diffusion.errors import InputError


def load_images(directory: Path, verify: bool = False) -> np.ndarray:
    """Open a prepared dataset: a read-only memory map, uint8 [N, H, W, 3] in 0..255.

    Shape and length are held against the manifest; to `verify` reads all pixels and holds their sha256 against it too.

    Raises:
        InputError: a file is missing, truncated or unreadable, or images and manifest do not match.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        size = manifest["image_size"]
        expected = (manifest["count"], size, size, 3)
        images = np.load(directory / "images.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"No whole dataset in {directory} ({reason}): delete that directory and run the same command again."
        ) from error
    if images.shape != expected or images.dtype != np.uint8:
        raise InputError(
            f"{directory / 'images.npy'} holds {images.dtype} {list(images.shape)} where its manifest says "
            f"uint8 {list(expected)}: delete it and run the same command again."
        )
    if verify and hashlib.sha256(images).hexdigest() != manifest["sha256"]:
        raise InputError(
            f"{directory / 'images.npy'}: pixels changed since they were written: "
            "delete it and run the same command again."
        )
    return images


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images training sees and which are kept from it: indices, both growing, int64
    [count - held_out] and [held_out].

    The held-out ones are the last of one fixed permutation, so more of them include fewer.

    Raises:
        InputError: no image would be left to train on.
    """
    if held_out >= count:
        raise InputError(f"dataset.held_out is {held_out} of {count} images, which leaves none to train on: lower it.")
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count - held_out]), np.sort(order[count - held_out :])


def training_images(directory: Path, held_out: int) -> np.ndarray:
    """What training sees of a prepared dataset: uint8 [M, H, W, 3], in memory if some images are held out.

    Raises:
        InputError: as `load_images`, which verifies all pixels, and as `split`.
    """
    images = load_images(directory, verify=True)
    return images[split(len(images), held_out)[0]] if held_out else images
