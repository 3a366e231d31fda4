"""Batches of a training run, and conversions between uint8 images and the range of the model."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

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
