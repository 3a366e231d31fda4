"""A prepared dataset as training reads it: one uint8 array on disk, and batches from it.

It is a directory holding `images.npy` (uint8 [N, H, W, 3], C order) and `manifest.json` (where the pixels came from and
their sha256), as `diffusion.prepare` writes them. The manifest comes last: without it there is no dataset.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion import StudyError


def load_images(directory: Path, verify: bool = False) -> np.ndarray:
    """Open a prepared dataset: a read-only memory map, uint8 [N, H, W, 3] in 0..255.

    Shape and length are held against the manifest; to `verify` reads all pixels and holds their sha256 against it too.

    Raises:
        StudyError: a file is missing, truncated or unreadable, or images and manifest do not match.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        size = manifest["image_size"]
        expected = (manifest["count"], size, size, 3)
        images = np.load(directory / "images.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StudyError(
            f"No whole dataset in {directory} ({reason}): delete that directory and run the same command again."
        ) from error
    if images.shape != expected or images.dtype != np.uint8:
        raise StudyError(
            f"{directory / 'images.npy'} holds {images.dtype} {list(images.shape)} where its manifest says "
            f"uint8 {list(expected)}: delete it and run the same command again."
        )
    if verify and hashlib.sha256(images).hexdigest() != manifest["sha256"]:
        raise StudyError(
            f"{directory / 'images.npy'}: pixels changed since they were written: "
            "delete it and run the same command again."
        )
    return images


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images training sees and which are kept from it: indices, both growing, int64
    [count - held_out] and [held_out].

    The held-out ones are the last of one fixed permutation, so more of them include fewer.

    Raises:
        StudyError: no image would be left to train on.
    """
    if held_out >= count:
        raise StudyError(f"dataset.held_out is {held_out} of {count} images, which leaves none to train on: lower it.")
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count - held_out]), np.sort(order[count - held_out :])


def training_images(directory: Path, held_out: int) -> np.ndarray:
    """What training sees of a prepared dataset: uint8 [M, H, W, 3], in memory if some images are held out.

    Raises:
        StudyError: as `load_images`, which verifies all pixels, and as `split`.
    """
    images = load_images(directory, verify=True)
    return images[split(len(images), held_out)[0]] if held_out else images


# Batches


def epoch_batch(count: int, batch_size: int, step: int, order: Callable[[int], Tensor]) -> Tensor:
    """Which images batch `step` holds, if the epochs' permutations are laid end to end and cut into batches.

    Depends on the arguments alone, so a run resumes at any step; a batch may straddle epochs.

    Args:
        count: number of images, at least 1.
        batch_size: images per batch, at least 1.
        step: batches before this one.
        order: epoch -> permutation of 0..count-1, int64 [count].

    Returns:
        int64 [batch_size] indices.
    """
    start = step * batch_size
    stop = start + batch_size
    epochs = range(start // count, (stop - 1) // count + 1)
    return torch.cat([order(e)[max(start - e * count, 0) : stop - e * count] for e in epochs])


class Batches:
    """The batches of a run on its device, by step: uint8 [B, H, W, 3] in 0..255, as `epoch_batch` orders them.

    On a GPU the images lie there if they take at most half of the free memory. Otherwise they stay where they are (a
    memory map on disk), and a thread reads the next batch while the device works on this one.

    Args:
        images: uint8 [N, H, W, 3].
        size: images per batch.
        order: epoch -> permutation of 0..N-1, int64 [N].
        resident: whether the images lie on the device, if that is not to be judged.
    """

    def __init__(
        self,
        images: np.ndarray,
        size: int,
        order: Callable[[int], Tensor],
        device: torch.device | str,
        resident: bool | None = None,
    ):
        self.images, self.size, self.device = images, size, torch.device(device)
        if resident is None:
            resident = self.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2
        self.resident = torch.from_numpy(np.array(images)).to(self.device) if resident else None
        place = self.device if resident else "cpu"
        self.order = lru_cache(maxsize=2)(lambda epoch: order(epoch).to(place))
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.ahead: tuple[int, Future[Tensor] | None] = (-1, None)

    def __getitem__(self, step: int) -> Tensor:
        if self.resident is not None:
            return self.resident[self._chosen(step)]
        expected, ahead = self.ahead
        batch = ahead.result() if ahead and expected == step else self._read(step)
        self.ahead = step + 1, self.reader.submit(self._read, step + 1)
        return batch.to(self.device, non_blocking=True)

    def _chosen(self, step: int) -> Tensor:
        return epoch_batch(len(self.images), self.size, step, self.order)

    def _read(self, step: int) -> Tensor:
        batch = torch.from_numpy(self.images[self._chosen(step).numpy()])
        return batch.pin_memory() if self.device.type == "cuda" else batch


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] in 0..255 -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> the nearest grey levels, clamped, uint8 [B, H, W, 3] in 0..255."""
    levels = (x.float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each of x [B, C, H, W] left to right with probability 1/2; the generator is on any device."""
    heads = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
    return torch.where(heads.to(x.device)[:, None, None, None], x.flip(-1), x)
