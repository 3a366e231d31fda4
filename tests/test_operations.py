"""The operations of the nets: plain ones compared with torch, fused ones (in Triton's interpreter) with plain ones."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.devices import compute_copy
from diffusion.evaluation.extractors import full_precision
from diffusion.nets import operations, plain
from diffusion.nets.activation import Activation
from diffusion.nets.plain import group_norm
from diffusion.nets.unet import Norm, UNet

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if importlib.util.find_spec("triton"):
    import triton.language as tl
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, kernels run in Triton's interpreter


@pytest.fixture(autouse=True)
def without_tf32():
    """By default, convolutions on a GPU round float32 numbers to TF32."""
    with full_precision():
        yield


# Images, channels, height, width, groups: one and three channels per group, and sizes that are no powers of two.
SHAPES = [(2, 32, 8, 8, 32), (3, 96, 5, 7, 32), (2, 128, 4, 2, 4)]


def images(n: int, channels: int, height: int, width: int, dtype=torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(n, channels, height, width, dtype=torch.float64, generator=random)
    return x.contiguous(memory_format=torch.channels_last).to(dtype)


def tables(*shape: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    gain, offset = torch.randn(2, *shape, dtype=torch.float64, generator=random).to(dtype)
    return gain, offset


def by_torch(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> Tensor:
    z = F.group_norm(x, groups) * gain[:, :, None, None] + offset[:, :, None, None]
    return F.silu(z) if silu else z


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(("n", "channels", "height", "width", "groups"), SHAPES)
def test_values_and_gradients_equal_those_of_torch(n, channels, height, width, groups, per_image, silu):
    x = images(n, channels, height, width)
    arguments = [x, *tables(n if per_image else 1, channels)]
    for tensor in arguments:
        tensor.requires_grad_()
    ours, theirs = (norm(*arguments, groups, silu) for norm in (group_norm, by_torch))
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for actual, expected in zip(
        torch.autograd.grad(ours, arguments, g), torch.autograd.grad(theirs, arguments, g), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_float32_is_accurate_if_the_mean_is_large():
    x = images(2, 64, 16, 16) + 100
    gain, offset = tables(1, 64)
    ours = group_norm(x.float(), gain.float(), offset.float(), 32)
    # The mean square of 10,000 leaves about 14 of 24 bits for the variance of 4.
    torch.testing.assert_close(ours.double(), group_norm(x, gain, offset, 32), rtol=0, atol=2e-2)


def test_constant_images_give_the_offset():
    gain, offset = tables(1, 32, dtype=torch.float32)
    z = group_norm(torch.full((1, 32, 4, 4), 7.0), gain, offset, 32)
    torch.testing.assert_close(z, offset[:, :, None, None].expand_as(z), rtol=0, atol=1e-3)


def test_bfloat16_is_rounded_once():
    x, (gain, offset) = images(2, 64, 8, 8, torch.bfloat16), tables(1, 64, dtype=torch.float32)
    z = group_norm(x, gain, offset, 32, silu=True)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, group_norm(x.float(), gain, offset, 32, silu=True).bfloat16())


class Case:
    """An operation of a residual block on random images, computed by one implementation in one dtype.

    Args:
        implementation: `diffusion.nets.plain` or `diffusion.nets.fused`.
        dtype: dtype of the images. Tables and biases are float32, or float64 if the images are.
        n: number of images.
        parts: number of channels of each part of x.
        size: height and width of x.
    """

    def __init__(self, implementation, dtype: torch.dtype, n: int, parts: tuple[int, ...], size: tuple[int, int]):
        self.implementation, self.dtype, self.n, self.size = implementation, dtype, n, size
        self.random = torch.Generator().manual_seed(5)
        self.leaves: list[Tensor] = []
        self.parts = [self.biased(self.images(c), self.table(c)) for c in parts]

    def leaf(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        self.leaves.append(values.to(DEVICE, dtype).requires_grad_())
        return self.leaves[-1]

    def table(self, *shape: int) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.leaf(torch.randn(shape, generator=self.random), dtype)

    def images(self, channels: int, scale: int = 1) -> Tensor:
        height, width = self.size
        x = torch.randn(self.n, channels, scale * height, scale * width, generator=self.random) + 0.5
        # The same values in each dtype.
        return self.leaf(x.bfloat16().contiguous(memory_format=torch.channels_last), self.dtype)

    def biased(self, x: Tensor, bias: Tensor) -> Activation:
        if self.implementation is plain:
            shift = bias[:, None, None] if bias.dim() == 1 else bias[:, :, None, None]
            return Activation(x + shift.to(x.dtype))
        return Activation(x, bias)

    def gradients(self, *results: Tensor) -> list[Tensor]:
        """Returns the gradients of all leaves for random gradients of the results."""
        g = [torch.randn(r.shape, generator=self.random).bfloat16().to(DEVICE, r.dtype) for r in results]
        return list(torch.autograd.grad(results, self.leaves, g))


def norm_case(implementation, dtype, n, parts, size, resample, timestep, silu) -> list[Tensor]:
    """z, x for the skip connection, and the gradients of a norm."""
    case = Case(implementation, dtype, n, parts, size)
    channels = sum(parts)
    module = Norm(channels).to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    module.weight, module.bias = (nn.Parameter(case.table(channels).detach()) for _ in range(2))
    case.leaves[-2:] = [module.weight, module.bias]
    time = None
    if timestep == "scale and shift":
        time = case.leaf(torch.randn(n, 2 * channels, generator=case.random).bfloat16(), dtype)
    if timestep == "added":
        x = case.images(channels)
        case.parts = [case.biased(x, case.table(n, channels))]
        case.leaves = case.leaves[2 * len(parts) :]
    z, skips = implementation.norm(module, case.parts, time, silu, resample)
    x = torch.cat([skip.values if skip.bias is None else skip.values + shifted(skip) for skip in skips], 1)
    if x.shape != z.shape:  # the fused operation leaves the doubling to `residual`
        x = plain.doubled(x)
    return [z, x, *case.gradients(z, x)]


def shifted(x: Activation) -> Tensor:
    assert x.bias is not None
    return x.bias[..., None, None].to(x.values.dtype)


@pytest.fixture
def fused(monkeypatch):
    module = pytest.importorskip("diffusion.nets.fused")
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        create_dot = InterpreterBuilder.create_dot

        # The interpreter stores bfloat16 numbers as integers. It multiplies these integers, and it truncates numbers.
        def dot(builder, a, b, d, *options):
            a, b = (builder.create_fp_ext(v, tl.float32) if v.dtype.scalar == tl.bfloat16 else v for v in (a, b))
            return create_dot(builder, a, b, d, *options)

        def fp_trunc(builder, source, target):
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16), target.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
        monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", fp_trunc)
    return module


# n, channels of the parts of x, height and width, resample, timestep, silu.
NORMS = [
    (2, (64,), (6, 4), "", "scale and shift", True),
    (1, (96,), (5, 7), "", "", True),  # one image, odd sizes, three channels per group
    (2, (192,), (33, 32), "", "scale and shift", True),  # too large for one program
    (2, (64,), (4, 6), "", "added", True),
    (2, (64,), (4, 4), "", "", False),
    (2, (64, 96), (5, 3), "", "", True),  # five channels per group, and one group in both parts
    (2, (96,), (6, 4), "halved", "", True),
    (3, (64,), (3, 2), "doubled", "", True),
]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_a_fused_norm_has_the_values_and_gradients_of_the_plain_one(fused, case, dtype):
    exact = norm_case(plain, torch.float64, *case)
    found = norm_case(fused, dtype, *case)
    rounded = norm_case(plain, dtype, *case)
    for ours, expected, theirs in zip(found, exact, rounded, strict=True):
        assert relative_error(ours, expected) < max(1.2 * relative_error(theirs, expected), 1e-6)


def relative_error(values: Tensor, exact: Tensor) -> float:
    return ((values.double() - exact).norm() / exact.norm()).item()


def residual_case(implementation, dtype, n, parts, size, out, scale) -> list[Tensor]:
    """x + h or skip(x) + h, and the gradients."""
    case = Case(implementation, dtype, n, parts, size)
    h = case.biased(case.images(out, scale), case.table(out))
    skip: nn.Module = nn.Identity()
    if sum(parts) != out:
        skip = nn.Conv2d(sum(parts), out, 1).to(DEVICE, dtype)
        weight = torch.randn(skip.weight.shape, generator=case.random).bfloat16() / math.sqrt(sum(parts))
        skip.weight, skip.bias = nn.Parameter(weight.to(DEVICE, dtype)), nn.Parameter(case.table(out).detach())
        case.leaves[-1:] = [skip.weight, skip.bias]
    inputs = case.parts
    if implementation is plain:
        x = torch.cat([part.values for part in case.parts], 1)
        inputs = [Activation(plain.doubled(x) if scale == 2 else x)]
    y = implementation.residual(skip, inputs, h)
    values = y.values if y.bias is None else y.values + shifted(y)
    if y.sums is not None:
        total = torch.stack([y.values.float().sum((2, 3)), y.values.float().square().sum((2, 3))], 1)
        torch.testing.assert_close(y.sums.sum(1), total, rtol=1e-3, atol=1e-3)
    return [values, *case.gradients(values)]


# n, channels of the parts of x, height and width of x, channels of h, ratio of the sizes of h and x.
RESIDUALS = [
    (2, (64,), (5, 6), 64, 1),
    (1, (96,), (3, 4), 96, 2),
    (2, (64,), (4, 5), 96, 1),
    (2, (64, 96), (9, 8), 32, 1),
]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESIDUALS, ids=str)
def test_a_fused_addition_has_the_values_and_gradients_of_the_plain_one(fused, case, dtype):
    exact = residual_case(plain, torch.float64, *case)
    found = residual_case(fused, dtype, *case)
    rounded = residual_case(plain, dtype, *case)
    for ours, expected, theirs in zip(found, exact, rounded, strict=True):
        assert relative_error(ours, expected) < max(1.2 * relative_error(theirs, expected), 1e-6)


NETS = [
    {"attention_resolutions": (2,)},
    {"scale_shift_norm": False, "resblock_updown": False, "dropout": 0.3},
]


def output_and_gradients(net: nn.Module, implementation, monkeypatch) -> list[Tensor]:
    """The output of a net for an image, and the gradients of all parameters."""
    monkeypatch.setattr(operations, "implementation", lambda device_type: implementation)
    random = torch.Generator().manual_seed(3)
    dtype = next(net.parameters()).dtype
    x, g = (torch.randn(1, c, 4, 4, generator=random).to(DEVICE, dtype) for c in (3, 6))

    def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        """Draws equal masks in all dtypes; those of torch depend on the dtype on a GPU."""
        return x * (torch.rand(x.shape, generator=random) >= p).to(x.device, x.dtype) / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)
    output = net(x, torch.tensor([300], device=DEVICE))
    return [output, *torch.autograd.grad(output, list(net.parameters()), g.to(output.dtype))]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("changes", NETS, ids=str)
def test_a_net_of_fused_operations_equals_the_plain_net(fused, changes, monkeypatch):
    settings = {"attention_resolutions": ()} | changes
    net = UNet(image_size=4, channels=64, channel_mult=(1, 1), res_blocks=1, head_channels=32, **settings)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    net = net.to(DEVICE, memory_format=torch.channels_last)
    low = compute_copy(net, "bf16")

    found = output_and_gradients(net, fused, monkeypatch)
    in_bf16 = [output_and_gradients(low, implementation, monkeypatch) for implementation in (fused, plain)]
    exact = output_and_gradients(net.double(), plain, monkeypatch)
    errors = [relative_error(ours, expected) for ours, expected in zip(found, exact, strict=True)]
    assert max(errors) < 1e-5
    ours, theirs = (torch.tensor([*map(relative_error, values, exact)]) for values in in_bf16)
    assert ours[0] < 1.2 * theirs[0] and ours.mean() < 1.1 * theirs.mean()


def test_a_compute_copy_shares_norms_and_biases_of_convolutions():
    net = UNet(image_size=8, channels=32, channel_mult=(1,), res_blocks=1, attention_resolutions=(8,), head_channels=32)
    net = net.to(memory_format=torch.channels_last)
    low = compute_copy(net, "bf16")
    assert compute_copy(net, "fp32") is net and compute_copy(net, "auto") is net
    for (name, ours), theirs in zip(low.named_parameters(), net.parameters(), strict=True):
        linear = name.startswith("time_embed") or ".emb_layers." in name
        copied = linear or (name.endswith("weight") and ours.dim() > 1)
        assert (ours.dtype == torch.bfloat16, ours is not theirs) == (copied, copied)
        assert ours.stride() == theirs.stride()  # otherwise copying all of them is slow


@needs_triton
def test_each_constant_that_a_benchmark_varies_changes_the_tiles(monkeypatch):
    from benchmarks.kernel_speed import SWEEP
    from diffusion.nets import kernels

    def tiles(constants: dict[str, int]) -> str:
        with monkeypatch.context() as context:
            for name, value in constants.items():
                context.setattr(kernels, name, value)
            x = torch.empty(1024, 128, 64, 64, device="meta")
            tilings = kernels._tiling(x), kernels._tiling(x, tile=kernels.SUM_TILE)
            return str([(tiling, tiling.piece) for tiling in tilings])

    assert len(set(map(tiles, SWEEP))) == len(SWEEP)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_a_gpu(capability, tmp_path):
    """The compiler is stricter than the interpreter, and needs no GPU."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffusion.nets import triton_kernels as kernels

