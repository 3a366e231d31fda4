"""Group norm, affine map and SiLU as one operation: act(gain * normalized(x) + offset), forward and backward.

Here, act is SiLU or the identity. For each image and channel, the normalization, gain and offset are together one
affine map z = A x + B. A and B are computed from the sums of x and of x^2. Therefore, the forward pass is one reduction
over x and one pointwise operation.

The backward pass has the same two parts. The gradient with respect to x is A act'(z) g + P x + Q, where g is the
gradient with respect to act(z). P and Q are computed from sums for each image and group of channels.

`TorchGroupNorm` uses operations of torch. `diffusion.nets.kernels` uses Triton kernels on a GPU.
"""

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffusion.nets.torch_norm import TorchGroupNorm, sums_dtype


def group_norm(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool = False) -> Tensor:
    """Applies group norm (Wu & He 2018, arXiv 1803.08494) with an affine map that may differ between images.

    Sums are computed in float32, or in float64 on a CPU if x is float64.

    Args:
        x: images [N, C, H, W]. The function is fastest if the images have channels last in memory.
        gain: factor of each channel, [N, C] or [1, C].
        offset: summand of each channel, [N, C] or [1, C].
        groups: number of groups, a divisor of C.
        silu: whether SiLU is applied to the result.

    Returns:
        images [N, C, H, W] in the dtype of x, channels last in memory.
    """
    return _GroupNorm.apply(x, gain.expand(x.shape[:2]), offset.expand(x.shape[:2]), groups, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = sums_dtype(x)
        gain, offset = gain.to(dtype).contiguous(), offset.to(dtype).contiguous()
        z, mean, rstd = _implementation(x.device.type).forward(x, gain, offset, groups, silu)
        ctx.save_for_backward(x, gain, offset, mean, rstd)
        ctx.silu = silu
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        gain, offset, mean, rstd = rest
        dx, d_gain, d_offset = _implementation(x.device.type).backward(g, x, gain, offset, mean, rstd, ctx.silu)
        return dx, d_gain, d_offset, None, None


@functools.cache
def _implementation(device_type: str) -> type[TorchGroupNorm] | ModuleType:
    """Returns the module of Triton kernels for "cuda" if Triton can compile kernels, otherwise `TorchGroupNorm`."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return TorchGroupNorm
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # On Debian, the default scheme may name a directory that does not contain the headers.
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    headers = any(Path(sysconfig.get_path("include", scheme), "Python.h").exists() for scheme in schemes)
    if not (compiler and headers):
        missing = "Python's headers" if compiler else "a C compiler"
        logging.getLogger(__name__).warning("Triton needs %s: install it, or group norms on the GPU are slow", missing)
        return TorchGroupNorm
    from diffusion.nets import kernels

    return kernels
