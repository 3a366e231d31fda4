"""Batches of training images, and conversions between uint8 images and the value range of the net, [-1, 1]."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

UPLOAD_IMAGES = 1024  # images copied to the device at once


def epoch_batch(count: int, batch_size: int, step: int, order: Callable[[int], Tensor]) -> Tensor:
    """Returns the indices of the images in batch `step`.

    Each epoch has its own permutation of the images. The permutations of all epochs are concatenated and cut into
    batches, so a batch may span several epochs. The result depends on the arguments alone, so training can resume at
    any step.

    Args:
        count: number of images, at least 1.
        batch_size: images per batch, at least 1.
        step: index of the batch, from 0.
        order: function that returns the permutation of an epoch: the numbers 0..count-1, int64 [count].

    Returns:
        indices of the images, int64 [batch_size].
    """
    start = step * batch_size
    stop = start + batch_size
    epochs = range(start // count, (stop - 1) // count + 1)
    return torch.cat([order(e)[max(start - e * count, 0) : stop - e * count] for e in epochs])


class Batches:
    """The training batches of a run, on the device of the run.

    `batches[step]` is uint8 [B, H, W, 3] in 0..255: the images that `epoch_batch` selects for this step.

    On a GPU, all images that are used are copied to the GPU if half of the free GPU memory is enough. Otherwise, a
    thread reads the next batch from `images` (usually a memory map of a file) while the device computes.

    Args:
        images: all images of the dataset, uint8 [N, H, W, 3]. The array is not copied as a whole.
        size: images per batch.
        order: function that returns the permutation of an epoch: the numbers 0..M-1, int64 [M].
        device: device of the batches.
        indices: indices of the images that are used, int64 [M]. If None, all images are used (M = N).
        resident: whether all images that are used are copied to the device. If None, the free GPU memory decides.
    """

    def __init__(
        self,
        images: np.ndarray,
        size: int,
        order: Callable[[int], Tensor],
        device: torch.device | str,
        indices: np.ndarray | None = None,
        resident: bool | None = None,
    ):
        self.images, self.indices, self.size, self.device = images, indices, size, torch.device(device)
        self.count = len(images) if indices is None else len(indices)
        if resident is None:
            needed = self.count * images[:1].nbytes
            resident = self.device.type == "cuda" and needed < torch.cuda.mem_get_info()[0] / 2
        self.resident = self._upload() if resident else None
        place = self.device if resident else "cpu"
        self.order = lru_cache(maxsize=2)(lambda epoch: order(epoch).to(place))
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.ahead: tuple[int, Future[Tensor] | None] = (-1, None)

    def __getitem__(self, step: int) -> Tensor:
        if self.resident is not None:
            return self.resident[self._positions(step)]
        expected, ahead = self.ahead
        batch = ahead.result() if ahead and expected == step else self._read(step)
        self.ahead = step + 1, self.reader.submit(self._read, step + 1)
        return batch.to(self.device, non_blocking=True)

    def _positions(self, step: int) -> Tensor:
        """Returns which of the M images are in batch `step`, as int64 [B] in 0..M-1."""
        return epoch_batch(self.count, self.size, step, self.order)

    def _select(self, positions: np.ndarray) -> Tensor:
        """Copies the images at `positions`, int64 [B] in 0..M-1, into memory. Returns uint8 [B, H, W, 3]."""
        return torch.from_numpy(self.images[positions if self.indices is None else self.indices[positions]])

    def _upload(self) -> Tensor:
        """Copies the M images to the device, in pieces that need little host memory. Returns uint8 [M, H, W, 3]."""
        resident = torch.empty(self.count, *self.images.shape[1:], dtype=torch.uint8, device=self.device)
        for positions in np.array_split(np.arange(self.count), -(-self.count // UPLOAD_IMAGES)):
            resident[positions[0] : positions[-1] + 1] = self._select(positions).to(self.device)
        return resident

    def _read(self, step: int) -> Tensor:
        batch = self._select(self._positions(step).numpy())
        return batch.pin_memory() if self.device.type == "cuda" else batch


def to_model_range(images: Tensor) -> Tensor:
    """Converts uint8 images [B, H, W, 3] in 0..255 to float32 [B, 3, H, W] in [-1, 1], in the format channels_last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Converts images [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3] in 0..255. Values are rounded and clamped."""
    levels = (x.float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image of x [B, C, H, W] horizontally with probability 1/2.

    `generator` and x may be on different devices.
    """
    heads = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
    return torch.where(heads.to(x.device)[:, None, None, None], x.flip(-1), x)
