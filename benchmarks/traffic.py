"""Bytes and launches of a training step, or of a forward pass of sampling, on a GPU, counted without a GPU.

    python -m benchmarks.traffic ffhq128 --batch 64 [--sample]

The step runs on fake CUDA tensors, which have shapes and no contents. An operation of torch reads each argument once
and writes each result once; in place, it reads and writes its target. A view moves nothing. Convolutions and matrix
products, including attention, are limited by arithmetic rather than memory: they count as launches without bytes, but
the bias of a convolution and its gradient are passes over memory. A kernel of this project declares what it loads and
stores (`diffusion.nets.kernels.launch`); the kernel of a 1x1 convolution counts as a product. One operation on a list
of tensors, such as the optimizer, is one launch.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.throughput import settings
from diffusion.build import build_net, noise_schedule, run_tables
from diffusion.config import RunConfig
from diffusion.devices import CudaGraphed, compute_copy
from diffusion.nets import kernels
from diffusion.training import state as training_state
from diffusion.training.state import TrainState, train_step

PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm", "add_products"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "squeeze_"}
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # an operation that is made of others
OVERWRITE = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}  # the target is written and not read


class Traffic(TorchDispatchMode):
    """Counts the operations on fake CUDA tensors in this context.

    Attributes:
        launches: number of launches of each kind of operation.
        bytes: number of bytes that each kind of operation reads and writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.hides_device = False

    def add(self, name: str, moved: float, launches: int = 1) -> None:
        self.launches[name] += launches
        self.bytes[name] += round(moved)

    def launch(
        self, kernel: Any, grid: Any, loads: kernels.Moved, stores: kernels.Moved, *arguments: Any, **options: Any
    ) -> None:
        """Counts a kernel of this project, in place of `diffusion.nets.kernels.launch`."""
        if kernel.__name__ in PRODUCTS:
            return self.add("products", 0)
        moved = (tensor.nbytes * times for tensor, times in (*loads, *stores) if tensor is not None)
        self.add(kernel.__name__, sum(moved))

    def call_graph(self, graph: CudaGraphed, *arguments: Tensor) -> Any:
        """Calls the function of a CUDA graph, in place of the graph.

        Autograd would look for the device of its tensors, which does not exist.
        """
        inputs = [argument.clone() for argument in arguments]
        self.hides_device = True
        try:
            return graph.function(*inputs)
        finally:
            self.hides_device = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return torch.device("meta") if self.hides_device else func(*args)
        if self.hides_device and kwargs.get("device") == torch.device("meta"):
            kwargs |= {"device": torch.device("cuda")}  # of a gradient that autograd makes
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:
                return func._op_dk(COMPOSITE, *args, **kwargs)
        results = func(*args, **kwargs)
        if func.overloadpacket.__name__ in {"convolution", "convolution_backward"}:
            # As cuDNN returns them if an argument has channels last. Here, all images and weights have.
            results = tree_map_only(Tensor, channels_last, results)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if not func.is_view and any(tensor.device.type == "cuda" for tensor in tensors_in((given, results))):
            self.count(func, given, results)
        return results

    def count(self, func: Any, given: dict[str, Any], results: Any) -> None:
        """Counts one operation of torch.

        Args:
            func: the operation.
            given: its arguments.
            results: what it returned.
        """
        name = func.overloadpacket.__name__
        if name.removesuffix("_") in PRODUCTS:
            self.add("products", 0)
            if name == "convolution" and given["bias"] is not None:
                self.add("bias of a convolution", 2 * size(results))
        elif name == "convolution_backward":
            *products, bias = given["output_mask"]
            self.add("products", 0, sum(products))
            if bias:
                self.add("gradient of a bias", size(given["grad_output"]))
        elif name not in FREE:
            arguments = func._schema.arguments
            # Without a scale of the loss, the optimizer does not write the gradients.
            target = [a.name for a in arguments if a.alias_info and a.alias_info.is_write and a.name != "grads"]
            unread = {a.name for a in arguments if a.is_out} | ({target[0]} if name in OVERWRITE else set())
            read = [value for key, value in given.items() if key not in unread]
            written = [results, *(given.get(key) for key in target)]
            self.add(name, sum(size(tensor) for tensor in (*tensors_in(read), *tensors_in(written))))

    def table(self) -> str:
        """Returns the counts as text: a line for each kind of operation, most bytes first, and the totals."""
        lines = [f"{'operation':<32} {'launches':>8} {'GB':>8}"]
        for name, moved in sorted(self.bytes.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"{name:<32} {self.launches[name]:>8,} {moved / 1e9:>8.3f}")
        lines.append(f"total: {self.bytes.total() / 1e9:.1f} GB, {self.launches.total():,} launches")
        return "\n".join(lines)


