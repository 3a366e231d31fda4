"""Settings that depend on the device: precision, batch size of sampling, and CUDA graphs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Largest batches of samples. Larger ones are not faster; on a CPU, smaller ones fit its cache.
MAX_IMAGES, MAX_IMAGES_ON_CPU = 1024, 64
PROBE_IMAGES = 8  # images whose memory use is measured
# Other jobs may share the GPU. A tensor is a small part of the limit in bytes, so that it has fewer than 2^31 elements.
MEMORY_SHARE, MAX_BYTES = 0.5, 16e9


def compute_dtype(device: torch.device | str, precision: str) -> torch.dtype:
    """Returns the dtype in which a net computes.

    Args:
        device: device of the net.
        precision: "fp32", "bf16", or "auto" (bf16 on a GPU; fp32 on a CPU, where bf16 is slower).
    """
    low = precision == "bf16" or (precision == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if low else torch.float32


def compute_copy(model: nn.Module, precision: str) -> nn.Module:
    """Returns a copy of a net that computes in the given precision.

    In bf16, the linear layers and the weights of the convolutions are copied to bf16. The copy shares all other
    parameters with the net: norms and biases of convolutions stay in float32. A net whose class does not state that it
    computes in the dtype of its weights (`computes_in_dtype_of_weights`) is instead called under autocast. In fp32, the
    net itself is returned.

    Args:
        model: net with float32 parameters.
        precision: see `compute_dtype`.
    """
    dtype = compute_dtype(next(model.parameters()).device, precision)
    if dtype == torch.float32:
        return model
    if not getattr(model, "computes_in_dtype_of_weights", False):
        return Autocast(model)
    low = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters()
    }
    low |= {id(module.weight) for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d))}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in low}
    net = copy.deepcopy(model, shared)
    for parameter in net.parameters():
        if id(parameter) not in shared:
            parameter.data = parameter.data.to(dtype)
    return net


class Autocast(nn.Module):
    """Calls a net under autocast to bf16."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the output of the net for images x [B, C, H, W] and timesteps t [B], at least in float32."""
        with torch.autocast(x.device.type, torch.bfloat16):
            output = self.model(x, t)
        return output.to(torch.promote_types(output.dtype, torch.float32))


class CudaGraphed:
    """A function of CUDA tensors that runs as a CUDA graph.

    The first call with a batch size captures a graph, and later calls with the same batch size replay this graph. Each
    of these calls overwrites the tensors that the previous call returned.

    Args:
        function: function of tensors [B, ...] that returns a list of tensors. For a given B, all shapes inside the
            function must be constant. Other tensors that the function reads, such as weights, must stay at the same
            memory addresses.
    """

    def __init__(self, function: Callable[..., list[Tensor]]):
        self.function = function
        self.pool: Any = None  # graphs with different batch sizes share memory: they never run at the same time
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Returns the results of the function for arguments [B, ...]. Only B may differ between calls."""
        batch_size = len(arguments[0])
        if batch_size not in self.captured:
            self.captured[batch_size] = self._capture(arguments)
        graph, inputs, results = self.captured[batch_size]
        for static_input, argument in zip(inputs, arguments, strict=True):
            static_input.copy_(argument)
        graph.replay()
        return results

    def _capture(self, arguments: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        inputs = [argument.clone() for argument in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(*inputs)  # libraries allocate memory and Triton compiles before a graph is captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # Only this thread is captured: another thread may copy the next batch at the same time.
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            results = self.function(*inputs)
        return graph, inputs, results


@torch.inference_mode()
def largest_batch(model: nn.Module, shape: tuple[int, int, int], device: torch.device | str) -> int:
    """Returns a batch size for evaluating a net without gradients: 64 on a CPU, 1 to 1024 on a GPU.

    On a GPU, the function measures how much memory a batch of 8 images needs. The batch size is the number of images
    that fit in half of the free memory, or in 16 GB if that is less.

    Args:
        model: net that is called with images [B, C, H, W] and timesteps [B].
        shape: shape of one image, (C, H, W).
        device: device of the net.

    Raises:
        torch.OutOfMemoryError: if a batch of 8 images does not fit in the memory of the GPU.
    """
    if torch.device(device).type != "cuda":
        return MAX_IMAGES_ON_CPU
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(torch.zeros(PROBE_IMAGES, *shape, device=device), torch.zeros(PROBE_IMAGES, dtype=torch.int64, device=device))
    per_image = (torch.cuda.max_memory_allocated() - before) / PROBE_IMAGES
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MAX_IMAGES, int(min(MEMORY_SHARE * free, MAX_BYTES) / per_image)))
