"""Checkpoint files for tests.

No published checkpoint is small enough for this repository. adm_state_dict_keys.json has keys and shapes of some;
`det_weights` gives such a state dict with numbers that depend only on the keys.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.checkpoints import save_weights
from diffusion.config import Diffusion, Initial, Model, OpenMoji

KEYS = json.loads((Path(__file__).parent / "data/adm_state_dict_keys.json").read_text())
LAYOUT = {key: tuple(shape) for key, shape in KEYS["unet_tiny32"].items()}
TINY32 = Model(
    channels=32, channel_mult=(1, 2), res_blocks=1, attention_resolutions=(16,), head_channels=16, learn_sigma=True
)


def det_weights(layout: dict[str, tuple[int, ...]] = LAYOUT) -> dict[str, Tensor]:
    """Normal weights of standard deviation 0.05. A tensor's seed is the CRC-32 of its key, as in test_golden.py."""
    rngs = {key: np.random.default_rng(zlib.crc32(key.encode())) for key in layout}
    return {
        key: torch.from_numpy((rngs[key].standard_normal(shape) * 0.05).astype(np.float32))
        for key, shape in layout.items()
    }


def config(diffusion: Diffusion | None = None, **changes: object) -> Initial:
    """A configuration with the model `TINY32`, except for some keys."""
    diffusion = diffusion or Diffusion()
    model = Model(**TINY32.model_dump(exclude_unset=True) | changes)
    return Initial(
        dataset=OpenMoji(source="openmoji", image_size=32), model=model, diffusion=diffusion, train_version=1
    )


def save_ours(path: Path, weights: dict[str, Tensor], diverged: bool = False, **changes: object) -> Path:
    """Writes a checkpoint of this project."""
    save_weights(path, weights, config(**changes), seed=3, step=40, diverged=diverged)
    return path


def save_pt(path: Path, content: object, **options: object) -> Path:
    """Writes a file of torch.save, such as a published checkpoint."""
    torch.save(content, path, **options)
    return path
