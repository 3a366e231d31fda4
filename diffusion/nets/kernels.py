"""Calls the Triton kernels of the fused operations (`diffusion.nets.fused`), for images with channels last in memory.

A norm with its affine map and activation is act(A x + B), where A and B are numbers per image and channel. A kernel
reads and writes each element of its images once, except `add_products`. It computes tiles [pixels, channels], in
float32. Images x may be stored in two parts x1 and x2 that hold the first and the last channels.

Some kernels also change the resolution. Their tiles consist of the pixels of the smaller images. Each of these pixels
corresponds to `x_window` pixels of x and `z_window` pixels of the result z: 1 and 1 if the resolution stays the same, 4
and 1 if it is halved, 1 and 4 if it is doubled.

A sum over an image is the sum, in a fixed order, of the sums over pieces of its pixels. The number of pieces depends on
the sizes of the images alone, and not on the device, so that equal inputs give equal bits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from diffusion.nets import triton_kernels
from diffusion.nets.plain import EPSILON

MAX_TILE_CHANNELS = 128  # channels of a tile
TILE = 4096  # elements of a tile
SUM_TILE = 2048  # elements of a tile of `sums`
PRODUCT_TILE, DEPTH_BYTES = 8192, 128  # elements of a tile of a product; bytes of the input channels of one `tl.dot`
# Pixels of one program: the largest power of two between these limits with which at least SUM_PROGRAMS (sums) or
# POINTWISE_PROGRAMS (other kernels) programs run.
MAX_PIXELS, MIN_PIXELS = 1024, 64
SUM_PROGRAMS, POINTWISE_PROGRAMS = 1024, 4096
# Largest images that `norm_once` holds in registers, channels of one of its programs, and elements per warp.
ONCE_PIXELS, ONCE_CHANNELS, ONCE_ELEMENTS = 1024, 32, 2048
# Numbers of warps, measured on an H200.
FEW_WARPS, MANY_WARPS = 4, 8

Moved = Sequence[tuple[Tensor | None, float]]


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
    tile_channels: int
    """Channels of a tile."""
    tile_pixels: int
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
        """Returns the numbers of programs, for a number of programs per image and `tile_channels` channels."""
        return self.n * per_image, self.channels // self.tile_channels

    def new_sums(self, like: Tensor) -> Tensor:
        return like.new_empty(self.n, self.pieces, 2, self.channels, dtype=torch.float32)


def _tiling(x: Tensor, other: Tensor | None = None, resample: str = "", tile: int | None = None) -> _Tiling:
    """Returns the tiling of images x [N, C, H, W], to whose channels those of `other` are appended."""
    n, first, height, image_width = x.shape
    channels = first + (0 if other is None else other.shape[1])
    if resample == "halved":
        height, image_width = height // 2, image_width // 2
    # The largest power of two that divides both numbers of channels, so that each tile is in one of the two parts.
    tile_channels = min(first & -first, channels & -channels, MAX_TILE_CHANNELS)
    windows = {"": (1, 1), "halved": (4, 1), "doubled": (1, 4)}[resample]
    tile = tile or TILE
    return _Tiling(n, channels, height, image_width, *windows, tile_channels, tile // tile_channels)


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
        triton_kernels.sums, by.grid(by.pieces), [(x, 1)], [(result, 1)],
        x, result, by.pixels, by.channels, by.piece, by.pieces, by.tile_pixels, by.tile_channels, num_warps=FEW_WARPS,
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
        triton_kernels.add, by.grid(by.pieces), [(x, 1), (h, 1)], [(y, 1), (result, 1)],
        x, h, y, result, by.pixels, by.image_width, by.channels, by.piece, by.pieces, by.z_window, by.tile_pixels,
        by.tile_channels, num_warps=FEW_WARPS,
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
    depth = min(channels & -channels for channels in (x1.shape[1], x2.shape[1], DEPTH_BYTES // h.element_size()))
    blocks, tiles = (
        by.channels // by.tile_channels,
        by.n * by.pieces * triton.cdiv(min(by.piece, by.pixels), by.tile_pixels),
    )
    moved = [(x, blocks) for x in parts] + [(weight, tiles) for weight in weights]
    launch(
        triton_kernels.add_products, by.grid(by.pieces), [(h, 1), *moved], [(y, 1), (result, 1)],
        h, x1, x2, w1, w2, y, result, by.pixels, by.channels, x1.shape[1], second, w1.stride(0), w2.stride(0),
        by.piece, by.pieces, depth, by.tile_pixels, by.tile_channels, num_warps=FEW_WARPS,
    )  # fmt: skip
    return y, result


def sum_2x2(g: Tensor) -> Tensor:
    """Returns the sum of each block of 2x2 pixels: [N, C, H, W] -> [N, C, H / 2, W / 2]."""
    by = _tiling(g, resample="halved")
    result = _new_images(g, by.channels, by.height, by.image_width)
    launch(
        triton_kernels.sum_2x2, by.grid(by.spans), [(g, 1)], [(result, 1)],
        g, result, by.pixels, by.image_width, by.channels, by.span, by.tile_pixels, by.tile_channels,
        num_warps=FEW_WARPS,
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
        """Returns the tensors of channels, and how often a kernel reads them if it computes n images one by one."""
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
        triton_kernels.statistics, (n * groups,), [(sums1, 1), (sums2, 1), (tables.time, 1), *tables.loads(n)],
        [(a, 1), (b, 1), (total, 1), (mean, 1), (rstd, 1)],
        sums1, second, *tables.arguments(), a, b, total, mean, rstd, pixels, sums1.shape[1], second.shape[1], group,
        EPSILON, tables.time is not None, _padded(group), num_warps=1,
    )  # fmt: skip
    return Statistics(a, b, total, mean, rstd)


def fits_norm_once(x: Tensor, groups: int) -> bool:
    """Returns whether `norm_once` can compute a norm of images x [N, C, H, W]."""
    return x[0, 0].numel() <= ONCE_PIXELS and _channels_of_program(x.shape[1] // groups) > 0


def _channels_of_program(group: int) -> int:
    """Returns how many channels a program of `norm_once` computes: whole groups, and a multiple of 8 for fast loads."""
    return ONCE_CHANNELS // math.lcm(group, 8) * math.lcm(group, 8)


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
    used, tile_pixels = _channels_of_program(group), triton.next_power_of_2(pixels)
    warps = max(1, tile_pixels * ONCE_CHANNELS // ONCE_ELEMENTS)
    blocks = triton.cdiv(channels, used)
    launch(
        triton_kernels.norm_once, (n * blocks,), [(x, 1), (tables.time, 1), *tables.loads(n)],
        [(z, 1), (a, 1), (b, 1), (total, 1), (mean, 1), (rstd, 1)],
        x, *tables.arguments(), z, a, b, total, mean, rstd, pixels, group, used // 8, blocks, EPSILON, silu,
        tables.time is not None, tile_pixels, ONCE_CHANNELS, num_warps=warps,
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
        triton_kernels.affine, by.grid(by.spans), [(x1, 1), (x2, 1), (a, by.spans), (b, by.spans)], [(z, 1), (skip, 1)],
        x1, x1 if x2 is None else x2, z, z if skip is None else skip, a, b, x1.shape[1], by.channels, by.pixels,
        by.image_width, by.span, silu, by.x_window, by.z_window, by.tile_pixels, by.tile_channels, num_warps=FEW_WARPS,
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
        triton_kernels.sums_backward, by.grid(by.pieces),
        [(x1, 1), (x2, 1), (g, 1), (a, by.pieces), (b, by.pieces)], [(result, 1)],
        x1, x1 if x2 is None else x2, g, a, b, result, x1.shape[1], by.channels, by.pixels, by.image_width, by.piece,
        by.pieces, silu, by.x_window, by.z_window, by.tile_pixels, by.tile_channels, num_warps=FEW_WARPS,
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
        triton_kernels.statistics_backward, (n * groups,),
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
        triton_kernels.affine_backward, by.grid(by.spans),
        [(x1, 1), (x2, 1), (g, 1), (skip1, 1), (skip2, 1), *((table, by.spans) for table in (a, b, p, q))],
        [(d1, 1), (d2, 1)],
        x1, x1 if x2 is None else x2, g, x1 if skip1 is None else skip1, x1 if skip2 is None else skip2,
        d1, d1 if d2 is None else d2, a, b, p, q, x1.shape[1], by.channels, by.pixels, by.image_width, by.span,
        silu, skip1 is not None, by.x_window, by.z_window, by.tile_pixels, by.tile_channels, num_warps=MANY_WARPS,
    )  # fmt: skip
    return d1, d2


def column_sums(tables: Tensor) -> Tensor:
    """Returns the sums over the images of tables float32 [K, N, C]: float32 [K, C]."""
    k, n, channels = tables.shape
    result = tables.new_empty(k, channels)
    tile_channels = min(channels & -channels, 32)
    launch(
        triton_kernels.column_sums, (k, channels // tile_channels), [(tables, 1)], [(result, 1)],
        tables, result, n, channels, 32, tile_channels, num_warps=FEW_WARPS,
    )  # fmt: skip
    return result
