"""The operations of the nets in functions of torch, which are also the reference for `diffusion.nets.fused`.

A group norm, the affine map after it and SiLU are one operation. For each image and channel, the normalization and the
affine map are together z = A x + B. A and B are computed from the sums of x and of x^2, so that the forward pass is one
reduction over x and one pointwise operation. The gradient of x is A g' + P x + Q, where g' is the gradient of z. P and
Q are computed from sums for each image and group of channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion.nets.activation import Activation

EPSILON = 1e-5  # added to the variance, as in torch.nn.GroupNorm


def split_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns the bias [C] of a convolution for the convolution itself, and None for the activation."""
    return None if module.bias is None else module.bias.to(module.weight.dtype), None


def with_sums(x: Activation) -> Activation:
    """Returns x."""
    return x


def norm(
    module: nn.GroupNorm, parts: Sequence[Activation], time: Tensor | None, silu: bool, resample: str
) -> tuple[Tensor, tuple[Activation, ...]]:
    """Returns the result [N, C, H', W'] of `diffusion.nets.operations.norm`, and x with the channels of all parts."""
    x = parts[0].values if len(parts) == 1 else torch.cat([part.values for part in parts], dim=1)
    gain, offset = module.weight[None], module.bias[None]
    if time is not None:
        scale, shift = time.chunk(2, dim=1)
        gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
    z = group_norm(x, gain, offset, module.num_groups, silu)
    if resample:
        function = halved if resample == "halved" else doubled
        z, x = function(z), function(x)
    return z, (Activation(x),)


def residual(skip: nn.Module, parts: Sequence[Activation], h: Activation) -> Activation:
    """See `diffusion.nets.operations.residual`."""
    (x,) = parts
    values = x.values
    if isinstance(skip, nn.Conv2d):
        values = F.conv2d(values, skip.weight, split_bias(skip)[0])
    return Activation(values + h.values)


def projections(layers: Sequence[nn.Sequential], embedding: Tensor) -> list[Tensor]:
    """Returns a tensor [N, F] for each layer. See `diffusion.nets.operations.projections`."""
    return [layer(embedding) for layer in layers]


def group_norm(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool = False) -> Tensor:
    """Applies group norm (Wu & He 2018, arXiv 1803.08494) with an affine map that may differ between images.

    On a CPU and for images with channels last in memory, this function is faster than `torch.nn.functional.group_norm`.
    Sums are computed in float32, or in float64 if x is float64.

    Args:
        x: images [N, C, H, W].
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
        dtype = torch.promote_types(x.dtype, torch.float32)
        gain, offset, wide = gain.to(dtype).contiguous(), offset.to(dtype).contiguous(), x.to(dtype)
        sums = torch.stack([wide.sum((2, 3)), (wide * wide).sum((2, 3))])
        mean, square = (sums.unflatten(2, (groups, -1)).mean(3) / x[0, 0].numel()).unbind()
        rstd = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(EPSILON).rsqrt_()
        z = _affine(wide, gain, offset, mean, rstd)
        ctx.save_for_backward(x, gain, offset, mean, rstd)
        ctx.silu = silu
        return (F.silu(z, inplace=True) if silu else z).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset, mean, rstd = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        wide, g = x.to(gain.dtype), g.to(gain.dtype)
        if ctx.silu:
            z = _affine(wide, gain, offset, mean, rstd)
            g = torch.ops.aten.silu_backward.grad_input(g, z, grad_input=z)
        groups, work = mean.shape[1], g * wide
        sums = torch.stack([g.sum((2, 3)), work.sum((2, 3))]).unflatten(2, (groups, -1))
        d_offset, product = sums.unbind()
        d_gain = torch.addcmul(product, mean[:, :, None], d_offset, value=-1) * rstd[:, :, None]
        # The result does not depend on the shift and scale of a group of x, so dx has no component along these two.
        components = torch.stack([d_offset, d_gain]) * gain.unflatten(1, (groups, -1))
        shift, scale = (components.mean(3) / x[0, 0].numel()).unbind()
        p = -rstd.square() * scale
        q = -torch.addcmul(p * mean, rstd, shift)
        a = gain * _channels(rstd, gain)
        p, q = _images(_channels(p, gain)), _images(_channels(q, gain))
        # Reuses memory: on a CPU, new memory takes longer than the sums.
        dx = torch.addcmul(q, p, wide, out=work).addcmul_(_images(a), g)
        return dx.to(x.dtype), d_gain.flatten(1), d_offset.flatten(1), None, None


def _affine(x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Returns gain * (x - mean) * rstd + offset, computed as A x + B."""
    a = gain * _channels(rstd, gain)
    b = torch.addcmul(offset, a, _channels(mean, gain), value=-1)
    return torch.addcmul(_images(b), _images(a), x)


def _channels(group_values: Tensor, like: Tensor) -> Tensor:
    """Repeats values of groups [N, groups] for each channel, with the shape [N, C] of `like`."""
    return group_values[:, :, None].expand(-1, -1, like.shape[1] // group_values.shape[1]).flatten(1)


def _images(channel_values: Tensor) -> Tensor:
    """Adds two dimensions for height and width: [N, C] -> [N, C, 1, 1]."""
    return channel_values[:, :, None, None]


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return F.interpolate(g / 4, scale_factor=2)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return F.avg_pool2d(g, 2, divisor_override=1)


def halved(x: Tensor) -> Tensor:
    """Returns the mean of each block of 2x2 pixels: [B, C, H, W] -> [B, C, H / 2, W / 2].

    Up to a factor, this function and `doubled` are transposes of each other. Therefore, each of the two functions uses
    the operation of the other one as its gradient. This gradient is faster than the gradient that torch computes.
    """
    return _Halved.apply(x)


def doubled(x: Tensor) -> Tensor:
    """Returns the images with each pixel repeated 2x2 times: [B, C, H, W] -> [B, C, 2 H, 2 W]."""
    return _Doubled.apply(x)
