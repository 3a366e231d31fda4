"""The operations of the nets in few passes over the memory of a GPU, forward and backward.

The formulas are those of `diffusion.nets.plain`. These are the differences:

- A bias is stored separately from the images (`diffusion.nets.activation`). The norm that follows computes the gradient
  of the bias from sums that it needs anyway.
- An addition also computes the sums that the next norm needs.
- A norm accepts x as two tensors without concatenating them.
- A norm also returns x for the skip connection. Its backward pass adds the gradient of this output.
- A norm changes the resolution of its result and of x in the same pass.
- The projections of the timestep embedding for all blocks are one matrix product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion.nets import kernels
from diffusion.nets.activation import Activation


def split_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns None for the convolution itself, and the bias [C] for the activation."""
    return None, module.bias


def with_sums(x: Activation) -> Activation:
    """See `diffusion.nets.operations.with_sums`."""
    return x._replace(sums=kernels.sums(_channels_last(x.values.detach())))


def norm(
    module: nn.GroupNorm, parts: Sequence[Activation], time: Tensor | None, silu: bool, resample: str
) -> tuple[Tensor, tuple[Activation, ...]]:
    """Returns the result [N, C, H', W'] of `diffusion.nets.operations.norm`, and x in the parts of the argument.

    The backward pass adds the gradients of both in one kernel. x with doubled resolution is not computed: `residual`
    reads the smaller x.
    """
    first, second = parts if len(parts) == 2 else (parts[0], Activation(None))  # type: ignore[arg-type]
    z, x1, x2 = _Norm.apply(
        first.values, second.values, first.sums, second.sums, first.bias, second.bias, module.weight, module.bias,
        time, module.num_groups, silu, resample,
    )  # fmt: skip
    return z, tuple(Activation(x, part.bias) for x, part in zip((x1, x2), parts, strict=False))


def residual(skip: nn.Module, parts: Sequence[Activation], h: Activation) -> Activation:
    """See `diffusion.nets.operations.residual`."""
    if isinstance(skip, nn.Conv2d):
        biases = torch.cat([_bias(part) for part in parts]) if len(parts) > 1 else _bias(parts[0])
        y, sums, shift = _AddProducts.apply(h.values, skip.weight.flatten(1), biases, *(part.values for part in parts))
        return Activation(y, _bias(h) + skip.get_parameter("bias") + shift, sums)
    (x,) = parts
    y, sums = _Add.apply(x.values, h.values)
    return Activation(y, _bias(x) + _bias(h), sums)


def projections(layers: Sequence[nn.Sequential], embedding: Tensor) -> Sequence[Tensor]:
    """Returns a tensor [N, F] for each layer. See `diffusion.nets.operations.projections`."""
    weights, biases = zip(*((layer.weight, layer.bias) for _, layer in layers), strict=True)
    product = F.linear(F.silu(embedding), torch.cat(weights), torch.cat(biases))
    return product.split([len(bias) for bias in biases], dim=1)


def _bias(x: Activation) -> Tensor:
    assert x.bias is not None  # each activation is the result of `convolution` or `residual`
    return x.bias


class _Norm(torch.autograd.Function):
    """Returns the result of a norm, and x in its parts x1 and x2 for the skip connection."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor | None,
        sums1: Tensor | None,
        sums2: Tensor | None,
        bias1: Tensor,
        bias2: Tensor | None,
        weight: Tensor,
        offset: Tensor,
        time: Tensor | None,
        groups: int,
        silu: bool,
        resample: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        tables = kernels.Tables(bias1, bias2, weight, offset, time)
        small: Tensor | None = None
        x1 = _channels_last(x1)
        x2 = None if x2 is None else _channels_last(x2)
        if sums1 is None and x2 is None and not resample and kernels.fits_norm_once(x1, groups):
            z, statistics = kernels.norm_once(x1, tables, groups, silu)
        else:
            sums1 = kernels.sums(x1) if sums1 is None else sums1
            sums2 = kernels.sums(x2) if x2 is not None and sums2 is None else sums2
            statistics = kernels.statistics(sums1, sums2, tables, x1[0, 0].numel(), groups)
            z, small = kernels.affine(x1, x2, statistics.a, statistics.b, silu, resample)
        ctx.save_for_backward(x1, x2, *tables, *statistics)
        ctx.silu, ctx.resample = silu, resample
        return z, x1 if small is None else small, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, skip1: Tensor | None, skip2: Tensor | None) -> tuple[Tensor | None, ...]:
        x1, x2, *rest = ctx.saved_tensors
        tables, statistics = kernels.Tables(*rest[:5]), kernels.Statistics(*rest[5:])
        g = _channels_last(g)
        skip1, skip2 = (None if t is None else _channels_last(t) for t in (skip1, skip2))
        images = x1, x2, statistics.a, statistics.b
        sums = kernels.sums_backward(g, *images, ctx.silu, ctx.resample)
        of_tables, of_time, p, q = kernels.statistics_backward(sums, tables, statistics, x1[0, 0].numel())
        d1, d2 = kernels.affine_backward(g, x1, x2, skip1, skip2, *images[2:], p, q, ctx.silu, ctx.resample)
        of_weight, of_offset, of_bias = kernels.column_sums(of_tables)
        if tables.bias1.dim() == 2:
            of_bias = of_tables[2]
        of_bias1, of_bias2 = of_bias, None
        if x2 is not None:
            of_bias1, of_bias2 = of_bias.split([x1.shape[1], x2.shape[1]])
        return d1, d2, None, None, of_bias1, of_bias2, of_weight, of_offset, of_time, None, None, None


class _Add(torch.autograd.Function):
    """Returns x + h and its sums. x may have half the height and width of h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, sums = kernels.add(_channels_last(x), _channels_last(h))
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.doubled = x.shape != h.shape
        return y, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: None) -> tuple[Tensor, Tensor]:
        g = _channels_last(g)
        return kernels.sum_2x2(g) if ctx.doubled else g, g


class _AddProducts(torch.autograd.Function):
    """Returns h plus the sum of the products of each part of x with its columns of the weight [C, C1 + C2].

    The other results are the sums for the next norm, and the product of the weight with the biases [C1 + C2] of the
    parts, float32 [C].
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, biases: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = tuple(_channels_last(x) for x in parts)
        wide = weight.float()
        y, sums = kernels.add_products(_channels_last(h), parts, _split(weight, parts))
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, wide, biases, *parts)
        return y, sums, wide @ biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: None, of_shift: Tensor) -> tuple[Tensor, ...]:
        weight, wide, biases, *parts = ctx.saved_tensors
        g = _channels_last(g)
        rows = _rows(g)
        of_weight = torch.outer(of_shift, biases).to(weight.dtype)
        for part, x in zip(_split(of_weight, parts), parts, strict=True):
            part.addmm_(rows.T, _rows(x))
        of_parts = [_images(rows @ part, g) for part in _split(weight, parts)]
        return g, of_weight, of_shift @ wide, *of_parts


def _split(weight: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the columns of a weight [C, C1 + C2] that belong to each part of x, as views."""
    return weight.split([x.shape[1] for x in parts], dim=1)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """Returns images [N, C, H, W], channels last in memory, as a view [N H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """Returns rows [N H W, C] as images [N, C, H, W], where `like` has the same N, H and W."""
    n, _, height, width = like.shape
    return rows.unflatten(0, (n, height, width)).permute(0, 3, 1, 2)
