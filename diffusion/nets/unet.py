"""The ADM U-Net (Dhariwal & Nichol 2021, arXiv 2105.05233), with the state dict keys of the published checkpoints."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.config import GROUP_NORM_GROUPS
from diffusion.nets import operations
from diffusion.nets.activation import Activation

Layer = TypeVar("Layer", bound=nn.Module)


class UNet(nn.Module):
    """U-Net that predicts the noise epsilon in a noisy image.

    If `learn_sigma` is true, the net also predicts v. The variance is computed from v
    (`diffusion.gaussian.p_mean_variance`).

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

    computes_in_dtype_of_weights = True  # see `diffusion.devices.compute_copy`

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

        def residual(c_in: int, c_out: int, resample: str = "") -> ResBlock:
            return ResBlock(c_in, c_out, embedding, dropout, scale_shift_norm, resample)

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, heads or width // head_channels)

        def attention_at(size: int, width: int) -> list[nn.Module]:
            return [attention(width)] if size in attention_resolutions else []

        def down(width: int) -> nn.Module:
            return residual(width, width, "halved") if resblock_updown else Downsample(width)

        def up(width: int) -> nn.Module:
            return residual(width, width, "doubled") if resblock_updown else Upsample(width)

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
        """Returns epsilon and then v, [B, 6, H, W], or only epsilon, [B, 3, H, W], at least in float32.

        Args:
            x: noisy images x_t, [B, 3, H, W].
            t: timesteps of the images, in 0..T-1, int64 [B].
        """
        dtype = next(self.time_embed.parameters()).dtype
        embedding = self.time_embed(timestep_embedding(t, self.channels).to(dtype))
        # In the order in which the stages below use them, which is the order of `modules`.
        layers = [module.emb_layers for module in self.modules() if isinstance(module, ResBlock)]
        times = iter(operations.projections(layers, embedding))

        first, *stages = self.input_blocks  # the first stage has only a convolution
        h = operations.with_sums(operations.convolution(first.get_submodule("0"), x.to(dtype)))
        skips = [h]
        for stage in stages:
            h = stage(times, h)
            skips.append(h)
        h = self.middle_block(times, h)
        for stage in self.output_blocks:
            h = stage(times, h, skips.pop())
        norm, _, convolution = self.out
        z, _ = norm(h, silu=True)
        output = operations.convolution(convolution, z)
        wide = output.values.to(torch.promote_types(dtype, torch.float32))
        return output._replace(values=wide).with_bias()


class Norm(nn.GroupNorm):
    """Group norm with 32 groups, followed by the scale and shift by the timestep, SiLU and resampling if requested."""

    def __init__(self, channels: int):
        super().__init__(GROUP_NORM_GROUPS, channels)

    def forward(  # type: ignore[override]
        self, *parts: Activation, time: Tensor | None = None, silu: bool = False, resample: str = ""
    ) -> tuple[Tensor, tuple[Activation, ...]]:
        """Returns act(norm(x) (1 + scale) + shift), and x for a skip connection. See `diffusion.nets.operations.norm`.

        Args:
            parts: x in one or two parts, which have different channels of the same images [B, C, H, W].
            time: scale and then shift of each channel, [B, 2C]; None for 0.
            silu: whether act is SiLU. If false, act is the identity.
            resample: "halved", "doubled" or "": how both results change their resolution.
        """
        return operations.norm(self, parts, time, silu, resample)


class Stage(nn.Sequential):
    """Sequence of blocks. Only the residual blocks of the sequence receive timestep embeddings."""

    def forward(self, times: Iterator[Tensor], *x: Activation) -> Activation:
        """Returns the output [B, C', H', W'] of the last block. C', H' and W' depend on the blocks.

        Args:
            times: projections of the timestep embedding for this residual block and all later ones.
            x: input of the first block in one or two parts, which have different channels of images [B, C, H, W].
        """
        for block in self:
            x = (block(next(times), *x) if isinstance(block, ResBlock) else block(*x),)
        return x[0]


class ResBlock(nn.Module):
    """Residual block with two convolutions. Each convolution follows a norm and SiLU.

    The timestep embedding enters at the second norm.

    Args:
        c_in: number of channels of the input.
        c_out: number of channels of the output.
        embedding: size E of the timestep embedding.
        dropout: dropout probability before the second convolution.
        scale_shift_norm: see `UNet`.
        resample: "halved" or "doubled": how the resolution changes before the first convolution and in the skip
            connection. "": the resolution stays the same.
    """

    def __init__(
        self, c_in: int, c_out: int, embedding: int, dropout: float, scale_shift_norm: bool, resample: str = ""
    ):
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample = resample
        self.in_layers = nn.Sequential(Norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + scale_shift_norm) * c_out))
        self.out_layers = nn.Sequential(
            Norm(c_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(c_out, c_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, time: Tensor, *x: Activation) -> Activation:
        """Returns the output [B, c_out, H', W']. H' and W' are H and W, changed by `resample`.

        Args:
            time: projection of the timestep embedding by `emb_layers`, [B, F].
            x: input in one or two parts, which have different channels of images [B, c_in, H, W].
        """
        # The SiLU modules are not called: they keep the numbers in the state dict keys.
        norm, _, convolution = self.in_layers
        z, x = norm(*x, silu=True, resample=self.resample)
        h = operations.convolution(convolution, z)
        norm, _, dropout, convolution = self.out_layers
        if self.scale_shift_norm:
            z, _ = norm(h, time=time, silu=True)
        else:
            z, _ = norm(h.plus(time), silu=True)
        h = operations.convolution(convolution, dropout(z))
        return operations.residual(self.skip_connection, x, h)


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

    def forward(self, x: Activation) -> Activation:
        """Returns the output [B, C, H, W] for x [B, C, H, W]."""
        batch, channels, height, width = x.values.shape
        z, skip = self.norm(x)
        # With channels last, pixels are rows, and no operation copies memory for a transposition.
        rows = z.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        bias = self.qkv.bias.to(rows.dtype)  # type: ignore[union-attr]
        qkv = F.linear(rows, self.qkv.weight.squeeze(2), bias)
        q, k, v = qkv.unflatten(2, (self.heads, -1)).transpose(1, 2).chunk(3, dim=3)
        rows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        bias, later = operations.split_bias(self.proj_out)
        rows = F.linear(rows, self.proj_out.weight.squeeze(2), bias)
        h = Activation(rows.unflatten(1, (height, width)).permute(0, 3, 1, 2), later)
        return operations.residual(nn.Identity(), skip, h)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Activation) -> Activation:
        """Returns the output [B, C, H / 2, W / 2] for x [B, C, H, W]."""
        return operations.with_sums(operations.convolution(self.op, x.with_bias()))


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour interpolation, and then applies a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Activation) -> Activation:
        """Returns the output [B, C, 2 H, 2 W] for x [B, C, H, W]."""
        return operations.convolution(self.conv, F.interpolate(x.with_bias(), scale_factor=2))


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
