"""The diffusion transformer DiT (Peebles & Xie 2023, arXiv 2212.09748), with the state dict keys of its published code.

The published nets are conditional on classes. Their state dict has one key in addition, the embedding of the classes
`y_embedder.embedding_table.weight`, which is added to the timestep embedding.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.nets import operations
from diffusion.nets.size import FREQUENCIES
from diffusion.nets.unet import timestep_embedding, zeroed


class DiT(nn.Module):
    """Transformer on the patches of a noisy image that predicts the noise epsilon in this image.

    If `learn_sigma` is true, the net also predicts v. The variance is computed from v
    (`diffusion.gaussian.p_mean_variance`).

    Args:
        image_size: height and width of the images, divisible by `patch`.
        patch: height and width of a patch in pixels. Each patch is one token.
        width: number of channels of a token, divisible by 4 and by `heads`.
        depth: number of blocks.
        heads: number of attention heads of a block.
        learn_sigma: whether the output has 6 channels, epsilon and then v. If false, the output has 3 channels.
    """

    computes_in_dtype_of_weights = True  # see `diffusion.devices.compute_copy`
    pos_embed: Tensor

    def __init__(self, *, image_size: int, patch: int, width: int, depth: int, heads: int, learn_sigma: bool = True):
        super().__init__()
        self.patch = patch
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.Sequential(OrderedDict(mlp=mlp))
        self.register_buffer("pos_embed", positions(image_size // patch, width)[None])
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])

        # The published initial weights. The untrained net returns 0, and each of its blocks returns its input.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.detach().flatten(1))  # a view
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for name, parameter in mlp.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        # Last, so that nets with and without a predicted variance draw equal weights elsewhere.
        self.final_layer = FinalLayer(width, patch**2 * (6 if learn_sigma else 3))
        for part in [*self.blocks, self.final_layer]:
            zeroed(part.get_submodule("adaLN_modulation"))
        zeroed(self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns epsilon and then v, [B, 6, H, W], or only epsilon, [B, 3, H, W], at least in float32.

        Args:
            x: noisy images x_t, [B, 3, H, W].
            t: timesteps of the images, in 0..T-1, int64 [B].
        """
        dtype = next(self.parameters()).dtype
        patches = operations.convolution(self.x_embedder[0], x.to(dtype)).with_bias()
        tokens = patches.flatten(2).transpose(1, 2) + self.pos_embed.to(dtype)
        time = self.t_embedder(timestep_embedding(t, FREQUENCIES).to(dtype))
        for block in self.blocks:
            tokens = block(tokens, time)
        pixels = self.final_layer(tokens, time).unflatten(2, (self.patch, self.patch, -1))
        pixels = pixels.unflatten(1, patches.shape[2:])  # [B, H / patch, W / patch, patch, patch, channels]
        output = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return output.to(torch.promote_types(dtype, torch.float32))


class Block(nn.Module):
    """Self-attention over tokens, and then two linear layers per token, each with a norm and a skip connection.

    The timestep embedding sets the scale and shift after both norms, and the factors (gates) of what is added to the
    tokens (adaLN-zero).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width))
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns the output [B, N, C] for tokens x [B, N, C] and the timestep embedding [B, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(time)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(norm(x, shift1, scale1))
        return x + gate2 * self.mlp(norm(x, shift2, scale2))


class Attention(nn.Module):
    """Self-attention over tokens. The output channels of `qkv` are all q, then all k, then all v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output [B, N, C] for tokens x [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Linear layer from tokens to the pixels of their patches, after a norm with scale and shift by the timestep."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns the output [B, N, F] for tokens x [B, N, C] and the timestep embedding [B, C]."""
        return self.linear(norm(x, *self.adaLN_modulation(time)[:, None].chunk(2, dim=2)))


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns the layer norm of tokens x [B, N, C], times 1 + scale, plus shift; both are [B, 1, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def positions(size: int, width: int) -> Tensor:
    """Returns the sine-cosine embedding of the positions in a grid of size x size tokens, float32 [size^2, width].

    The first half of the channels embeds the column, and the second half the row: sines and then cosines, with the
    frequencies of Vaswani et al. 2017. `width` must be divisible by 4.
    """
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line.expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()
