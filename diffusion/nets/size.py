"""Computes the size of a U-Net from its settings, without building the net and without importing torch."""

from collections.abc import Iterator
from typing import NamedTuple

from diffusion.config import Model
from diffusion.errors import InputError

MAX_BYTES = 300 * 10**9  # memory of the largest GPUs
NUMBER_BYTES = 4
NUMBERS_PER_PARAMETER = 4  # weights, their moving average, and the two moments of AdamW


class Size(NamedTuple):
    """Size of a U-Net: number of parameters, multiply-adds per image and activations per image.

    The multiply-adds are counted in the forward pass. The activations are kept for the backward pass.
    """

    parameters: int
    multiply_adds: int
    activations: int


def unet_size(model: Model, image_size: int) -> Size:
    """Returns the size of the `diffusion.nets.unet.UNet` that `model` describes, as the sum over its layers."""
    return Size(*map(sum, zip(*_layers(model, image_size), strict=True)))


def check_net_size(model: Model, image_size: int) -> None:
    """Checks that the memory of the largest GPUs is sufficient to train a net with one image at a time.

    Raises:
        InputError: if the net needs more memory.
    """
    size = unet_size(model, image_size)
    memory = NUMBER_BYTES * (NUMBERS_PER_PARAMETER * size.parameters + size.activations)
    if memory > MAX_BYTES:
        raise InputError(
            f"a net of {size.parameters:,} parameters needs {memory / 1e9:,.0f} GB, but no GPU has more than "
            f"{MAX_BYTES / 1e9:.0f} GB: lower channels, channel_mult, res_blocks or image_size"
        )


def _layers(model: Model, image_size: int) -> Iterator[Size]:
    embedding = 4 * model.channels
    widths = [model.channels * multiplier for multiplier in model.channel_mult]
    last = len(widths) - 1

    def dense(c_in: int, c_out: int, pixels: int = 1, kernel: int = 1) -> Size:
        return Size(c_out * (kernel * c_in + 1), kernel * c_in * c_out * pixels, c_out * pixels)

    def norm(width: int, pixels: int) -> Size:
        # Its input is the output of the previous layer, which is counted there.
        return Size(2 * width, 0, width * pixels)

    def residual(c_in: int, c_out: int, pixels: int) -> Iterator[Size]:
        yield norm(c_in, pixels)
        yield dense(c_in, c_out, pixels, 9)
        yield dense(embedding, (1 + model.scale_shift_norm) * c_out)
        yield norm(c_out, pixels)
        yield dense(c_out, c_out, pixels, 9)
        if c_in != c_out:
            yield dense(c_in, c_out, pixels)

    def attention(width: int, pixels: int) -> Iterator[Size]:
        yield norm(width, pixels)
        yield dense(width, 3 * width, pixels)
        yield Size(0, 2 * width * pixels**2, width * pixels)
        yield dense(width, width, pixels)

    def blocks(c_in: int, c_out: int, size: int) -> Iterator[Size]:
        yield from residual(c_in, c_out, size**2)
        if size in model.attention_resolutions:
            yield from attention(c_out, size**2)

    def resample(width: int, size: int) -> Iterator[Size]:
        if model.resblock_updown:
            yield from residual(width, width, size**2)
        else:
            yield dense(width, width, size**2, 9)

    yield dense(model.channels, embedding)
    yield dense(embedding, embedding)
    yield dense(3, widths[0], image_size**2, 9)
    width, size, skips = widths[0], image_size, [widths[0]]
    for level, target in enumerate(widths):
        for _ in range(model.res_blocks):
            yield from blocks(width, target, size)
            width = target
            skips.append(width)
        if level < last:
            size //= 2
            yield from resample(width, size)
            skips.append(width)
    yield from residual(width, width, size**2)
    yield from attention(width, size**2)
    yield from residual(width, width, size**2)
    for level, target in reversed(list(enumerate(widths))):
        for block in range(model.res_blocks + 1):
            yield from blocks(width + skips.pop(), target, size)
            width = target
            if level and block == model.res_blocks:
                size *= 2
                yield from resample(width, size)
    yield norm(width, image_size**2)
    yield dense(width, 6 if model.learn_sigma else 3, image_size**2, 9)
