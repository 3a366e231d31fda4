"""An arm in numbers: its tables over timesteps, from the names in the experiment file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.config import Scheme
from diffusion.errors import InputError
from diffusion.gaussian import NoiseSchedule
from diffusion.losses import WEIGHTS
from diffusion.timesteps import DENSITIES, uniform


@dataclass(frozen=True)
class Tables:
    """An arm in numbers, each [T] float64: how timesteps are drawn and what weights the two loss terms have."""

    probabilities: Tensor
    mse_weight: Tensor
    vb_weight: Tensor

    def to(self, device: torch.device) -> "Tables":
        """The same tables on a device."""
        return Tables(self.probabilities.to(device), self.mse_weight.to(device), self.vb_weight.to(device))


def scheme_tables(schedule: NoiseSchedule, scheme: Scheme, match: Scheme | None = None) -> Tables:
    """The tables of an arm, as it starts.

    An arm that is matched to another keeps that arm's expected gradient; one whose losses are importance-corrected
    keeps that of uniform draws.

    Raises:
        InputError: a density or weight is not finite, or losses of timesteps that are never drawn are to be corrected.
    """
    probabilities = _table(DENSITIES, scheme.timesteps.chosen, schedule)
    mse_weight = _table(WEIGHTS, scheme.mse_weight.chosen, schedule)
    vb_weight = _table(WEIGHTS, scheme.vb_weight.chosen, schedule)
    if match is not None:
        target = scheme_tables(schedule, match)
    elif scheme.corrected:
        target = Tables(uniform(schedule), mse_weight, vb_weight)
    else:
        return Tables(probabilities, mse_weight, vb_weight)
    if (probabilities == 0).any():
        name, parameters = scheme.timesteps.chosen
        raise InputError(
            f"the density {name} {parameters} never draws {int((probabilities == 0).sum())} of the timesteps, so its "
            "losses cannot be corrected: widen it, or drop match and importance_corrected"
        )
    return matched(probabilities, target, scheme.correct_vb)


def _table(
    functions: Mapping[str, Callable[..., Tensor]], chosen: tuple[str, dict[str, float]], schedule: NoiseSchedule
) -> Tensor:
    """One table of an arm, [T].

    Raises:
        InputError: no function has the name, or what it gives is not finite.
    """
    name, parameters = chosen
    if name not in functions:
        raise InputError(
            f"{name} is a key of diffusion/config.py, but no function has this name: add it to DENSITIES in "
            "diffusion/timesteps.py, or to WEIGHTS in diffusion/losses.py"
        )
    table = functions[name](schedule, **parameters)
    if not torch.isfinite(table).all():
        raise InputError(f"{name} {parameters} is not finite at {schedule.timesteps} timesteps: choose milder numbers")
    return table


def matched(probabilities: Tensor, target: Tables, correct_vb: bool = True) -> Tables:
    """The target's weights times q_t / p_t, its density over another: E_q[w grad] = E_p[(q / p) w grad].

    Where p_t is small the weights are large: P2's density (gamma 0.5, k 1, linear, T = 1000) matched to uniform draws
    gives vb a weight of 80 at t = 0. Without `correct_vb` that term keeps the target's weights, and the variance alone
    is then trained towards another expectation; the mean of the prediction is not, since vb does not reach it.

    Args:
        probabilities: the density p to draw by, [T], all above 0.
        target: the arm whose expected gradient is kept.
        correct_vb: whether the vb term is matched too.
    """
    ratio = target.probabilities / probabilities
    return Tables(
        probabilities, target.mse_weight * ratio, target.vb_weight * ratio if correct_vb else target.vb_weight
    )
