"""Triton kernels of the fused operations (`diffusion.nets.fused`), for images with channels last in memory.

A norm with its affine map and activation is act(A x + B), where A and B are numbers per image and channel. Each kernel
passes once over the images, in tiles [pixels, channels], and computes in float32. Images x may be stored in two parts
x1 and x2 that hold the first and the last channels.

Some kernels also change the resolution. Their tiles consist of the pixels of the smaller images. To each of these
pixels belong `x_window` pixels of x and `z_window` pixels of the result z: 1 and 1 if the resolution stays the same, 4
and 1 if it is halved, 1 and 4 if it is doubled.

Sums over an image are computed in pieces of its pixels, which are then added in a fixed order. The number of pieces
does not depend on the device, so that equal inputs give equal bits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-5  # added to the variance, as in torch.nn.GroupNorm
MAX_WIDTH = 128  # channels of a tile
TILE = 4096  # elements of a tile
SUM_TILE = 2048  # elements of a tile of `_sums`
PRODUCT_TILE, MAX_DEPTH = 8192, 64  # elements of a tile of a product, and input channels that it adds up at once
# Pixels of one program: as many as possible, but so few that this many programs keep the GPU busy.
MAX_PIXELS, MIN_PIXELS = 1024, 64
SUM_PROGRAMS, POINTWISE_PROGRAMS = 1024, 4096
# Largest images that `norm_once` holds in registers, and the channels of one of its programs.
ONCE_PIXELS, ONCE_WIDTH, ONCE_WARPS = 1024, 32, 16
# Numbers of warps, measured on an H200.
FEW_WARPS, MANY_WARPS = 4, 8

Moved = Sequence[tuple[Tensor | None, float]]
# These integers do not select a variant of a kernel, so that few variants are compiled.
RUNTIME = ["pixels", "image_width", "span", "pieces", "pieces1", "pieces2", "piece", "group", "eighth", "blocks", "n"]


def launch(kernel: Any, grid: tuple[int, ...], loads: Moved, stores: Moved, *arguments: Any, **options: Any) -> None:
    """Launches a kernel. Every launch of a kernel of this module is a call of this function.

    Args:
        kernel: the Triton kernel.
        grid: number of programs along each axis.
        loads: tensors that the kernel reads, and how often it reads each element on average. None stands for a tensor
            that this call does not have. `benchmarks.traffic` adds up these bytes.
        stores: tensors that the kernel writes, and how often it writes each element.
        arguments: positional arguments of the kernel.
        options: keyword arguments of the kernel.
    """
    kernel[grid](*arguments, **options)


class _Tiling(NamedTuple):
    """How images are divided into tiles: sizes of the smaller of x and z."""

    n: int
    channels: int
    height: int
    image_width: int
    x_window: int
    z_window: int
    width: int
    """Channels of a tile."""
    rows: int
    """Pixels of a tile."""

    @property
    def pixels(self) -> int:
        return self.height * self.image_width

    @property
    def piece(self) -> int:
        """Number of pixels of a piece, over which one program of a reduction adds up."""
        return self._pixels_of_program(SUM_PROGRAMS)

    @property
    def pieces(self) -> int:
        """Number of pieces that divide the pixels of an image."""
        return triton.cdiv(self.pixels, self.piece)

    @property
    def span(self) -> int:
        """Number of pixels that one program of a pointwise kernel computes."""
        return self._pixels_of_program(POINTWISE_PROGRAMS)

    @property
    def spans(self) -> int:
        """Number of programs of a pointwise kernel that divide the pixels of an image."""
        return triton.cdiv(self.pixels, self.span)

    def _pixels_of_program(self, programs: int) -> int:
        pixels = MAX_PIXELS
        while pixels > MIN_PIXELS and math.prod(self.grid(triton.cdiv(self.pixels, pixels))) < programs:
            pixels //= 2
        return pixels

    def grid(self, per_image: int) -> tuple[int, int]:
        """Returns the numbers of programs, for a number of programs per image and `width` channels."""
        return self.n * per_image, self.channels // self.width

    def new_sums(self, like: Tensor) -> Tensor:
        return like.new_empty(self.n, self.pieces, 2, self.channels, dtype=torch.float32)


def _tiling(x: Tensor, other: Tensor | None = None, resample: str = "", tile: int | None = None) -> _Tiling:
    """Returns the tiling of images x [N, C, H, W], to whose channels those of `other` are appended."""
    n, first, height, image_width = x.shape
    channels = first + (0 if other is None else other.shape[1])
    if resample == "halved":
        height, image_width = height // 2, image_width // 2
    # The largest power of two that divides both numbers of channels, so that each tile is in one of the two parts.
    width = min(first & -first, channels & -channels, MAX_WIDTH)
    windows = {"": (1, 1), "halved": (4, 1), "doubled": (1, 4)}[resample]
    tile = tile or TILE
    return _Tiling(n, channels, height, image_width, *windows, width, tile // width)


def _new_images(like: Tensor, channels: int, height: int, image_width: int) -> Tensor:
    shape = len(like), channels, height, image_width
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def sums(x: Tensor) -> Tensor:
    """Returns the sums of x and of x^2 over each piece of the pixels.

    Args:
        x: images [N, C, H, W], channels last in memory.

    Returns:
        float32 [N, pieces, 2, C].
    """
    by = _tiling(x, tile=SUM_TILE)
    result = by.new_sums(x)
    launch(
        _sums, by.grid(by.pieces), [(x, 1)], [(result, 1)],
        x, result, by.pixels, by.channels, by.piece, by.pieces, by.rows, by.width, num_warps=FEW_WARPS,
    )  # fmt: skip
    return result


def add(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x + h, and the sums of the result as `sums` returns them.

    Args:
        x: images [N, C, H, W], or images [N, C, H / 2, W / 2], each pixel of which is added to 2x2 pixels of h.
        h: images [N, C, H, W].
    """
    by = _tiling(x, resample="" if x.shape == h.shape else "doubled")
    y, result = torch.empty_like(h), by.new_sums(h)
    launch(
        _add, by.grid(by.pieces), [(x, 1), (h, 1)], [(y, 1), (result, 1)],
        x, h, y, result, by.pixels, by.image_width, by.channels, by.piece, by.pieces, by.z_window, by.rows, by.width,
        num_warps=FEW_WARPS,
    )  # fmt: skip
    return y, result


