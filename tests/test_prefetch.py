"""Tensors that a thread makes ahead: their order, how far ahead they are made, and the end of the thread."""

import threading
from collections import defaultdict

import pytest
import torch

from diffusion.prefetch import prefetched


class Recorder:
    """Makes the tensor of a number, and sets the event of this number first."""

    def __init__(self):
        self.started = defaultdict(threading.Event)

    def __call__(self, number: int) -> torch.Tensor:
        self.started[number].set()
        if number == 7:
            raise ValueError("seven")
        return torch.full((2,), number)


@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_tensors_have_the_order_of_the_items_and_the_next_one_is_made_ahead(count):
    make = Recorder()
    with prefetched(make, range(count), "cpu") as tensors:
        for number, tensor in enumerate(tensors):
            assert tensor.tolist() == [number] * 2
            following = number + 1
            assert following == count or make.started[following].wait(10)
            assert not make.started[number + 2].is_set()
    assert sorted(number for number, event in make.started.items() if event.is_set()) == list(range(count))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_block(error):
    before, make = threading.enumerate(), Recorder()

    def use() -> None:
        with prefetched(make, range(6), "cpu") as tensors:
            next(tensors)
            assert len(threading.enumerate()) == len(before) + 1
            raise error

    with pytest.raises(error):
        use()
    assert threading.enumerate() == before and not make.started[2].is_set()


def test_an_error_of_the_thread_is_raised_where_its_tensor_is_taken():
    with prefetched(Recorder(), [0, 7, 2], "cpu") as tensors:
        next(tensors)
        with pytest.raises(ValueError, match="seven"):
            next(tensors)
