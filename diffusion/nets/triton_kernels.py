"""Triton kernels for images with channels last in memory. `diffusion.nets.kernels` explains their terms."""

import triton
import triton.language as tl

# Triton compiles no variant of a kernel for special values of these arguments.
NOT_SPECIALIZED = [
    "pixels",
    "image_width",
    "span",
    "pieces",
    "pieces1",
    "pieces2",
    "piece",
    "group",
    "eighth",
    "blocks",
    "n",
]


@triton.jit
def _part(x1, x2, n, pixels, split, channels, first):
    """Returns the address of channel `first` of image n, in x1 or in x2, and the number of channels of this part."""
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
def _store_sums(piece_sums, channels, channel, first, second):
    """Adds up two tiles [pixels, channels] over their pixels, and stores both results."""
    here = piece_sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(here, tl.sum(first, 0))
    tl.store(here + channels, tl.sum(second, 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sums(x, piece_sums, pixels, channels, piece, pieces, tile_pixels: tl.constexpr, tile_channels: tl.constexpr):
    """Computes the sums of x and of x^2 for each channel of a tile over one piece of the pixels."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    end = tl.minimum(first + piece, pixels)
    total = tl.zeros([tile_pixels, tile_channels], tl.float32)
    square = tl.zeros([tile_pixels, tile_channels], tl.float32)
    for start in range(first, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
        at = n * pixels * channels + row[:, None] * channels + channel[None, :]
        value = tl.load(x + at, (row < end)[:, None], 0.0).to(tl.float32)
        total += value
        square += value * value
    _store_sums(piece_sums, channels, channel, total, square)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def add(
    x, h, y, piece_sums, pixels, image_width, channels, piece, pieces,
    window: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Computes y = x + h, and the sums of y and y^2, for one piece of the pixels of x."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    end = tl.minimum(first + piece, pixels)
    total = tl.zeros([tile_pixels, tile_channels], tl.float32)
    square = tl.zeros([tile_pixels, tile_channels], tl.float32)
    for start in range(first, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
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
    _store_sums(piece_sums, channels, channel, total, square)


@triton.jit
def _product(x, weight, total, row, mask, pixels, n, channel, channels, stride, depth: tl.constexpr):
    """Adds the product of some pixels of x with the transposed weight, for some channels of the result."""
    for first in range(0, channels, depth):
        inside = first + tl.arange(0, depth)
        pixel = tl.load(x + n * pixels * channels + row[:, None] * channels + inside[None, :], mask, 0.0)
        matrix = tl.load(weight + channel[None, :] * stride + inside[:, None])
        total = tl.dot(pixel, matrix, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def add_products(
    h, x1, x2, weight1, weight2, y, piece_sums, pixels, channels, channels1, channels2, stride1, stride2, piece, pieces,
    depth: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Computes y = h + x1 weight1^T + x2 weight2^T, and the sums of y and y^2, for one piece of the pixels."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    end = tl.minimum(first + piece, pixels)
    sum_of_values = tl.zeros([1, tile_channels], tl.float32)
    square = tl.zeros([1, tile_channels], tl.float32)
    for start in range(first, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
        mask = (row < end)[:, None]
        value = tl.zeros([tile_pixels, tile_channels], tl.float32)
        value = _product(x1, weight1, value, row, mask, pixels, n, channel, channels1, stride1, depth)
        value = _product(x2, weight2, value, row, mask, pixels, n, channel, channels2, stride2, depth)
        at = n * pixels * channels + row[:, None] * channels + channel[None, :]
        value = (value + tl.load(h + at, mask, 0.0).to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + at, value, mask)
        value = tl.where(mask, value.to(tl.float32), 0.0)
        sum_of_values += tl.sum(value, 0)[None, :]
        square += tl.sum(value * value, 0)[None, :]
    _store_sums(piece_sums, channels, channel, sum_of_values, square)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sum_2x2(g, y, pixels, image_width, channels, span, tile_pixels: tl.constexpr, tile_channels: tl.constexpr):
    """Computes the sums of 2x2 pixels for some tiles."""
    spans = tl.cdiv(pixels, span)
    first_row = tl.program_id(0) % spans * span
    end = tl.minimum(first_row + span, pixels)
    n = (tl.program_id(0) // spans).to(tl.int64)
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    for start in range(first_row, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
        mask = (row < end)[:, None]
        total = tl.zeros([tile_pixels, tile_channels], tl.float32)
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def statistics(
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_once(
    x, bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride,
    z, a, b, total, mean, rstd, pixels, group, eighth, blocks, epsilon,
    silu: tl.constexpr, has_time: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Computes act(A x + B), A, B and the statistics of x + bias, for some whole groups of channels of one image."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.arange(0, tile_channels)
    used = eighth * 8  # a multiple of 8, which the compiler needs to know
    channel = tl.program_id(0) % blocks * used + inside
    exists = (inside < used) & (channel < channels)
    row = tl.arange(0, tile_pixels)[:, None]
    mask = (row < pixels) & exists[None, :]
    at = n * pixels * channels + row * channels + channel[None, :]
    bias, gain, shift, scale = _affine_tables(
        bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride, n, channel, exists, has_time
    )
    value = tl.load(x + at, mask, 0.0).to(tl.float32) + bias[None, :]
    piece_sums = tl.sum(tl.where(mask, value, 0.0), 0)
    average = _over_groups(piece_sums, inside, group) / (pixels * group)
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
    tl.store(total + n * channels + channel, piece_sums, exists)
    first = exists & (inside % group == 0)
    tl.store(mean + n * (channels // group) + channel // group, average, first)
    tl.store(rstd + n * (channels // group) + channel // group, inverse, first)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def affine(
    x1, x2, z, skip, a, b, split, channels, pixels, image_width, span, silu: tl.constexpr,
    x_window: tl.constexpr, z_window: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Computes act(A x + B) for some tiles, and the means of 2x2 pixels of x if `x_window` is 4."""
    spans = tl.cdiv(pixels, span)
    first_row = tl.program_id(0) % spans * span
    end = tl.minimum(first_row + span, pixels)
    n = (tl.program_id(0) // spans).to(tl.int64)
    inside = tl.arange(0, tile_channels)[None, :]
    channel = tl.program_id(1) * tile_channels + inside
    x, stride = _part(x1, x2, n, pixels * x_window, split, channels, tl.program_id(1) * tile_channels)
    slope = tl.load(a + n * channels + channel)
    shift = tl.load(b + n * channels + channel)
    for start in range(first_row, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
        mask = (row < end)[:, None]
        result = tl.zeros([tile_pixels, tile_channels], tl.float32)
        mean = tl.zeros([tile_pixels, tile_channels], tl.float32)
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
    x_window: tl.constexpr, z_window: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Returns the gradient of act(A x + B) at a pixel of x, from the gradients of the pixels of the result."""
    total = tl.zeros([tile_pixels, tile_channels], tl.float32)
    for k in tl.static_range(z_window):
        at = _at(row, k, image_width, z_window)[:, None] * channels + channel
        total += tl.load(g + n * pixels * z_window * channels + at, mask, 0.0).to(tl.float32)
    return total / x_window


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sums_backward(
    x1, x2, g, a, b, piece_sums, split, channels, pixels, image_width, piece, pieces, silu: tl.constexpr,
    x_window: tl.constexpr, z_window: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Computes the sums of g' and of g' x for each channel of a tile over one piece of the pixels."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * piece
    end = tl.minimum(first + piece, pixels)
    inside = tl.arange(0, tile_channels)
    channel = tl.program_id(1) * tile_channels + inside
    x, stride = _part(x1, x2, n, pixels * x_window, split, channels, tl.program_id(1) * tile_channels)
    slope = tl.load(a + n * channels + channel)[None, :]
    shift = tl.load(b + n * channels + channel)[None, :]
    total = tl.zeros([tile_pixels, tile_channels], tl.float32)
    product = tl.zeros([tile_pixels, tile_channels], tl.float32)
    for start in range(first, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
        mask = (row < end)[:, None]
        of_z = _gradient_of_pixel(
            g,
            n,
            row,
            channel[None, :],
            channels,
            pixels,
            image_width,
            mask,
            x_window,
            z_window,
            tile_pixels,
            tile_channels,
        )
        for k in tl.static_range(x_window):
            pixel = _at(row, k, image_width, x_window)
            value = tl.load(x + pixel[:, None] * stride + inside[None, :], mask, 0.0).to(tl.float32)
            gradient = _gradient(of_z, value, slope, shift, silu)
            total += gradient
            product += gradient * value
    _store_sums(piece_sums, channels, channel, total, product)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def statistics_backward(
    piece_sums, total, mean, rstd, bias1, bias2, weight, offset, time, split, channels, bias_stride, time_stride,
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
        at = piece_sums + (image * pieces + index) * 2 * channels + channel
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def affine_backward(
    x1, x2, g, skip1, skip2, d1, d2, a, b, p, q, split, channels, pixels, image_width, span,
    silu: tl.constexpr, has_skip: tl.constexpr,
    x_window: tl.constexpr, z_window: tl.constexpr, tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Computes A g' + P x + Q plus the gradient from the skip connection, for some tiles."""
    spans = tl.cdiv(pixels, span)
    first_row = tl.program_id(0) % spans * span
    end = tl.minimum(first_row + span, pixels)
    n = (tl.program_id(0) // spans).to(tl.int64)
    inside = tl.arange(0, tile_channels)[None, :]
    first = tl.program_id(1) * tile_channels
    channel = first + inside
    x, stride = _part(x1, x2, n, pixels * x_window, split, channels, first)
    dx, stride = _part(d1, d2, n, pixels * x_window, split, channels, first)
    skip, stride = _part(skip1, skip2, n, pixels, split, channels, first)
    slope = tl.load(a + n * channels + channel)
    shift = tl.load(b + n * channels + channel)
    x_factor = tl.load(p + n * channels + channel)
    constant = tl.load(q + n * channels + channel)
    for start in range(first_row, end, tile_pixels):
        row = start + tl.arange(0, tile_pixels)
        mask = (row < end)[:, None]
        of_z = _gradient_of_pixel(
            g, n, row, channel, channels, pixels, image_width, mask, x_window, z_window, tile_pixels, tile_channels
        )
        rest = constant + tl.zeros([tile_pixels, tile_channels], tl.float32)
        if has_skip:
            rest += tl.load(skip + row[:, None] * stride + inside, mask, 0.0).to(tl.float32) / x_window
        for k in tl.static_range(x_window):
            at = _at(row, k, image_width, x_window)[:, None] * stride + inside
            value = tl.load(x + at, mask, 0.0).to(tl.float32)
            value = slope * _gradient(of_z, value, slope, shift, silu) + x_factor * value + rest
            tl.store(dx + at, value.to(dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def column_sums(tables, result, n, channels, tile_pixels: tl.constexpr, tile_channels: tl.constexpr):
    """Computes the sums over the images of some channels of one table."""
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)[None, :]
    table = tables + tl.program_id(0).to(tl.int64) * n * channels
    total = tl.zeros([tile_pixels, tile_channels], tl.float32)
    for first in range(0, n, tile_pixels):
        image = first + tl.arange(0, tile_pixels)[:, None]
        total += tl.load(table + image * channels + channel, image < n, 0.0)
    tl.store(
        result + tl.program_id(0) * channels + tl.program_id(1) * tile_channels + tl.arange(0, tile_channels),
        tl.sum(total, 0),
    )
