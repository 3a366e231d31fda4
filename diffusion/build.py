"""The untrained net and the noise schedule that a configuration describes."""

from collections.abc import Mapping

from diffusion.config import Diffusion, Initial, Model, RunConfig
from diffusion.gaussian import SCHEDULES, NoiseSchedule
from diffusion.nets.unet import UNet
from diffusion.schemes import Tables, scheme_tables


def build_net(image_size: int, model: Model) -> UNet:
    """Returns the net of a model section, with random weights, for images of `image_size` x `image_size` pixels."""
    return UNet(image_size=image_size, **model.model_dump())


def noise_schedule(diffusion: Diffusion) -> NoiseSchedule:
    """Returns the noise schedule of a diffusion section."""
    return NoiseSchedule(SCHEDULES[diffusion.schedule](diffusion.timesteps))


def build(config: Initial) -> tuple[UNet, NoiseSchedule]:
    """Returns the untrained net and the noise schedule of a run."""
    return build_net(config.dataset.image_size, config.model), noise_schedule(config.diffusion)


def constant_tables(runs: Mapping[str, RunConfig]) -> dict[str, Tables]:
    """Returns the tables of each arm of which training does not learn the density.

    Args:
        runs: arm -> the settings of its runs.

    Raises:
        InputError: The tables of an arm are not finite (`diffusion.schemes.scheme_tables`).
    """
    return {
        arm: scheme_tables(noise_schedule(run.diffusion), run.scheme, run.match)
        for arm, run in runs.items()
        if not run.scheme.timesteps.learned
    }
