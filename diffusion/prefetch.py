"""Makes tensors in a thread while the device computes with the tensors before them."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


@contextmanager
def prefetched(
    make: Callable[[Item], Tensor], items: Iterable[Item], device: torch.device | str
) -> Iterator[Iterator[Tensor]]:
    """Opens an iterator over `make(item)` of each item, on `device`.

    When a tensor is taken from the iterator, a thread starts to make the next one. The thread has ended when the block
    is left, also after an error. At most three tensors are in host memory: one that is copied to a GPU, and the two
    that follow. A copy to a GPU does not wait for the GPU, unless the copy before it is unfinished.

    Args:
        make: function that returns a tensor [...] on the CPU for an item.
        items: arguments of the function, in order.
        device: device of the tensors that the iterator yields.
    """
    on_gpu = torch.device(device).type == "cuda"

    def on_host(item: Item) -> Tensor:
        tensor = make(item)
        return tensor.pin_memory() if on_gpu else tensor

    def on_device(thread: ThreadPoolExecutor) -> Iterator[Tensor]:
        futures = (thread.submit(on_host, item) for item in items)
        following, copied = next(futures, None), None
        while following:
            made, following = following, next(futures, None)
            if copied:
                copied.synchronize()
            tensor = made.result().to(device, non_blocking=True)
            copied = torch.cuda.current_stream(device).record_event() if on_gpu else None
            yield tensor

    with ThreadPoolExecutor(max_workers=1) as thread:
        yield on_device(thread)
