"""Group norm, affine map and SiLU as Triton kernels, for images with channels last in memory.

Each kernel reads the images once, in tiles [pixels, channels], and computes sums in float32. The pixels of an image are
divided into pieces. The kernel sums each piece, and the sums of the pieces are added in a fixed order. The number of
pieces does not depend on the device, so that equal inputs give equal bits. `diffusion.nets.norm` defines the symbols A,
B, P, Q, g and act.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion.nets.torch_norm import EPSILON

PIECE = 256  # pixels that one program sums
TILE = 4096  # elements of a tile
MAX_WIDTH = 128  # channels of a tile


def forward(x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same tensors as `TorchGroupNorm.forward`."""
    n, channels, pixels, width, rows = _shape(x)
    pieces = triton.cdiv(pixels, PIECE)
    sums = x.new_empty(n, pieces, 2, channels, dtype=torch.float32)
    _sums[n * pieces, channels // width](x, sums, pixels, channels, PIECE, rows, width)
    mean, rstd = (x.new_empty(n, groups, dtype=torch.float32) for _ in range(2))
    group = channels // groups
    _statistics[(n * groups,)](
        sums, mean, rstd, channels, pixels * group, EPSILON, pieces, group, triton.next_power_of_2(group)
    )
    z = torch.empty_like(x)
    _affine[n * triton.cdiv(pixels, rows), channels // width](
        x, z, gain, offset, mean, rstd, pixels, channels, group, silu, rows, width
    )
    return z, mean, rstd


def backward(
    g: Tensor, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same gradients as `TorchGroupNorm.backward`."""
    n, channels, pixels, width, rows = _shape(x)
    groups, pieces = mean.shape[1], triton.cdiv(pixels, PIECE)
    group = channels // groups
    sums = x.new_empty(n, pieces, 2, channels, dtype=torch.float32)
    _sums_backward[n * pieces, channels // width](
        x, g, sums, gain, offset, mean, rstd, pixels, channels, group, silu, PIECE, rows, width
    )
    d_gain, d_offset, p, q = (torch.empty_like(table) for table in (gain, gain, mean, mean))
    _statistics_backward[(n * groups,)](
        sums, gain, mean, rstd, d_gain, d_offset, p, q, channels, pixels * group, pieces, group,
        triton.next_power_of_2(group),
    )  # fmt: skip
    dx = torch.empty_like(x)
    _affine_backward[n * triton.cdiv(pixels, rows), channels // width](
        x, g, dx, gain, offset, mean, rstd, p, q, pixels, channels, group, silu, rows, width
    )
    return dx, d_gain, d_offset


def _shape(x: Tensor) -> tuple[int, int, int, int, int]:
    """Returns the numbers of images, of channels and of pixels per image, and of channels and of pixels per tile."""
    n, channels, height, width = x.shape
    # The largest power of two that divides C, so that tiles cover the channels exactly.
    tile = min(channels & -channels, MAX_WIDTH)
    return n, channels, height * width, tile, TILE // tile


@triton.jit
def _channels(width: tl.constexpr):
    """Returns the indices of the channels of a tile."""
    return tl.program_id(1) * width + tl.arange(0, width)


@triton.jit
def _tile(row, pixels, channel, channels, rows: tl.constexpr):
    """Returns the memory offsets of a tile [pixels, channels] in its image, and a mask of the pixels that exist."""
    row = row + tl.arange(0, rows)
    return row[:, None] * channels + channel[None, :], (row < pixels)[:, None]


@triton.jit
def _coefficients(gain, offset, mean, rstd, n, channel, channels, group):
    """Returns A and B of z = A x + B for some channels of image n."""
    at_group = n * (channels // group) + channel // group
    a = tl.load(gain + n * channels + channel) * tl.load(rstd + at_group)
    return a, tl.load(offset + n * channels + channel) - a * tl.load(mean + at_group)


@triton.jit
def _activation_backward(g, x, a, b, silu: tl.constexpr):
    """Returns act'(A x + B) g, the gradient with respect to z = A x + B."""
    if silu:
        z = a * x + b
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    return g


@triton.jit
def _sums(x, sums, pixels, channels, piece: tl.constexpr, rows: tl.constexpr, width: tl.constexpr):
    """Computes the sums of x and of x^2 for each channel of a tile over one piece of the pixels."""
    pieces = tl.cdiv(pixels, piece)
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = _channels(width)
    total = tl.zeros([rows, width], tl.float32)
    square = tl.zeros([rows, width], tl.float32)
    for row in range(0, piece, rows):
        at, mask = _tile(first + row, pixels, channel, channels, rows)
        value = tl.load(x + n * pixels * channels + at, mask, 0.0).to(tl.float32)
        total += value
        square += value * value
    here = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(here, tl.sum(total, 0))
    tl.store(here + channels, tl.sum(square, 0))


@triton.jit
def _statistics(
    sums, mean, rstd, channels, count, epsilon, pieces: tl.constexpr, group: tl.constexpr, padded: tl.constexpr
):
    """Computes the mean and 1 / standard deviation for one group of channels of one image, from the sums of `_sums`."""
    groups = channels // group
    n = (tl.program_id(0) // groups).to(tl.int64)
    inside = tl.arange(0, padded)
    here = sums + n * pieces * 2 * channels + tl.program_id(0) % groups * group + inside
    total = tl.zeros([padded], tl.float32)
    square = tl.zeros([padded], tl.float32)
    for index in range(pieces):
        total += tl.load(here + index * 2 * channels, inside < group, 0.0)
        square += tl.load(here + (index * 2 + 1) * channels, inside < group, 0.0)
    average = tl.sum(total, 0) / count
    variance = tl.maximum(tl.sum(square, 0) / count - average * average, 0.0)
    tl.store(mean + tl.program_id(0), average)
    tl.store(rstd + tl.program_id(0), 1 / tl.sqrt(variance + epsilon))


@triton.jit
def _affine(
    x, z, gain, offset, mean, rstd, pixels, channels, group,
    silu: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes act(A x + B) for a tile."""
    tiles = tl.cdiv(pixels, rows)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    channel = _channels(width)
    at, mask = _tile(tl.program_id(0) % tiles * rows, pixels, channel, channels, rows)
    at += n * pixels * channels
    a, b = _coefficients(gain, offset, mean, rstd, n, channel, channels, group)
    value = a[None, :] * tl.load(x + at, mask, 0.0).to(tl.float32) + b[None, :]
    if silu:
        value = value * tl.sigmoid(value)
    tl.store(z + at, value.to(z.dtype.element_ty), mask)


@triton.jit
def _sums_backward(
    x, g, sums, gain, offset, mean, rstd, pixels, channels, group,
    silu: tl.constexpr, piece: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes the sums of act'(A x + B) g and of act'(A x + B) g x for each channel over one piece of the pixels."""
    pieces = tl.cdiv(pixels, piece)
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = _channels(width)
    a, b = _coefficients(gain, offset, mean, rstd, n, channel, channels, group)
    total = tl.zeros([rows, width], tl.float32)
    product = tl.zeros([rows, width], tl.float32)
    for row in range(0, piece, rows):
        at, mask = _tile(first + row, pixels, channel, channels, rows)
        at += n * pixels * channels
        value = tl.load(x + at, mask, 0.0).to(tl.float32)
        slope = _activation_backward(tl.load(g + at, mask, 0.0).to(tl.float32), value, a[None, :], b[None, :], silu)
        total += slope
        product += slope * value
    here = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(here, tl.sum(total, 0))
    tl.store(here + channels, tl.sum(product, 0))


@triton.jit
def _statistics_backward(
    sums, gain, mean, rstd, d_gain, d_offset, p, q, channels, count,
    pieces: tl.constexpr, group: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Computes the gradients with respect to gain and offset, and P and Q, for one group of channels of one image."""
    groups = channels // group
    n = (tl.program_id(0) // groups).to(tl.int64)
    inside = tl.arange(0, padded)
    channel = tl.program_id(0) % groups * group + inside
    total = tl.zeros([padded], tl.float32)
    product = tl.zeros([padded], tl.float32)
    for index in range(pieces):
        here = sums + (n * pieces + index) * 2 * channels + channel
        total += tl.load(here, inside < group, 0.0)
        product += tl.load(here + channels, inside < group, 0.0)
    average = tl.load(mean + tl.program_id(0))
    scale = tl.load(rstd + tl.program_id(0))
    gain_gradient = scale * (product - average * total)
    weight = tl.load(gain + n * channels + channel, inside < group, 0.0)
    tl.store(d_gain + n * channels + channel, gain_gradient, inside < group)
    tl.store(d_offset + n * channels + channel, total, inside < group)
    x_coefficient = -scale * scale * tl.sum(weight * gain_gradient, 0) / count
    tl.store(p + tl.program_id(0), x_coefficient)
    tl.store(q + tl.program_id(0), -x_coefficient * average - scale * tl.sum(weight * total, 0) / count)


@triton.jit
def _affine_backward(
    x, g, dx, gain, offset, mean, rstd, p, q, pixels, channels, group,
    silu: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes the gradient A act'(A x + B) g + P x + Q with respect to x for a tile."""
    tiles = tl.cdiv(pixels, rows)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    channel = _channels(width)
    at, mask = _tile(tl.program_id(0) % tiles * rows, pixels, channel, channels, rows)
    at += n * pixels * channels
    a, b = _coefficients(gain, offset, mean, rstd, n, channel, channels, group)
    at_group = n * (channels // group) + channel // group
    value = tl.load(x + at, mask, 0.0).to(tl.float32)
    slope = _activation_backward(tl.load(g + at, mask, 0.0).to(tl.float32), value, a[None, :], b[None, :], silu)
    value = a[None, :] * slope + tl.load(p + at_group)[None, :] * value + tl.load(q + at_group)[None, :]
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask)
