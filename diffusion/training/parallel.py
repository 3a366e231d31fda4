"""Communication between the processes of one data-parallel training run.

Every process draws the whole batch, but computes the gradients of its own slice only. The gradients and losses are then
summed over all processes, so every process holds the same training state. Only rank 0 writes the state to disk. Without
data-parallel processes, the functions of this module communicate nothing.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Returns the rank of this process, from 0. Without data-parallel processes, the rank is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_slice(batch_size: int) -> range:
    """Returns the indices of the slice of the batch whose gradients this process computes."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    return range(rank() * batch_size // count, (rank() + 1) * batch_size // count)


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replaces each tensor [...] by its sum over all processes.

    All tensors must have the same dtype and device, because a single reduction sums them.
    """
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def any_rank(flags: Iterable[bool]) -> list[bool]:
    """Returns for each flag whether at least one process has set this flag.

    All processes receive the same result, and so can act at the same step.
    """
    flags = list(flags)
    if not dist.is_initialized():
        return flags
    # On the CPU, so that the host does not wait for the GPU.
    maximum = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return maximum.bool().tolist()
