"""Builds the untrained net, the path and the tables over timesteps from the settings of a run."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from diffusion.config import Diffusion, Initial, Net, RunConfig
from diffusion.errors import InputError
from diffusion.gaussian import SCHEDULES, NoiseSchedule
from diffusion.nets.dit import DiT
from diffusion.nets.unet import UNet
from diffusion.paths import PATHS, PREDICTIONS, NoisePath, edm_std
from diffusion.schemes import Tables, epsilon_tables, scheme_tables

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


def noise_schedule(diffusion: Diffusion) -> NoisePath:
    """Returns the path that `diffusion` describes, with the prediction of the net and the space of its loss.

    If the net predicts as in EDM, x_t is divided by its standard deviation. This is the scaling of the input by c_in of
    Karras et al. 2022, because all other quantities do not depend on the scale of x_t.

    Raises:
        InputError: if x_0 cannot be computed from the prediction at some timestep.
    """
    name, parameters = diffusion.schedule.chosen
    prediction, options = diffusion.predict.chosen
    predict = partial(PREDICTIONS[prediction], **options)
    path: NoisePath
    if name in SCHEDULES:
        path = NoiseSchedule(SCHEDULES[name](diffusion.timesteps), predict, diffusion.loss_in)
    else:
        path = NoisePath(*PATHS[name](diffusion.timesteps, **parameters), predict, diffusion.loss_in)
    if prediction == "edm":
        std = edm_std(path.alpha, path.sigma, **options)
        path = NoisePath(path.alpha / std, path.sigma / std, predict, diffusion.loss_in)
    return path


def build(config: Initial) -> tuple[nn.Module, NoisePath]:
    """Returns the untrained net and the path that `config` describes."""
    return build_net(config.dataset.image_size, config.model), noise_schedule(config.diffusion)


def run_tables(run: RunConfig, of_epsilon: bool = False) -> Tables:
    """Returns the density and the loss weights of a run at the start of training, each [T].

    Args:
        run: settings of the run.
        of_epsilon: whether the weight of the mse is that of the squared error of epsilon, which is comparable between
            runs whose nets predict different things. If false, it is that of what the net predicts.

    Raises:
        InputError: if the tables cannot be computed (see `diffusion.schemes.epsilon_tables`).
    """
    other = noise_schedule(run.match_diffusion) if run.match_diffusion else None
    tables = epsilon_tables if of_epsilon else scheme_tables
    return tables(noise_schedule(run.diffusion), run.scheme, run.match, other)


def constant_tables(runs: Mapping[str, RunConfig]) -> dict[str, Tables]:
    """Returns the tables of each arm whose density does not change during training, with the weights of epsilon.

    Args:
        runs: maps the name of each arm (one way to train) to the settings of a training run.

    Returns:
        a dict that maps names of arms to tables.

    Raises:
        InputError: if the tables of an arm cannot be computed (see `diffusion.schemes.epsilon_tables`).
    """
    return {arm: run_tables(run, of_epsilon=True) for arm, run in runs.items() if not run.scheme.timesteps.learned}
