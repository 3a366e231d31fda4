"""What depends on the device that work is done on: precision, memory, and how work is handed to a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls in which libraries choose their algorithms, before a graph is captured
# Images in a batch of samples: more gain nothing, and on a CPU fewer stay in its cache.
MOST_IMAGES, MOST_IMAGES_ON_CPU = 1024, 64
PROBE_IMAGES = 8
# Of the memory of a GPU, which other jobs may share, and in bytes: tensors stay below 2^31 numbers.
SHARE_OF_MEMORY, MOST_BYTES = 0.5, 16e9


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The context in which a net is called.

    Args:
        precision: "fp32", "bf16", or "auto": bf16 on a GPU, and fp32 on a CPU, where bf16 is slower.
    """
    kind = torch.device(device).type
    enabled = precision == "bf16" or (precision == "auto" and kind == "cuda")
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


class Graphed:
    """A function of tensors, captured at its first call as one CUDA graph: the host launches it whole.

    Equal calls must do equal work: all that the function reads beside its arguments keeps its place in memory. Each
    number of rows of the arguments has a graph of its own. Results are overwritten by the next call.
    """

    def __init__(self, function: Callable[..., list[Tensor]]):
        self.function = function
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """The function's results for arguments [B, ...], whose other dimensions stay equal from call to call."""
        rows = len(arguments[0])
        if rows not in self.captured:
            self.captured[rows] = self._capture(arguments)
        graph, inputs, results = self.captured[rows]
        for mine, given in zip(inputs, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        return results

    def _capture(self, arguments: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        inputs = [argument.clone() for argument in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: another one may read the next batch meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self.function(*inputs)
        return graph, inputs, results


@torch.inference_mode()
def largest_batch(model: nn.Module, shape: tuple[int, int, int], device: torch.device | str, precision: str) -> int:
    """How many images [*shape] to evaluate at once, 1 to 1,024: what a GPU's memory holds, by a small batch's share.

    On a CPU 64. A net of which not even the small batch fits the GPU ends in torch's OutOfMemoryError.
    """
    if torch.device(device).type != "cuda":
        return MOST_IMAGES_ON_CPU
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with autocast(device, precision):
        model(
            torch.zeros(PROBE_IMAGES, *shape, device=device),
            torch.zeros(PROBE_IMAGES, dtype=torch.int64, device=device),
        )
    per_image = (torch.cuda.max_memory_allocated() - before) / PROBE_IMAGES
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST_IMAGES, int(min(SHARE_OF_MEMORY * free, MOST_BYTES) / per_image)))
