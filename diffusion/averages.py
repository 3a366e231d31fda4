"""Averages of the weights of a run: settings, names, decays, and how many steps they cover."""

import math
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from diffusion.section import Section

RAW: Literal["raw"] = "raw"
UNIFORM_WIDTH = 12**-0.5  # relative width of the mean of the weights of all steps


class Power(Section):
    """An average whose width grows in proportion to the steps of the run (Karras et al. 2024, arXiv 2312.02696)."""

    power: float = Field(ge=0.001, lt=UNIFORM_WIDTH)
    """Relative width: the standard deviation, over the steps of which the average consists, divided by the number of \
steps of the run. 0.05 to 0.15 are usual."""


def _kind(value: Any) -> str:
    return "power" if isinstance(value, (dict, Power)) else "raw" if value == RAW else "decay"


Decay = Annotated[float, Field(ge=0, lt=1)]
Average = Annotated[
    Annotated[Decay, Tag("decay")] | Annotated[Power, Tag("power")] | Annotated[Literal["raw"], Tag("raw")],
    Discriminator(_kind),
]


def average_name(average: Average) -> str:
    """Returns the name of an average in tables and in names of files: "ema0.999", "power0.1" or "raw"."""
    if isinstance(average, Power):
        return f"power{average.power}"
    return average if isinstance(average, str) else f"ema{average}"


def _different(averages: tuple[Average, ...]) -> tuple[Average, ...]:
    if len(set(averages)) < len(averages):
        raise ValueError(f"{average_name(max(averages, key=averages.count))} appears twice: remove one")
    return averages


Averages = Annotated[tuple[Average, ...], Field(min_length=1), AfterValidator(_different)]


def weights_files(names: Iterable[str]) -> dict[str, str]:
    """Returns name of an average -> name of its file in a checkpoint. The first average is in weights.safetensors."""
    return {name: f"weights.{name}.safetensors" if place else "weights.safetensors" for place, name in enumerate(names)}


def ema_decay(step: int, average: Average, warmup: bool) -> float:
    """Returns the decay of an average of the weights at a step (counted from 0).

    The decay of a `Power` is (1 - 1 / (step + 1))^(gamma + 1). With warm-up, a constant decay is (1 + step) /
    (10 + step) until this value exceeds the constant. Without warm-up, the average with the decay 0.9999 still contains
    37% of the untrained weights after 10,000 steps. The decay of the weights themselves is 0.
    """
    if isinstance(average, Power):
        return float((1 - 1 / (step + 1)) ** (power_exponent(average.power) + 1))
    decay = 0.0 if isinstance(average, str) else average
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@cache
def power_exponent(relative_width: float) -> float:
    """Returns gamma > 0, for which (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is the square of the relative width.

    Args:
        relative_width: above 0 and below `UNIFORM_WIDTH`, which is the relative width at gamma = 0.
    """
    low, high = 0.0, 1 / relative_width  # the square of the width is below 1 / (gamma + 2)^2
    while low < (middle := (low + high) / 2) < high:
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > relative_width**2:
            low = middle
        else:
            high = middle
    return high


def relative_width(average: Average, steps: int, warmup: bool) -> float:
    """Returns the relative width of an average after some steps.

    The average is a weighted mean of the weights after each step; the untrained weights count as step 0. The relative
    width is the standard deviation of the step under these weights of the mean, divided by `steps`.
    """
    mean = square = 0.0
    for step in range(1, steps + 1):
        decay = ema_decay(step - 1, average, warmup)
        mean = decay * mean + (1 - decay) * step
        square = decay * square + (1 - decay) * step**2
    return math.sqrt(max(square - mean**2, 0.0)) / steps
