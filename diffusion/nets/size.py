"""Computes the size of a U-Net or DiT from its settings, without building the net and without importing torch."""

from collections.abc import Iterator
from typing import NamedTuple

from diffusion.config import DiT, Model

FREQUENCIES = 256  # size of the sinusoidal embedding of timesteps of a DiT


class Size(NamedTuple):
    """Size of a net: number of parameters, multiply-adds per image and activations per image.

    The multiply-adds are counted in the forward pass. The activations are kept for the backward pass.
    """

    parameters: int
    multiply_adds: int
    activations: int


def unet_size(model: Model, image_size: int) -> Size:
    """Returns the size of the `diffusion.nets.unet.UNet` that `model` describes, as the sum over its layers."""
    return Size(*map(sum, zip(*_unet_layers(model, image_size), strict=True)))


def dit_size(model: DiT, image_size: int) -> Size:
    """Returns the size of the `diffusion.nets.dit.DiT` that `model` describes, as the sum over its layers."""
    return Size(*map(sum, zip(*_dit_layers(model, image_size), strict=True)))


def _dense(c_in: int, c_out: int, pixels: int = 1, kernel: int = 1) -> Size:
    """Returns the size of a linear or convolutional layer, where `kernel` is the number of pixels of the kernel."""
    return Size(c_out * (kernel * c_in + 1), kernel * c_in * c_out * pixels, c_out * pixels)


def _attention(width: int, pixels: int) -> Iterator[Size]:
    """Yields the sizes of the layers of self-attention without its norm."""
    yield _dense(width, 3 * width, pixels)
    yield Size(0, 2 * width * pixels**2, width * pixels)
    yield _dense(width, width, pixels)


def _unet_layers(model: Model, image_size: int) -> Iterator[Size]:
    embedding = 4 * model.channels
    widths = [model.channels * multiplier for multiplier in model.channel_mult]
    last = len(widths) - 1

    def norm(width: int, pixels: int) -> Size:
        # Its input is the output of the previous layer, which is counted there.
        return Size(2 * width, 0, width * pixels)

    def residual(c_in: int, c_out: int, pixels: int) -> Iterator[Size]:
        yield norm(c_in, pixels)
        yield _dense(c_in, c_out, pixels, 9)
        yield _dense(embedding, (1 + model.scale_shift_norm) * c_out)
        yield norm(c_out, pixels)
        yield _dense(c_out, c_out, pixels, 9)
        if c_in != c_out:
            yield _dense(c_in, c_out, pixels)

    def attention(width: int, pixels: int) -> Iterator[Size]:
        yield norm(width, pixels)
        yield from _attention(width, pixels)

    def blocks(c_in: int, c_out: int, size: int) -> Iterator[Size]:
        yield from residual(c_in, c_out, size**2)
        if size in model.attention_resolutions:
            yield from attention(c_out, size**2)

    def resample(width: int, size: int) -> Iterator[Size]:
        if model.resblock_updown:
            yield from residual(width, width, size**2)
        else:
            yield _dense(width, width, size**2, 9)

    yield _dense(model.channels, embedding)
    yield _dense(embedding, embedding)
    yield _dense(3, widths[0], image_size**2, 9)
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
    yield _dense(width, 6 if model.learn_sigma else 3, image_size**2, 9)


def _dit_layers(model: DiT, image_size: int) -> Iterator[Size]:
    width, tokens = model.width, (image_size // model.patch) ** 2

    def activations(count: int) -> Size:
        return Size(0, 0, count * width * tokens)

    yield _dense(3, width, tokens, model.patch**2)
    yield activations(1)  # with positions
    yield _dense(FREQUENCIES, width)
    yield _dense(width, width)
    for _ in range(model.depth):
        yield _dense(width, 6 * width)
        yield from _attention(width, tokens)
        yield _dense(width, 4 * width, tokens)
        yield activations(4)  # of the activation function
        yield _dense(4 * width, width, tokens)
        yield activations(6)  # two norms, before and after scale and shift, and two sums
    yield _dense(width, 2 * width)
    yield activations(2)
    yield _dense(width, model.patch**2 * (6 if model.learn_sigma else 3), tokens)
