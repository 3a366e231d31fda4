"""Group norm, affine map and SiLU in operations of torch: used on CPUs, and as the reference for the Triton kernels.

`diffusion.nets.norm` defines the symbols A and B.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # added to the variance, as in torch.nn.GroupNorm


class TorchGroupNorm:
    """Group norm with affine map and SiLU on any device.

    On a CPU and for images with channels last in memory, this group norm is faster than `torch.nn.GroupNorm`.
    """

    @staticmethod
    def forward(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the result of group norm, affine map and SiLU, and the mean and 1 / standard deviation of each group.

        Args:
            x: images [N, C, H, W], channels last in memory.
            gain: factor of each channel, [N, C], float32, or float64 if x is float64.
            offset: summand of each channel, with the shape and dtype of `gain`.
            groups: number of groups, a divisor of C.
            silu: whether SiLU is applied to the result.

        Returns:
            images [N, C, H, W] in the dtype of x; mean and 1 / standard deviation, [N, groups] in the dtype of gain.
        """
        wide = x.to(sums_dtype(x))
        sums = torch.stack([wide.sum((2, 3)), (wide * wide).sum((2, 3))])
        mean, square = (sums.unflatten(2, (groups, -1)).mean(3) / x[0, 0].numel()).unbind()
        rstd = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(EPSILON).rsqrt_()
        z = _affine(wide, gain, offset, mean, rstd)
        return (F.silu(z, inplace=True) if silu else z).to(x.dtype), mean, rstd

    @staticmethod
    def backward(
        g: Tensor, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients with respect to x [N, C, H, W], gain [N, C] and offset [N, C].

        Args:
            g: gradient with respect to the result of `forward`, [N, C, H, W], channels last in memory.
            x: argument of `forward`.
            gain: argument of `forward`.
            offset: argument of `forward`.
            mean: mean of each group, [N, groups], as `forward` returned it.
            rstd: 1 / standard deviation of each group, [N, groups], as `forward` returned it.
            silu: argument of `forward`.
        """
        wide, g = x.to(gain.dtype), g.to(gain.dtype)
        if silu:
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
        return dx.to(x.dtype), d_gain.flatten(1), d_offset.flatten(1)


def sums_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of sums over images x [N, C, H, W]: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


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
