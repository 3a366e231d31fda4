"""Communication between the processes of one data-parallel training run. Without other processes it does nothing.

Every process draws the whole batch and computes the gradients of its slice. Sums over the processes give each of them
the same gradients and losses, so all hold the same state, and only rank 0 writes it.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Returns the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_slice(batch_size: int) -> range:
    """Returns the indices of the batch that this process computes."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    return range(rank() * batch_size // count, (rank() + 1) * batch_size // count)


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replaces each tensor [...] by its sum over the processes, in one reduction.

    All tensors must have the same dtype and device.
    """
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def any_rank(flags: Iterable[bool]) -> list[bool]:
    """Returns which flags are set in at least one process, so that all processes act at the same step."""
    flags = list(flags)
    if not dist.is_initialized():
        return flags
    # On the CPU, so that the host does not wait for the GPU.
    maximum = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return maximum.bool().tolist()
