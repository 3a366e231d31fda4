"""Builds the untrained net, the noise schedule and the tables over timesteps from the settings of a run."""

from collections.abc import Callable, Mapping

from torch import nn

from diffusion.config import Diffusion, Initial, Net, RunConfig
from diffusion.errors import InputError
from diffusion.gaussian import SCHEDULES, NoiseSchedule
from diffusion.nets.dit import DiT
from diffusion.nets.unet import UNet
from diffusion.schemes import Tables, scheme_tables

NETS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT}


def build_net(image_size: int, model: Net) -> nn.Module:
    """Returns the net that `model` describes, with random weights, for images of `image_size` x `image_size` pixels.

    Raises:
        InputError: if no net has this name.
    """
    name, parameters = model.chosen
    if name not in NETS:
        raise InputError(
            f"no net has the name {name}: choose from {', '.join(NETS)}, or add it to NETS in diffusion/build.py"
        )
    return NETS[name](image_size=image_size, **parameters)


def noise_schedule(diffusion: Diffusion) -> NoiseSchedule:
    """Returns the noise schedule that `diffusion` describes."""
    return NoiseSchedule(SCHEDULES[diffusion.schedule](diffusion.timesteps))


def build(config: Initial) -> tuple[nn.Module, NoiseSchedule]:
    """Returns the untrained net and the noise schedule that `config` describes."""
    return build_net(config.dataset.image_size, config.model), noise_schedule(config.diffusion)


def constant_tables(runs: Mapping[str, RunConfig]) -> dict[str, Tables]:
    """Returns the density and the loss weights of each arm whose density does not change during training.

    Args:
        runs: maps the name of each arm (one way to train) to the settings of a training run.

    Returns:
        a dict that maps names of arms to tables.

    Raises:
        InputError: if the tables of an arm cannot be computed (see `diffusion.schemes.scheme_tables`).
    """
    return {
        arm: scheme_tables(noise_schedule(run.diffusion), run.scheme, run.match)
        for arm, run in runs.items()
        if not run.scheme.timesteps.learned
    }
