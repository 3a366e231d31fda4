"""What the processes of one data-parallel training run tell each other; alone, a process tells itself.

Every process draws the whole batch and computes its share of it. Sums over the processes then give each the same
gradients and losses, so that all hold the same state and the first one alone writes it.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, 0..count - 1. The first one writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_slice(batch_size: int) -> range:
    """Indices of the batch that this process computes."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    return range(rank() * batch_size // count, (rank() + 1) * batch_size // count)


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replace each tensor [...] by its sum over the processes, in one reduction. All of one dtype and on one device."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def any_rank(flags: Iterable[bool]) -> list[bool]:
    """Which flags are set in at least one process, so that all act at the same step."""
    flags = list(flags)
    if not dist.is_initialized():
        return flags
    # On the CPU: a GPU's queue of work is not waited for.
    together = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.bool().tolist()