def add_products(h: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns h plus the 1x1 convolutions of one or two images, and the sums of the result as `sums` returns them.

    Args:
        h: images [N, C, H, W].
        parts: images, [N, C1, H, W] and [N, C2, H, W].
        weights: matrix of each convolution, [C, C1] and [C, C2], in the dtype of h. The last dimension is contiguous.
    """
    by = _tiling(h, tile=PRODUCT_TILE)
    y, result = torch.empty_like(h), by.new_sums(h)
    (x1, *_, x2), (w1, *_, w2) = (2 * tuple(parts))[:2], (2 * tuple(weights))[:2]
    second = x2.shape[1] if len(parts) == 2 else 0
    depth = min(channels & -channels for channels in (x1.shape[1], x2.shape[1], MAX_DEPTH))
    blocks, tiles = by.channels // by.width, by.n * by.pieces * triton.cdiv(min(by.piece, by.pixels), by.rows)
    moved = [(x, blocks) for x in parts] + [(weight, tiles) for weight in weights]
    launch(
        _add_products, by.grid(by.pieces), [(h, 1), *moved], [(y, 1), (result, 1)],
        h, x1, x2, w1, w2, y, result, by.pixels, by.channels, x1.shape[1], second, w1.stride(0), w2.stride(0),
        by.piece, by.pieces, depth, by.rows, by.width, num_warps=MANY_WARPS,
    )  # fmt: skip
    return y, result


def sum_2x2(g: Tensor) -> Tensor:
    """Returns the sum of each block of 2x2 pixels: [N, C, H, W] -> [N, C, H / 2, W / 2]."""
    by = _tiling(g, resample="halved")
    result = _new_images(g, by.channels, by.height, by.image_width)
    launch(
        _sum_2x2, by.grid(by.spans), [(g, 1)], [(result, 1)],
        g, result, by.pixels, by.image_width, by.channels, by.span, by.rows, by.width, num_warps=FEW_WARPS,
    )  # fmt: skip
    return result


class Tables(NamedTuple):
    """The arguments of a norm that do not depend on the pixel. C = C1 + C2 channels are divided into groups."""

    bias1: Tensor
    """Numbers that are added to x1 before the norm, float32 [C1] or [N, C1]."""
    bias2: Tensor | None
    """The same for x2; None if there is no x2."""
    weight: Tensor
    """Weight of the norm, float32 [C]."""
    offset: Tensor
    """Bias of the norm, float32 [C]."""
    time: Tensor | None
    """Scale and then shift by the timestep, [N, 2C]: the result is norm(x) (1 + scale) + shift. None: both are 0."""

    def loads(self, n: int) -> Moved:
        """Returns the tensors [C], and how often a kernel reads each of them that computes n images one by one."""
        per_channel = [self.bias1, self.bias2, self.weight, self.offset]
        return [(t, n if t is not None and t.dim() == 1 else 1) for t in per_channel]

    def arguments(self) -> tuple[Any, ...]:
        """Returns the arguments of a kernel: five tensors, C1, C, and the strides of bias1 and time."""
        bias2 = self.bias1 if self.bias2 is None else self.bias2
        time, time_stride = (self.weight, 0) if self.time is None else (self.time, self.time.stride(0))
        split = self.bias1.shape[-1]
        bias_stride = split if self.bias1.dim() == 2 else 0
        return self.bias1, bias2, self.weight, self.offset, time, split, len(self.weight), bias_stride, time_stride


class Statistics(NamedTuple):
    """Results of `statistics`, float32."""

    a: Tensor
    """A, [N, C]."""
    b: Tensor
    """B, [N, C]."""
    total: Tensor
    """Sum of x + bias over the pixels, [N, C]."""
    mean: Tensor
    """Mean of each group, [N, groups]."""
    rstd: Tensor
    """1 / standard deviation of each group, [N, groups]."""


def statistics(sums1: Tensor, sums2: Tensor | None, tables: Tables, pixels: int, groups: int) -> Statistics:
    """Returns A and B of a norm, and what its backward pass needs.

    Args:
        sums1: sums of x1, float32 [N, pieces, 2, C1].
        sums2: sums of x2, float32 [N, pieces, 2, C2]; None if there is no x2.
        tables: arguments of the norm.
        pixels: number of pixels of an image.
        groups: number of groups of channels.
    """
    n, channels = len(sums1), len(tables.weight)
    a, b, total = sums1.new_empty(3, n, channels)
    mean, rstd = sums1.new_empty(2, n, groups)
    second = sums1 if sums2 is None else sums2
    group = channels // groups
    launch(
        _statistics, (n * groups,), [(sums1, 1), (sums2, 1), (tables.time, 1), *tables.loads(n)],
        [(a, 1), (b, 1), (total, 1), (mean, 1), (rstd, 1)],
        sums1, second, *tables.arguments(), a, b, total, mean, rstd, pixels, sums1.shape[1], second.shape[1], group,
        EPSILON, tables.time is not None, _padded(group), num_warps=1,
    )  # fmt: skip
    return Statistics(a, b, total, mean, rstd)


def fits(x: Tensor, groups: int) -> bool:
    """Returns whether `norm_once` can compute a norm of images x [N, C, H, W]."""
    return x[0, 0].numel() <= ONCE_PIXELS and _channels_of_program(x.shape[1] // groups) > 0


def _channels_of_program(group: int) -> int:
    """Returns how many channels a program of `norm_once` computes: whole groups, and a multiple of 8 for fast loads."""
    return ONCE_WIDTH // math.lcm(group, 8) * math.lcm(group, 8)


def norm_once(x: Tensor, tables: Tables, groups: int, silu: bool) -> tuple[Tensor, Statistics]:
    """Returns the results of `affine` and of `statistics` for small images, which are read only once.

    Args:
        x: images [N, C, H, W] for which `fits` is true.
        tables: arguments of the norm. There is no x2.
        groups: number of groups of channels.
        silu: whether SiLU is applied to the result.
    """
    n, channels, height, image_width = x.shape
    pixels, group = height * image_width, channels // groups
    z = torch.empty_like(x)
    a, b, total = torch.empty(3, n, channels, dtype=torch.float32, device=x.device)
    mean, rstd = torch.empty(2, n, groups, dtype=torch.float32, device=x.device)
    used = _channels_of_program(group)
    blocks = triton.cdiv(channels, used)
    launch(
        _norm_once, (n * blocks,), [(x, 1), (tables.time, 1), *tables.loads(n)],
        [(z, 1), (a, 1), (b, 1), (total, 1), (mean, 1), (rstd, 1)],
        x, *tables.arguments(), z, a, b, total, mean, rstd, pixels, group, used // 8, blocks, EPSILON, silu,
        tables.time is not None, triton.next_power_of_2(pixels), ONCE_WIDTH, num_warps=ONCE_WARPS,
    )  # fmt: skip
    return z, Statistics(a, b, total, mean, rstd)


def _padded(group: int) -> int:
    """Returns a power of two that is at least `group`. It is 32 for usual nets, so that one variant is compiled."""
    return max(32, triton.next_power_of_2(group))


def affine(
    x1: Tensor, x2: Tensor | None, a: Tensor, b: Tensor, silu: bool, resample: str
) -> tuple[Tensor, Tensor | None]:
    """Returns act(A x + B), and x with halved resolution if the resolution is halved (otherwise None).

    Args:
        x1: images, the first C1 channels, [N, C1, H, W].
        x2: images, the other channels, [N, C - C1, H, W]; None if x1 has all channels.
        a: A, float32 [N, C].
        b: B, float32 [N, C].
        silu: whether act is SiLU. If false, act is the identity.
        resample: "halved" (the mean of 2x2 pixels), "doubled" (each pixel 2x2 times) or "" (the same resolution).
    """
    by = _tiling(x1, x2, resample)
    scale = 2 if resample == "doubled" else 1
    z = _new_images(x1, by.channels, scale * by.height, scale * by.image_width)
    skip = torch.empty_like(z) if resample == "halved" else None
    launch(
        _affine, by.grid(by.spans), [(x1, 1), (x2, 1), (a, by.spans), (b, by.spans)], [(z, 1), (skip, 1)],
        x1, x1 if x2 is None else x2, z, z if skip is None else skip, a, b, x1.shape[1], by.channels, by.pixels,
        by.image_width, by.span, silu, by.x_window, by.z_window, by.rows, by.width, num_warps=FEW_WARPS,
    )  # fmt: skip
    return z, skip


def sums_backward(g: Tensor, x1: Tensor, x2: Tensor | None, a: Tensor, b: Tensor, silu: bool, resample: str) -> Tensor:
    """Returns the sums of g' and of g' x over each piece of the pixels, where g' is the gradient of A x + B.

    Args:
        g: gradient of the first result of `affine`.
        x1: argument of `affine`.
        x2: argument of `affine`.
        a: argument of `affine`.
        b: argument of `affine`.
        silu: argument of `affine`.
        resample: argument of `affine`.

    Returns:
        float32 [N, pieces, 2, C].
    """
    by = _tiling(x1, x2, resample)
    result = by.new_sums(x1)
    launch(
        _sums_backward, by.grid(by.pieces), [(x1, 1), (x2, 1), (g, 1), (a, by.pieces), (b, by.pieces)], [(result, 1)],
        x1, x1 if x2 is None else x2, g, a, b, result, x1.shape[1], by.channels, by.pixels, by.image_width, by.piece,
        by.pieces, silu, by.x_window, by.z_window, by.rows, by.width, num_warps=FEW_WARPS,
    )  # fmt: skip
    return result


def statistics_backward(
    gradient_sums: Tensor, tables: Tables, forward: Statistics, pixels: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns the gradients of the tables of a norm, and P and Q of the gradient of x, A g' + P x + Q.

    Args:
        gradient_sums: result of `sums_backward`, [N, pieces, 2, C].
        tables: argument of `statistics`.
        forward: result of `statistics`.
        pixels: argument of `statistics`.

    Returns:
        gradients of weight, offset and bias for each image, float32 [3, N, C]; gradient of time, [N, 2C], or None; P
        and Q, each float32 [N, C].
    """
    n, pieces, _, channels = gradient_sums.shape
    groups = forward.mean.shape[1]
    group, time = channels // groups, tables.time
    gradients = gradient_sums.new_empty(3, n, channels)
    p, q = gradient_sums.new_empty(2, n, channels)
    d_time = None if time is None else time.new_empty(time.shape)
    launch(
        _statistics_backward, (n * groups,),
        [(gradient_sums, 1), (forward.total, 1), (forward.mean, 1), (forward.rstd, 1), (time, 0.5), *tables.loads(n)],
        [(gradients, 1), (d_time, 1), (p, 1), (q, 1)],
        gradient_sums, forward.total, forward.mean, forward.rstd, *tables.arguments(), gradients,
        gradients if d_time is None else d_time, p, q, pixels, pieces, group, n, time is not None, _padded(group),
        num_warps=1,
    )  # fmt: skip
    return gradients, d_time, p, q


def affine_backward(
    g: Tensor,
    x1: Tensor,
    x2: Tensor | None,
    skip1: Tensor | None,
    skip2: Tensor | None,
    a: Tensor,
    b: Tensor,
    p: Tensor,
    q: Tensor,
    silu: bool,
    resample: str,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of x1 and x2: A g' + P x + Q, plus the gradients from the skip connection.

    Args:
        g: argument of `sums_backward`, like `x1`, `x2`, `a`, `b`, `silu` and `resample`.
        x1: see `g`.
        x2: see `g`.
        skip1: gradient of x1 from the skip connection, or None for 0. If the resolution is halved, it is the gradient
            of the second result of `affine`. Otherwise it has the shape of x1.
        skip2: the same for x2. Either none or all parts of x have such a gradient.
        a: see `g`.
        b: see `g`.
        p: P, as `statistics_backward` returned it.
        q: Q, as `statistics_backward` returned it.
        silu: see `g`.
        resample: see `g`.
    """
    by = _tiling(x1, x2, resample)
    d1, d2 = torch.empty_like(x1), None if x2 is None else torch.empty_like(x2)
    launch(
        _affine_backward, by.grid(by.spans),
        [(x1, 1), (x2, 1), (g, 1), (skip1, 1), (skip2, 1), *((table, by.spans) for table in (a, b, p, q))],
        [(d1, 1), (d2, 1)],
        x1, x1 if x2 is None else x2, g, x1 if skip1 is None else skip1, x1 if skip2 is None else skip2,
        d1, d1 if d2 is None else d2, a, b, p, q, x1.shape[1], by.channels, by.pixels, by.image_width, by.span,
        silu, skip1 is not None, by.x_window, by.z_window, by.rows, by.width, num_warps=MANY_WARPS,
    )  # fmt: skip
    return d1, d2


def column_sums(tables: Tensor) -> Tensor:
    """Returns the sums over the images of tables float32 [K, N, C]: float32 [K, C]."""
    k, n, channels = tables.shape
    result = tables.new_empty(k, channels)
    width = min(channels & -channels, 32)
    launch(
        _column_sums, (k, channels // width), [(tables, 1)], [(result, 1)],
        tables, result, n, channels, 32, width, num_warps=FEW_WARPS,
    )  # fmt: skip
    return result


@triton.jit
def _part(x1, x2, n, pixels, split, channels, first):
    """Returns the address of channel `first` of image n, which is in x1 or in x2, and the channels of this part."""
    if first < split:
        address = x1 + n * pixels * split + first
        stride = split
    else:
        address = x2 + n * pixels * (channels - split) + first - split
        stride = channels - split
    return address, stride


@triton.jit
def _at(row, k, image_width, window: tl.constexpr):
    """Returns the index of the k-th of the `window` pixels that belong to pixel `row` of the smaller images."""
    if window == 1:
        return row
    top = row // image_width * 4 * image_width + row % image_width * 2
    return top + k // 2 * 2 * image_width + k % 2


@triton.jit
def _gradient(g, x, a, b, silu: tl.constexpr):
    """Returns g' = act'(A x + B) g, the gradient of A x + B."""
    if silu:
        z = a * x + b
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    return g


@triton.jit
def _store_sums(sums, channels, channel, first, second):
    """Stores two sums over a piece of the pixels, which a tile [pixels, channels] holds for each of its pixels."""
    here = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(here, tl.sum(first, 0))
    tl.store(here + channels, tl.sum(second, 0))


@triton.jit(do_not_specialize=RUNTIME)
def _sums(x, sums, pixels, channels, piece, pieces, rows: tl.constexpr, width: tl.constexpr):
    """Computes the sums of x and of x^2 for each channel of a tile over one piece of the pixels."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = tl.program_id(1) * width + tl.arange(0, width)
    end = tl.minimum(first + piece, pixels)
    total = tl.zeros([rows, width], tl.float32)
    square = tl.zeros([rows, width], tl.float32)
    for start in range(first, end, rows):
        row = start + tl.arange(0, rows)
        at = n * pixels * channels + row[:, None] * channels + channel[None, :]
        value = tl.load(x + at, (row < end)[:, None], 0.0).to(tl.float32)
        total += value
        square += value * value
    _store_sums(sums, channels, channel, total, square)


@triton.jit(do_not_specialize=RUNTIME)
def _add(
    x, h, y, sums, pixels, image_width, channels, piece, pieces,
    window: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes y = x + h, and the sums of y and y^2, for one piece of the pixels of x."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = tl.program_id(1) * width + tl.arange(0, width)
    end = tl.minimum(first + piece, pixels)
    total = tl.zeros([rows, width], tl.float32)
    square = tl.zeros([rows, width], tl.float32)
    for start in range(first, end, rows):
        row = start + tl.arange(0, rows)
        mask = (row < end)[:, None]
        at = n * pixels * channels + row[:, None] * channels + channel[None, :]
        small = tl.load(x + at, mask, 0.0).to(tl.float32)
        for k in tl.static_range(window):
            pixel = _at(row, k, image_width, window)
            at = n * pixels * window * channels + pixel[:, None] * channels + channel[None, :]
            value = (small + tl.load(h + at, mask, 0.0).to(tl.float32)).to(y.dtype.element_ty)
            tl.store(y + at, value, mask)
            value = value.to(tl.float32)  # the sums are those of the rounded values
            total += value
            square += value * value
    _store_sums(sums, channels, channel, total, square)


@triton.jit
def _product(x, weight, total, row, mask, pixels, n, channel, channels, stride, depth: tl.constexpr):
    """Adds the product of some pixels of x with the transposed weight, for some channels of the result."""
    for first in range(0, channels, depth):
        inside = first + tl.arange(0, depth)
        pixel = tl.load(x + n * pixels * channels + row[:, None] * channels + inside[None, :], mask, 0.0)
        matrix = tl.load(weight + channel[None, :] * stride + inside[:, None])
        total = tl.dot(pixel, matrix, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=RUNTIME)
def _add_products(
    h, x1, x2, weight1, weight2, y, sums, pixels, channels, channels1, channels2, stride1, stride2, piece, pieces,
    depth: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes y = h + x1 weight1^T + x2 weight2^T, and the sums of y and y^2, for one piece of the pixels."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = tl.program_id(1) * width + tl.arange(0, width)
    end = tl.minimum(first + piece, pixels)
    sum_of_values = tl.zeros([1, width], tl.float32)
    square = tl.zeros([1, width], tl.float32)
    for start in range(first, end, rows):
        row = start + tl.arange(0, rows)
        mask = (row < end)[:, None]
        at = n * pixels * channels + row[:, None] * channels + channel[None, :]
        value = tl.load(h + at, mask, 0.0).to(tl.float32)
        value = _product(x1, weight1, value, row, mask, pixels, n, channel, channels1, stride1, depth)
        value = _product(x2, weight2, value, row, mask, pixels, n, channel, channels2, stride2, depth)
        value = value.to(y.dtype.element_ty)
        tl.store(y + at, value, mask)
        value = tl.where(mask, value.to(tl.float32), 0.0)
        sum_of_values += tl.sum(value, 0)[None, :]
        square += tl.sum(value * value, 0)[None, :]
    _store_sums(sums, channels, channel, sum_of_values, square)


@triton.jit(do_not_specialize=RUNTIME)
def _sum_2x2(g, y, pixels, image_width, channels, span, rows: tl.constexpr, width: tl.constexpr):
    """Computes the sums of 2x2 pixels for some tiles."""
    spans = tl.cdiv(pixels, span)
    first_row = tl.program_id(0) % spans * span
    end = tl.minimum(first_row + span, pixels)
    n = (tl.program_id(0) // spans).to(tl.int64)
    channel = tl.program_id(1) * width + tl.arange(0, width)
    for start in range(first_row, end, rows):
        row = start + tl.arange(0, rows)
        mask = (row < end)[:, None]
        total = tl.zeros([rows, width], tl.float32)
        for k in tl.static_range(4):
            at = _at(row, k, image_width, 4)[:, None] * channels + channel[None, :]
            total += tl.load(g + n * pixels * 4 * channels + at, mask, 0.0).to(tl.float32)
        at = n * pixels * channels + row[:, None] * channels + channel[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask)


@triton.jit
def _affine_tables(
    bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride, n, channel, mask,
    has_time: tl.constexpr,
):  # fmt: skip
    """Returns bias, weight, offset, and scale by the timestep, of some channels of image n."""
    bias = tl.load(bias1 + n * bias_stride + channel, mask & (channel < split), 0.0).to(tl.float32)
    bias += tl.load(bias2 + channel - split, mask & (channel >= split), 0.0).to(tl.float32)
    gain = tl.load(weight + channel, mask, 0.0).to(tl.float32)
    shift = tl.load(offset + channel, mask, 0.0).to(tl.float32)
    scale = tl.zeros_like(gain)
    if has_time:
        scale = tl.load(time + n * time_stride + channel, mask, 0.0).to(tl.float32)
    return bias, gain, shift, scale


@triton.jit(do_not_specialize=RUNTIME)
def _statistics(
    sums1, sums2, bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride,
    a, b, total, mean, rstd, pixels, pieces1, pieces2, group, epsilon, has_time: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Computes A and B, and the statistics of x + bias, for one group of channels of one image."""
    groups = channels // group
    n = (tl.program_id(0) // groups).to(tl.int64)
    inside = tl.arange(0, padded)
    mask = inside < group
    channel = tl.program_id(0) % groups * group + inside
    value = tl.zeros([padded], tl.float32)
    square = tl.zeros([padded], tl.float32)
    for index in range(pieces1):
        here = sums1 + (n * pieces1 + index) * 2 * split + channel
        value += tl.load(here, mask & (channel < split), 0.0)
        square += tl.load(here + split, mask & (channel < split), 0.0)
    if split < channels:
        for index in range(pieces2):
            here = sums2 + (n * pieces2 + index) * 2 * (channels - split) + channel - split
            value += tl.load(here, mask & (channel >= split), 0.0)
            square += tl.load(here + channels - split, mask & (channel >= split), 0.0)
    bias, gain, shift, scale = _affine_tables(
        bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride, n, channel, mask, has_time
    )
    square += 2 * bias * value + pixels * bias * bias
    value += pixels * bias
    average = tl.sum(value, 0) / (pixels * group)
    variance = tl.maximum(tl.sum(square, 0) / (pixels * group) - average * average, 0.0)
    inverse = 1 / tl.sqrt(variance + epsilon)
    shift *= 1 + scale
    if has_time:
        shift += tl.load(time + n * time_stride + channels + channel, mask, 0.0).to(tl.float32)
    slope = gain * (1 + scale) * inverse
    tl.store(a + n * channels + channel, slope, mask)
    tl.store(b + n * channels + channel, shift + slope * (bias - average), mask)
    tl.store(total + n * channels + channel, value, mask)
    tl.store(mean + tl.program_id(0), average)
    tl.store(rstd + tl.program_id(0), inverse)


@triton.jit
def _over_groups(values, inside, group):
    """Returns for each channel of a tile the sum of the values of all channels of its group."""
    same = (inside // group)[:, None] == (inside // group)[None, :]
    return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit(do_not_specialize=RUNTIME)
def _norm_once(
    x, bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride,
    z, a, b, total, mean, rstd, pixels, group, eighth, blocks, epsilon,
    silu: tl.constexpr, has_time: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes act(A x + B), A, B and the statistics of x + bias, for some whole groups of channels of one image."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.arange(0, width)
    used = eighth * 8  # a multiple of 8, which the compiler needs to know
    channel = tl.program_id(0) % blocks * used + inside
    exists = (inside < used) & (channel < channels)
    row = tl.arange(0, rows)[:, None]
    mask = (row < pixels) & exists[None, :]
    at = n * pixels * channels + row * channels + channel[None, :]
    bias, gain, shift, scale = _affine_tables(
        bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride, n, channel, exists, has_time
    )
    value = tl.load(x + at, mask, 0.0).to(tl.float32) + bias[None, :]
    sums = tl.sum(tl.where(mask, value, 0.0), 0)
    average = _over_groups(sums, inside, group) / (pixels * group)
    value -= average[None, :]
    square = tl.sum(tl.where(mask, value * value, 0.0), 0)
    inverse = 1 / tl.sqrt(_over_groups(square, inside, group) / (pixels * group) + epsilon)
    shift *= 1 + scale
    if has_time:
        shift += tl.load(time + n * time_stride + channels + channel, exists, 0.0).to(tl.float32)
    slope = gain * (1 + scale) * inverse
    value = slope[None, :] * value + shift[None, :]
    if silu:
        value = value * tl.sigmoid(value)
    tl.store(z + at, value.to(z.dtype.element_ty), mask)
    tl.store(a + n * channels + channel, slope, exists)
    tl.store(b + n * channels + channel, shift + slope * (bias - average), exists)
    tl.store(total + n * channels + channel, sums, exists)
    first = exists & (inside % group == 0)
    tl.store(mean + n * (channels // group) + channel // group, average, first)
    tl.store(rstd + n * (channels // group) + channel // group, inverse, first)


@triton.jit(do_not_specialize=RUNTIME)
def _affine(
    x1, x2, z, skip, a, b, split, channels, pixels, image_width, span, silu: tl.constexpr,
    x_window: tl.constexpr, z_window: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes act(A x + B) for some tiles, and the means of 2x2 pixels of x if `x_window` is 4."""
    spans = tl.cdiv(pixels, span)
    first_row = tl.program_id(0) % spans * span
    end = tl.minimum(first_row + span, pixels)
    n = (tl.program_id(0) // spans).to(tl.int64)
    inside = tl.arange(0, width)[None, :]
    channel = tl.program_id(1) * width + inside
    x, stride = _part(x1, x2, n, pixels * x_window, split, channels, tl.program_id(1) * width)
    slope = tl.load(a + n * channels + channel)
    shift = tl.load(b + n * channels + channel)
    for start in range(first_row, end, rows):
        row = start + tl.arange(0, rows)
        mask = (row < end)[:, None]
        result = tl.zeros([rows, width], tl.float32)
        mean = tl.zeros([rows, width], tl.float32)
        for k in tl.static_range(x_window):
            pixel = _at(row, k, image_width, x_window)
            value = tl.load(x + pixel[:, None] * stride + inside, mask, 0.0).to(tl.float32)
            mean += value / x_window
            value = slope * value + shift
            if silu:
                value = value * tl.sigmoid(value)
            result += value / x_window
        for k in tl.static_range(z_window):
            at = _at(row, k, image_width, z_window)[:, None] * channels + channel
            tl.store(z + n * pixels * z_window * channels + at, result.to(z.dtype.element_ty), mask)
        if x_window == 4:
            at = n * pixels * channels + row[:, None] * channels + channel
            tl.store(skip + at, mean.to(skip.dtype.element_ty), mask)


@triton.jit
def _gradient_of_pixel(
    g, n, row, channel, channels, pixels, image_width, mask,
    x_window: tl.constexpr, z_window: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Returns the gradient of act(A x + B) at a pixel of x, from the gradients of the pixels of the result."""
    total = tl.zeros([rows, width], tl.float32)
    for k in tl.static_range(z_window):
        at = _at(row, k, image_width, z_window)[:, None] * channels + channel
        total += tl.load(g + n * pixels * z_window * channels + at, mask, 0.0).to(tl.float32)
    return total / x_window


@triton.jit(do_not_specialize=RUNTIME)
def _sums_backward(
    x1, x2, g, a, b, sums, split, channels, pixels, image_width, piece, pieces, silu: tl.constexpr,
    x_window: tl.constexpr, z_window: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes the sums of g' and of g' x for each channel of a tile over one piece of the pixels."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    end = tl.minimum(first + piece, pixels)
    inside = tl.arange(0, width)
    channel = tl.program_id(1) * width + inside
    x, stride = _part(x1, x2, n, pixels * x_window, split, channels, tl.program_id(1) * width)
    slope = tl.load(a + n * channels + channel)[None, :]
    shift = tl.load(b + n * channels + channel)[None, :]
    total = tl.zeros([rows, width], tl.float32)
    product = tl.zeros([rows, width], tl.float32)
    for start in range(first, end, rows):
        row = start + tl.arange(0, rows)
        mask = (row < end)[:, None]
        of_z = _gradient_of_pixel(
            g, n, row, channel[None, :], channels, pixels, image_width, mask, x_window, z_window, rows, width
        )
        for k in tl.static_range(x_window):
            pixel = _at(row, k, image_width, x_window)
            value = tl.load(x + pixel[:, None] * stride + inside[None, :], mask, 0.0).to(tl.float32)
            gradient = _gradient(of_z, value, slope, shift, silu)
            total += gradient
            product += gradient * value
    _store_sums(sums, channels, channel, total, product)


@triton.jit(do_not_specialize=RUNTIME)
def _statistics_backward(
    sums, total, mean, rstd, bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride,
    gradients, d_time, p, q, pixels, pieces, group, n, has_time: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the tables, and P and Q, for one group of channels of one image."""
    groups = channels // group
    image = (tl.program_id(0) // groups).to(tl.int64)
    inside = tl.arange(0, padded)
    mask = inside < group
    channel = tl.program_id(0) % groups * group + inside
    here = image * channels + channel
    of_shift = tl.zeros([padded], tl.float32)
    product = tl.zeros([padded], tl.float32)
    for index in range(pieces):
        at = sums + (image * pieces + index) * 2 * channels + channel
        of_shift += tl.load(at, mask, 0.0)
        product += tl.load(at + channels, mask, 0.0)
    bias, gain, shift, scale = _affine_tables(
        bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride, image, channel, mask, has_time
    )
    average = tl.load(mean + tl.program_id(0))
    inverse = tl.load(rstd + tl.program_id(0))
    # Gradient of the factor by which the normalized x is multiplied.
    of_gain = inverse * (product + (bias - average) * of_shift)
    factor = gain * (1 + scale)
    x_factor = -inverse * inverse * tl.sum(factor * of_gain, 0) / (pixels * group)
    constant = -x_factor * average - inverse * tl.sum(factor * of_shift, 0) / (pixels * group)
    of_bias = factor * inverse * of_shift + x_factor * tl.load(total + here, mask, 0.0) + constant * pixels
    tl.store(gradients + here, of_gain * (1 + scale), mask)
    tl.store(gradients + n.to(tl.int64) * channels + here, of_shift * (1 + scale), mask)
    tl.store(gradients + 2 * n.to(tl.int64) * channels + here, of_bias, mask)
    if has_time:
        at = d_time + image * 2 * channels + channel
        tl.store(at, (of_gain * gain + of_shift * shift).to(d_time.dtype.element_ty), mask)
        tl.store(at + channels, of_shift.to(d_time.dtype.element_ty), mask)
    tl.store(p + here, x_factor + tl.zeros_like(of_gain), mask)
    tl.store(q + here, constant + x_factor * bias, mask)


@triton.jit(do_not_specialize=RUNTIME)
def _affine_backward(
    x1, x2, g, skip1, skip2, d1, d2, a, b, p, q, split, channels, pixels, image_width, span,
    silu: tl.constexpr, has_skip: tl.constexpr,
    x_window: tl.constexpr, z_window: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Computes A g' + P x + Q plus the gradient from the skip connection, for some tiles."""
    spans = tl.cdiv(pixels, span)
    first_row = tl.program_id(0) % spans * span
    end = tl.minimum(first_row + span, pixels)
    n = (tl.program_id(0) // spans).to(tl.int64)
    inside = tl.arange(0, width)[None, :]
    first = tl.program_id(1) * width
    channel = first + inside
    x, stride = _part(x1, x2, n, pixels * x_window, split, channels, first)
    dx, stride = _part(d1, d2, n, pixels * x_window, split, channels, first)
    skip, stride = _part(skip1, skip2, n, pixels, split, channels, first)
    slope = tl.load(a + n * channels + channel)
    shift = tl.load(b + n * channels + channel)
    x_factor = tl.load(p + n * channels + channel)
    constant = tl.load(q + n * channels + channel)
    for start in range(first_row, end, rows):
        row = start + tl.arange(0, rows)
        mask = (row < end)[:, None]
        of_z = _gradient_of_pixel(
            g, n, row, channel, channels, pixels, image_width, mask, x_window, z_window, rows, width
        )
        rest = constant + tl.zeros([rows, width], tl.float32)
        if has_skip:
            rest += tl.load(skip + row[:, None] * stride + inside, mask, 0.0).to(tl.float32) / x_window
        for k in tl.static_range(x_window):
            at = _at(row, k, image_width, x_window)[:, None] * stride + inside
            value = tl.load(x + at, mask, 0.0).to(tl.float32)
            value = slope * _gradient(of_z, value, slope, shift, silu) + x_factor * value + rest
            tl.store(dx + at, value.to(dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=RUNTIME)
def _column_sums(tables, result, n, channels, rows: tl.constexpr, width: tl.constexpr):
    """Computes the sums over the images of some channels of one table."""
    channel = tl.program_id(1) * width + tl.arange(0, width)[None, :]
    table = tables + tl.program_id(0).to(tl.int64) * n * channels
    total = tl.zeros([rows, width], tl.float32)
    for first in range(0, n, rows):
        image = first + tl.arange(0, rows)[:, None]
        total += tl.load(table + image * channels + channel, image < n, 0.0)
    tl.store(result + tl.program_id(0) * channels + tl.program_id(1) * width + tl.arange(0, width), tl.sum(total, 0))
