"""Group norm, its affine and SiLU as one operation: act(gain * normalised(x) + offset), forward and backward.

Normalising, scaling and shifting collapse to one affine map per image and channel, z = A x + B, which follows from the
sum and the sum of squares of each channel. So forward takes one reduction over x and one pointwise pass, and backward
likewise: dx = A g + P x + Q. `TorchGroupNorm` does so in operations of torch, `diffusion.nets.kernels` on a GPU in a kernel a pass.
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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5


def group_norm(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool = False) -> Tensor:
    """Group norm (Wu & He 2018, arXiv 1803.08494) with an affine that may differ between images, then perhaps SiLU.

    Args:
        x: [N, C, H, W], fastest with channels last in memory, as the result is.
        gain, offset: [N, C] or [1, C].
        groups: number of groups; divides C.
        silu: return z * sigmoid(z) in place of z = gain * normalised(x) + offset.

    Returns:
        [N, C, H, W] in the dtype of x; sums are float32, or on a CPU float64 if x is.
    """
    return _GroupNorm.apply(x, gain.expand(x.shape[:2]), offset.expand(x.shape[:2]), groups, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = _sums_dtype(x)
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


class TorchGroupNorm:
    """In operations of torch, anywhere. On a CPU still faster than torch's own group norm of channels-last images."""

    @staticmethod
    def forward(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The result [N, C, H, W]; mean and 1 / standard deviation of each group, float32 [N, groups].

        Args:
            x: channels last in memory.
            gain, offset: float32 [N, C].
        """
        wide = x.to(_sums_dtype(x))
        sums = torch.stack([wide.sum((2, 3)), (wide * wide).sum((2, 3))])
        mean, square = (sums.unflatten(2, (groups, -1)).mean(3) / x[0, 0].numel()).unbind()
        rstd = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(EPSILON).rsqrt_()
        z = _affine(wide, gain, offset, mean, rstd)
        return (F.silu(z, inplace=True) if silu else z).to(x.dtype), mean, rstd

    @staticmethod
    def backward(
        g: Tensor, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, gain and offset, for that of the result, g [N, C, H, W], channels last in memory."""
        wide, g = x.to(gain.dtype), g.to(gain.dtype)
        if silu:
            z = _affine(wide, gain, offset, mean, rstd)
            g = torch.ops.aten.silu_backward.grad_input(g, z, grad_input=z)
        groups, work = mean.shape[1], g * wide
        sums = torch.stack([g.sum((2, 3)), work.sum((2, 3))]).unflatten(2, (groups, -1))
        d_offset, product = sums.unbind()
        d_gain = torch.addcmul(product, mean[:, :, None], d_offset, value=-1) * rstd[:, :, None]
        # What shifts or scales a whole group changes nothing: the gradient along these two directions is taken out.
        along = torch.stack([d_offset, d_gain]) * gain.unflatten(1, (groups, -1))
        shift, scale = (along.mean(3) / x[0, 0].numel()).unbind()
        p = -rstd.square() * scale
        q = -torch.addcmul(p * mean, rstd, shift)
        a = gain * _channels(rstd, gain)
        p, q = _images(_channels(p, gain)), _images(_channels(q, gain))
        # Fresh memory costs a CPU more than the sums.
        dx = torch.addcmul(q, p, wide, out=work).addcmul_(_images(a), g)
        return dx.to(x.dtype), d_gain.flatten(1), d_offset.flatten(1)


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _affine(x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """gain * (x - mean) * rstd + offset, as A x + B."""
    a = gain * _channels(rstd, gain)
    b = torch.addcmul(offset, a, _channels(mean, gain), value=-1)
    return torch.addcmul(_images(b), _images(a), x)


def _channels(of_groups: Tensor, like: Tensor) -> Tensor:
    """[N, groups] to [N, C]."""
    return of_groups[:, :, None].expand(-1, -1, like.shape[1] // of_groups.shape[1]).flatten(1)


def _images(of_channels: Tensor) -> Tensor:
    return of_channels[:, :, None, None]


@functools.cache
def _implementation(device_type: str) -> type[TorchGroupNorm] | ModuleType:
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return TorchGroupNorm
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # Debian's own Python would name another place for itself.
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    headers = any(Path(sysconfig.get_path("include", scheme), "Python.h").exists() for scheme in schemes)
    if not (compiler and headers):
        missing = "Python's headers are" if compiler else "a C compiler is"
        logging.getLogger(__name__).warning("%s missing, which Triton needs: norms are slow without it", missing)
        return TorchGroupNorm
    from diffusion.nets import kernels

    return kernels
