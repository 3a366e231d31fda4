"""The ADM U-Net (Dhariwal & Nichol 2021, arXiv 2105.05233), with the state dict keys of the published checkpoints."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion.config import GROUP_NORM_GROUPS
from diffusion.nets.norm import group_norm

Resample = Callable[[Tensor], Tensor]
Layer = TypeVar("Layer", bound=nn.Module)


class UNet(nn.Module):
    """U-Net that predicts the noise epsilon in a noisy image.

    If `learn_sigma`, the net also predicts v. The variance is computed from v (`diffusion.gaussian.p_mean_variance`).

    Args:
        image_size: height and width of the images, divisible by 2^(levels - 1).
        channels: number of channels that `channel_mult` multiplies.
        channel_mult: number of channels of each level, as a multiple of `channels`. Each product is a multiple of 32.
            Each level after the first has half the height and width of the previous level.
        res_blocks: number of residual blocks per level of the encoder. The decoder has one more block per level.
        attention_resolutions: heights in pixels of the levels at which self-attention follows each residual block.
        head_channels: number of channels per attention head.
        heads: number of attention heads in every attention block; replaces `head_channels`.
        scale_shift_norm: whether the timestep embedding scales and shifts the output of the second norm of each
            residual block. If false, the embedding is added to the input of this norm.
        resblock_updown: whether residual blocks change the resolution. If false, convolutions change the resolution.
        learn_sigma: whether the output has 6 channels, epsilon and then v. If false, the output has 3 channels.
        dropout: dropout probability before the last convolution of each residual block.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        channel_mult: Sequence[int],
        res_blocks: int,
        attention_resolutions: Sequence[int],
        head_channels: int = 64,
        heads: int | None = None,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        learn_sigma: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.channels = channels
        embedding = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def residual(c_in: int, c_out: int, resample: Resample | None = None) -> ResBlock:
            return ResBlock(c_in, c_out, embedding, dropout, scale_shift_norm, resample)

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, heads or width // head_channels)

        def attention_at(size: int, width: int) -> list[nn.Module]:
            return [attention(width)] if size in attention_resolutions else []

        def down(width: int) -> nn.Module:
            return residual(width, width, halved) if resblock_updown else Downsample(width)

        def up(width: int) -> nn.Module:
            return residual(width, width, doubled) if resblock_updown else Upsample(width)

        widths = [channels * multiplier for multiplier in channel_mult]
        last = len(widths) - 1
        size, width = image_size, widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(3, width, 3, padding=1))])
        skips = [width]
        for level, target in enumerate(widths):
            for _ in range(res_blocks):
                self.input_blocks.append(Stage(residual(width, target), *attention_at(size, target)))
                width = target
                skips.append(width)
            if level < last:
                self.input_blocks.append(Stage(down(width)))
                skips.append(width)
                size //= 2

        self.middle_block = Stage(residual(width, width), attention(width), residual(width, width))

        self.output_blocks = nn.ModuleList()
        for level, target in reversed(list(enumerate(widths))):
            for block in range(res_blocks + 1):
                stage = [residual(width + skips.pop(), target), *attention_at(size, target)]
                width = target
                if level and block == res_blocks:
                    stage.append(up(width))
                    size *= 2
                self.output_blocks.append(Stage(*stage))

        self.out = nn.Sequential(
            Norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, 6 if learn_sigma else 3, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns epsilon and then v, [B, 6, H, W], or only epsilon, [B, 3, H, W].

        Args:
            x: noisy images x_t, [B, 3, H, W].
            t: timesteps of the images, in 0..T-1, int64 [B].
        """
        embedding = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        norm, _, convolution = self.out
        return convolution(norm(x, silu=True))


class Norm(nn.GroupNorm):
    """Group norm with 32 groups, fused with SiLU and with the scale and shift of the timestep embedding."""

    def __init__(self, channels: int):
        super().__init__(GROUP_NORM_GROUPS, channels)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False
    ) -> Tensor:
        """Returns norm(x) (1 + scale) + shift, [B, C, H, W], or SiLU of this result.

        Args:
            x: images [B, C, H, W].
            scale: scale of each channel, [B, C], or None for 0.
            shift: shift of each channel, [B, C], or None for 0. Scale and shift must both be given or both be None.
            silu: whether SiLU is applied to the result.
        """
        gain, offset = self.weight[None], self.bias[None]
        if scale is not None and shift is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return group_norm(x, gain, offset, self.num_groups, silu)


class Stage(nn.Sequential):
    """Sequence of blocks. Only the residual blocks of the sequence receive the timestep embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the output [B, C', H', W'] of the last block, for x [B, C, H, W] and the timestep embedding [B, E].

        C', H' and W' depend on the blocks. E is the size of the timestep embedding.
        """
        for block in self:
            x = block(x, embedding) if isinstance(block, ResBlock) else block(x)
        return x


class ResBlock(nn.Module):
    """Residual block with two convolutions. Each convolution follows a norm and SiLU.

    The timestep embedding enters at the second norm.

    Args:
        c_in: number of channels of the input.
        c_out: number of channels of the output.
        embedding: size E of the timestep embedding.
        dropout: dropout probability before the second convolution.
        scale_shift_norm: see `UNet`.
        resample: function that changes the resolution before the first convolution and in the skip connection. None:
            the resolution stays the same.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        dropout: float,
        scale_shift_norm: bool,
        resample: Resample | None,
    ):
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(Norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + scale_shift_norm) * c_out))
        self.out_layers = nn.Sequential(
            Norm(c_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(c_out, c_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Returns the output [B, c_out, H', W'] for x [B, c_in, H, W] and the timestep embedding [B, E].

        H' and W' are H and W, changed by `resample`.
        """
        # The SiLU modules next to the norms only keep the state dict keys: Norm applies SiLU itself.
        norm, _, convolution = self.in_layers
        h = convolution(self.resample(norm(x, silu=True)))
        time = self.emb_layers(embedding)
        norm, _, dropout, convolution = self.out_layers
        if self.scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = norm(h, scale, shift, silu=True)
        else:
            h = norm(h + time[:, :, None, None], silu=True)
        return self.skip_connection(self.resample(x)) + convolution(dropout(h))


class AttentionBlock(nn.Module):
    """Self-attention over pixels with a skip connection.

    The output channels of `qkv` have the order of the published checkpoints: first by head, and within a head q, k, v.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output [B, C, H, W] for x [B, C, H, W]."""
        batch, channels, height, width = x.shape
        # With channels last, pixels are rows, and no operation copies memory for a transposition.
        rows = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        qkv = F.linear(rows, self.qkv.weight.squeeze(2), self.qkv.bias)
        q, k, v = qkv.unflatten(2, (self.heads, -1)).transpose(1, 2).chunk(3, dim=3)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + h.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output [B, C, H / 2, W / 2] for x [B, C, H, W]."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour interpolation, and then applies a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output [B, C, 2 H, 2 W] for x [B, C, H, W]."""
        return self.conv(F.interpolate(x, scale_factor=2))


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


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Returns the sinusoidal embedding of timesteps t [B], float32 [B, dim].

    Source: Vaswani et al. 2017, sec. 3.5. As in guided-diffusion, all cosines come before all sines. The dim / 2
    frequencies decrease geometrically from 1 towards 1 / 10,000. `dim` must be even.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(module: Layer) -> Layer:
    """Sets all parameters of a module to zero, and returns the module.

    If this module is the last layer of a residual block, the untrained block returns its skip connection unchanged.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
