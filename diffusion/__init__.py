"""Diffusion models: noise schedules, timestep densities, loss weights, losses, nets, training, sampling, metrics.

The names in `__all__` are imported at first use, so that `import diffusion` does not import torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "NoiseSchedule": "gaussian",
    "cosine_betas": "gaussian",
    "linear_betas": "gaussian",
    "DENSITIES": "timesteps",
    "draw_timesteps": "timesteps",
    "WEIGHTS": "losses",
    "hybrid_loss": "losses",
    "p2_weight": "losses",
    "ddim_sample": "sampling",
    "ddim_timesteps": "sampling",
    "ddpm_sample": "sampling",
    "DiT": "nets.dit",
    "UNet": "nets.unet",
    "frechet_distance": "evaluation.metrics",
    "load_checkpoint": "checkpoints",
    "load_published": "published",
    "to_uint8": "data.batches",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'diffusion' has no attribute '{name}'")
    return getattr(import_module(f"diffusion.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