def tensors_in(values: Any) -> list[Tensor]:
    """Returns the tensors in nested values, each part of memory once."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    places = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors}
    return list(places.values())


def size(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in memory, where an expanded dimension has one element."""
    return torch.Size(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride).numel() * (
        tensor.element_size()
    )


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


class Attention(torch.autograd.Function):
    """Attention as torch's kernels compute it: one product, and results in the order [B, pixels, heads, channels]."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.traffic = traffic
        traffic.add("products", 0)
        return v.new_empty(v.transpose(1, 2).shape).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ctx.traffic.add("products", 0)
        return None, *(g.new_empty(g.transpose(1, 2).shape).transpose(1, 2) for _ in range(3))


class Stream(torch.Generator):
    """A random stream of the GPU: a generator on the CPU that says it is on the GPU."""

    device = torch.device("cuda")


def convert(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Applies a function to all parameters, in place of `Module._apply`, which cannot exchange fake tensors."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(function(parameter.detach()), parameter.requires_grad))
    return module


@contextmanager
def fake_gpu(run: RunConfig) -> Iterator[Traffic]:
    """A context with fake CUDA tensors, and stand-ins for what needs a GPU or the contents of tensors."""
    schedule = noise_schedule(run.diffusion)
    tables = run_tables(run)
    traffic = Traffic()
    stand_ins = {
        "untrained": lambda config, seed: (build_net(config.dataset.image_size, config.model), schedule),
        "run_tables": lambda *_: tables,
        "generator": lambda *_: Stream(),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(training_state, name, stand_in))
        graph = lambda *rest: traffic.call_graph(*rest)  # noqa: E731
        stack.enter_context(patch.object(CudaGraphed, "__call__", graph))
        stack.enter_context(patch.object(nn.Module, "_apply", convert))
        stack.enter_context(patch.object(kernels, "launch", traffic.launch))
        attention = lambda *rest: Attention.apply(traffic, *rest)  # noqa: E731
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        types = [*_foreach_utils._foreach_supported_types, FakeTensor]
        stack.enter_context(patch.object(_foreach_utils, "_foreach_supported_types", types))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield traffic


def training_step(run: RunConfig) -> Traffic:
    """Counts one training step: gradients, optimizer, moving average and losses, without the choice of the images."""
    side = run.dataset.image_size
    with fake_gpu(run) as traffic:
        state = TrainState(run, 0, "cuda")
        images = torch.zeros(run.train.batch_size, side, side, 3, dtype=torch.uint8, device="cuda")
        for step in range(2):  # the first step allocates
            traffic.launches.clear()
            traffic.bytes.clear()
            with traffic:
                train_step(state, {step: images})
    return traffic


def forward_pass(run: RunConfig) -> Traffic:
    """Counts one forward pass of sampling."""
    side, count = run.dataset.image_size, run.train.batch_size
    with fake_gpu(run) as traffic:
        model = build_net(side, run.model).to("cuda", memory_format=torch.channels_last).eval().requires_grad_(False)
        x, t = torch.zeros(count, 3, side, side, device="cuda"), torch.zeros(count, dtype=torch.int64, device="cuda")
        model = compute_copy(model, "auto")
        with traffic, torch.inference_mode():
            model(x, t).float()
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name of a file in experiments/")
    parser.add_argument("--batch", type=int, help="images per step, default: those of the study")
    parser.add_argument("--sample", action="store_true", help="count a forward pass of sampling instead")
    options = parser.parse_args()
    count = forward_pass if options.sample else training_step
    print(count(settings(options.study, options.batch)).table())


if __name__ == "__main__":
    main()
