"""Computes the tables of a training scheme: the density over timesteps and the loss weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.config import Scheme
from diffusion.errors import InputError
from diffusion.losses import WEIGHTS, WEIGHTS_OF_EPSILON
from diffusion.paths import NoisePath
from diffusion.timesteps import DENSITIES, uniform


@dataclass(frozen=True)
class Tables:
    """Density and loss weights of a training scheme, each float64 [T].

    Attributes:
        probabilities: density from which timesteps are drawn, with a sum of 1.
        mse_weight: factor of the mse term of the loss.
        vb_weight: factor of the vb term of the loss.
    """

    probabilities: Tensor
    mse_weight: Tensor
    vb_weight: Tensor

    def to(self, device: torch.device) -> "Tables":
        """Returns a copy with all tables [T] on `device`."""
        return Tables(self.probabilities.to(device), self.mse_weight.to(device), self.vb_weight.to(device))


def scheme_tables(
    schedule: NoisePath, scheme: Scheme, match: Scheme | None = None, match_schedule: NoisePath | None = None
) -> Tables:
    """Returns the density and the loss weights of a scheme at the start of training.

    The weight of the mse belongs to the squared error of what the net predicts. Arguments and errors are those of
    `epsilon_tables`.

    Returns:
        the tables, each [T].
    """
    tables = epsilon_tables(schedule, scheme, match, match_schedule)
    return replace(tables, mse_weight=tables.mse_weight * schedule.epsilon_factor)


def epsilon_tables(
    schedule: NoisePath, scheme: Scheme, match: Scheme | None = None, match_schedule: NoisePath | None = None
) -> Tables:
    """Returns the density and the loss weights of a scheme, with the weight of the squared error of epsilon.

    This weight is comparable between schemes whose nets predict different things.

    Args:
        schedule: path of T timesteps, with the prediction of the net and the space of the loss.
        scheme: names and parameters of the density and of the weights. If `scheme.corrected`, the weights are divided
            by T p_t, so that the expected gradient is the same as with uniform draws.
        match: another scheme. If given, the loss weights are replaced by weights with which both schemes have the same
            expected weight at each timestep, and so the same expected gradient if their nets predict the same.
        match_schedule: path of the other scheme, with the prediction and the space of its loss; None: `schedule`.

    Returns:
        the tables, each [T].

    Raises:
        InputError: if a density or weight is unknown or not finite, or if a weight must be divided by a probability
            of 0.
    """
    probabilities = _table(DENSITIES, scheme.timesteps.chosen, schedule)
    mse_weight = _table(WEIGHTS, scheme.mse_weight.chosen, schedule)
    if scheme.mse_weight.chosen[0] not in WEIGHTS_OF_EPSILON:
        mse_weight = mse_weight * schedule.loss_factor / schedule.epsilon_factor
    vb_weight = _table(WEIGHTS, scheme.vb_weight.chosen, schedule)
    if match is not None:
        target = epsilon_tables(match_schedule or schedule, match)
    elif scheme.corrected:
        target = Tables(uniform(schedule), mse_weight, vb_weight)
    else:
        return Tables(probabilities, mse_weight, vb_weight)
    if (probabilities == 0).any():
        name, parameters = scheme.timesteps.chosen
        raise InputError(
            f"density {name} {parameters} is 0 at {int((probabilities == 0).sum())} timesteps, so the losses there "
            "cannot be corrected: widen the density, or remove match and importance_corrected"
        )
    return matched(probabilities, target, scheme.correct_vb)


def _table(
    functions: Mapping[str, Callable[..., Tensor]], chosen: tuple[str, dict[str, float]], schedule: NoisePath
) -> Tensor:
    """Returns the table [T] of a density or a weight. `chosen` contains the name and the parameters of a function.

    Raises:
        InputError: if no function has this name, or if the table is not finite.
    """
    name, parameters = chosen
    if name not in functions:
        raise InputError(f"no function is named {name}: add it to DENSITIES or WEIGHTS, or use one of {[*functions]}")
    table = functions[name](schedule, **parameters)
    if not torch.isfinite(table).all():
        raise InputError(
            f"{name} {parameters} is not finite at {schedule.timesteps} timesteps: use less extreme parameters"
        )
    return table


def matched(probabilities: Tensor, target: Tables, correct_vb: bool = True) -> Tables:
    """Returns tables with density p that have the same expected gradient as the target tables.

    The target has density q and weights w. The returned weights are (q / p) w, because E_q[w grad] =
    E_p[(q / p) w grad]. These weights are large where p_t is small. For example, the vb weight at t = 0 is 80 for the
    P2 density (gamma 0.5, k 1, linear betas, T = 1000) and a uniform target.

    Without `correct_vb`, the expected gradients with respect to the predicted variance differ. The expected gradients
    with respect to epsilon are still equal, because the vb term has no gradient with respect to epsilon.

    Args:
        probabilities: density p to draw from, [T], each greater than 0.
        target: tables with density q and weights w, each [T].
        correct_vb: whether vb_weight is multiplied by q / p. If false, vb_weight is the vb_weight of the target.
    """
    ratio = target.probabilities / probabilities
    return Tables(
        probabilities, target.mse_weight * ratio, target.vb_weight * ratio if correct_vb else target.vb_weight
    )
