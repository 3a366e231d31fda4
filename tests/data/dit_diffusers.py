"""Writes dit_diffusers.npz: outputs of `DiTTransformer2DModel` of diffusers, with which tests/test_dit.py compares.

`python tests/data/dit_diffusers.py` needs `pip install diffusers`. The weights are not stored: `det` makes each from
its name in the published code of DiT.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_golden import det

# Names in the published code -> names in diffusers; {n} is the number of a block.
NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.{n}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{n}.norm1.emb.timestep_embedder.linear_2",
    "blocks.{n}.adaLN_modulation.1": "transformer_blocks.{n}.norm1.linear",
    "blocks.{n}.attn.proj": "transformer_blocks.{n}.attn1.to_out.0",
    "blocks.{n}.mlp.fc1": "transformer_blocks.{n}.ff.net.0.proj",
    "blocks.{n}.mlp.fc2": "transformer_blocks.{n}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DEPTH, WIDTH, HEADS, PATCH, SIZE = 2, 48, 3, 2, 12


def reference(out_channels: int) -> Tensor:
    net = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=3, out_channels=out_channels,
        num_layers=DEPTH, sample_size=SIZE, patch_size=PATCH, norm_eps=1e-6, num_embeds_ada_norm=1,
    ).eval()  # fmt: skip
    weights = net.state_dict()
    for n in range(DEPTH):
        for ours, theirs in NAMES.items():
            for kind in ("weight", "bias"):
                key = f"{theirs}.{kind}".format(n=n)
                weights[key] = det(f"{ours}.{kind}".format(n=n), weights[key].shape, 0.1)
        for kind, shape in (("weight", (3 * WIDTH, WIDTH)), ("bias", (3 * WIDTH,))):
            parts = det(f"blocks.{n}.attn.qkv.{kind}", shape, 0.1).chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                weights[f"transformer_blocks.{n}.attn1.to_{name}.{kind}"] = part
        # Without labels: every class adds 0 to the timestep embedding.
        weights[f"transformer_blocks.{n}.norm1.emb.class_embedder.embedding_table.weight"].zero_()
    net.load_state_dict(weights)
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the published code
    x, t = det("dit.x", (2, 3, SIZE, SIZE), 1.0), torch.tensor([3, 871])
    with torch.no_grad():
        return net(x, t, class_labels=torch.zeros(2, dtype=torch.int64)).sample


if __name__ == "__main__":
    outputs = {f"{channels} channels": reference(channels).numpy() for channels in (3, 6)}
    np.savez_compressed(Path(__file__).with_name("dit_diffusers.npz"), **outputs)
