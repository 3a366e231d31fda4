"""GB/s of each kernel of this project in a training step, with other sizes of tiles too.

    python -m benchmarks.kernel_speed ffhq128 --batch 64

The bytes are those that the kernels declare (`diffusion.nets.kernels.launch`). Each different launch of a step is timed
alone. Without a GPU, the kernels run in Triton's interpreter, if TRITON_INTERPRET=1: the numbers then mean nothing.
"""

import argparse
import timeit
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import triton.testing

from benchmarks.throughput import device, random_images, settings
from diffusion.data.batches import Batches
from diffusion.devices import CudaGraphed
from diffusion.nets import kernels, operations
from diffusion.training.state import TrainState, train_step

# Constants of `diffusion.nets.kernels`. The first row is the present choice.
SWEEP: list[dict[str, int]] = [
    {},
    {"SUM_TILE": 1024},
    {"SUM_TILE": 4096},
    {"TILE": 2048},
    {"TILE": 8192},
    {"MAX_TILE_CHANNELS": 64},
    {"MAX_PIXELS": 256},
]


def speeds(state: TrainState, batches: Batches, constants: dict[str, int]) -> dict[str, float]:
    """Returns the GB/s of each kernel, averaged over the bytes of a step."""
    launch, seconds, moved, times = kernels.launch, Counter[str](), Counter[str](), {}

    def timed(kernel: Any, grid: Any, loads: Any, stores: Any, *arguments: Any, **options: Any) -> None:
        def call() -> None:
            launch(kernel, grid, loads, stores, *arguments, **options)

        call()
        used = [(tensor, count) for tensor, count in (*loads, *stores) if tensor is not None]
        name, key = kernel.__name__, (kernel.__name__, grid, *((t.shape, t.dtype) for t, _ in used))
        if key not in times:
            measured = device() == "cuda"
            times[key] = triton.testing.do_bench(call, 2, 10) / 1e3 if measured else timeit.timeit(call, number=1)
        seconds[name] += times[key]
        moved[name] += sum(tensor.nbytes * count for tensor, count in used)

    from diffusion.nets import fused

    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(patch.object(kernels, name, value))
        stack.enter_context(patch.object(kernels, "launch", timed))
        stack.enter_context(patch.object(operations, "implementation", lambda device_type: fused))
        # Without a graph, and therefore kernel by kernel.
        stack.enter_context(patch.object(CudaGraphed, "__call__", lambda graph, *rest: graph.function(*rest)))
        train_step(state, batches)
    return {name: moved[name] / seconds[name] / 1e9 for name in sorted(moved)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name of a file in experiments/")
    parser.add_argument("--batch", type=int, help="images per step, default: those of the study")
    parser.add_argument("--reduced", action="store_true", help="a tiny net, and one other choice")
    options = parser.parse_args()
    run = settings(options.study, options.batch)
    if options.reduced:
        model = {
            "channels": 32,
            "channel_mult": (1,),
            "res_blocks": 1,
            "attention_resolutions": (),
            "head_channels": 32,
        }
        run = run.model_copy(
            update={
                "model": run.model.model_copy(update=model),
                "dataset": run.dataset.model_copy(update={"image_size": 4}),
            }
        )
    state = TrainState(run, 0, device())
    batches = state.batches(random_images(run))
    for constants in SWEEP[: 2 if options.reduced else None]:
        found = speeds(state, batches, constants)
        print(constants or "as it is", {name: float(f"{speed:.4g}") for name, speed in found.items()}, flush=True)


if __name__ == "__main__":
    main()
