"""Group norm compared with torch's own, and the kernels in Triton's interpreter compared with `TorchGroupNorm`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.nets.norm import group_norm
from diffusion.nets.torch_norm import TorchGroupNorm

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

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


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py tests them on the GPU")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("n", "channels", "height", "width", "groups", "dtype"),
    [
        *((*shape, torch.float32) for shape in SHAPES),
        (1, 160, 23, 19, 32, torch.float32),  # two pieces of pixels, the second incomplete
        (2, 256, 4, 5, 32, torch.float32),  # two tiles of channels
        (2, 64, 8, 8, 32, torch.bfloat16),
    ],
)
def test_kernels_equal_the_operations(n, channels, height, width, groups, dtype, silu):
    from diffusion.nets import kernels

    x, (gain, offset) = images(n, channels, height, width, dtype), tables(n, channels, dtype=torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    expected = TorchGroupNorm.forward(x, gain, offset, groups, silu)
    for ours, theirs in zip(kernels.forward(x, gain, offset, groups, silu), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    g = images(n, channels, height, width, dtype).flip(0) - 3
    arguments = (g, x, gain, offset, *expected[1:], silu)
    for ours, theirs in zip(kernels.backward(*arguments), TorchGroupNorm.backward(*arguments), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path):
    """The compiler is stricter than the interpreter, and needs no GPU."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffusion.nets import kernels

CONSTANTS = {{"silu": True, "piece": 256, "rows": 32, "width": 128, "padded": 4, "pieces": 64}}
for images in ("*bf16", "*fp32"):
    for name in ("_sums", "_statistics", "_affine", "_sums_backward", "_statistics_backward", "_affine_backward"):
        kernel = getattr(kernels, name)
        types = {{"x": images, "z": images, "g": images, "dx": images, "epsilon": "fp32"}}
        types |= dict.fromkeys(("pixels", "channels", "count", "group"), "i32")
        constants = dict(CONSTANTS, group=4) if name.startswith("_statistics") else CONSTANTS
        signature = {{n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}}
        constants = {{n: constants[n] for n in kernel.arg_names if n in constants}}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        print(name, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12