IMAGES = {{"x", "x1", "x2", "z", "g", "y", "h", "d1", "d2", "skip", "skip1", "skip2", "time", "d_time", "weight1",
          "weight2"}}
INTEGERS = {{*kernels.NOT_SPECIALIZED, "channels", "channels1", "channels2", "split", "stride1", "stride2",
            "bias_stride", "time_stride"}}
CONSTANTS = {{"silu": True, "has_time": True, "has_skip": True, "padded": 32, "depth": 64, "tile_pixels": 32,
             "tile_channels": 128, "window": 4, "x_window": 4, "z_window": 1}}
names = [n for n, value in vars(kernels).items() if isinstance(value, triton.JITFunction) and value.do_not_specialize]
for images in ("*bf16", "*fp32"):
    for name in names:
        kernel = getattr(kernels, name)
        constants = {{n: v for n, v in CONSTANTS.items() if n in kernel.arg_names}}
        if name == "norm_once":
            constants |= {{"tile_pixels": 1024, "tile_channels": 32}}
        def kind(n):
            if n in constants:
                return "constexpr"
            return "i32" if n in INTEGERS else images if n in IMAGES else "fp32" if n == "epsilon" else "*fp32"
        source = ASTSource(fn=kernel, signature={{n: kind(n) for n in kernel.arg_names}}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options={{"num_warps": 8}})
        print(name, len(compiled.asm["cubin"]))
"""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * 11, done.stdout
