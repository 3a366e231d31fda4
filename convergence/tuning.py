"""The keys `tune` and `tuned` of a study file, and how a tuned value is read from an arm and written into it."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from diffusion.config import Name, PositiveInt, RunConfig, Seed
from diffusion.section import Distinct, Section

EVEN_SPACING = 0.01  # relative difference between spacings that count as equal
DIGITS = 2  # of a value that continues a grid

Values = Annotated[tuple[float, ...], Field(min_length=1), Distinct]


class Tune(Section):
    """Trials that choose the value of one or two settings for each arm, with seeds that the verdict does not use.

    Further keys are the settings to tune, each with a list of values: a numeric key of `train`, such as
    `learning_rate: [7e-4, 2e-3, 6e-3]`, or a numeric key of an arm's scheme, such as `timesteps.p2.gamma: [0.5, 1]`,
    which is tuned in the arms that have it. Every combination of values is tried.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Values] = Field(init=False)

    seeds: Annotated[tuple[Seed, ...], Distinct] = Field(min_length=1)
    """Seeds of the trials. None of them may be a seed of the study."""
    until: PositiveInt
    """Step of the last checkpoint of a trial."""

    @property
    def grid(self) -> dict[str, tuple[float, ...]]:
        """Each tuned key and its values."""
        return self.__pydantic_extra__


class TunedArm(Section):
    """The result of the trials of one arm."""

    arm: Name
    """Arm of this study that has the best values."""
    values: dict[str, float]
    """The best values."""
    add: dict[str, float] = {}
    """Value with which to extend the grid, for each best value at an edge of the grid."""


class Tuned(Section):
    """Record of the trials from which `convergence tune` has made this study."""

    study: Name
    """Study with the trials."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    """Seeds of the trials."""
    until: PositiveInt
    """Step of the last checkpoint of a trial."""
    arms: dict[Name, TunedArm]
    """Arm with the values of the study with the trials -> its best values."""

    def __str__(self) -> str:
        best = (f"{name} {values_text(tuned.values)}" for name, tuned in self.arms.items())
        return f"the trials of {self.study} ({', '.join(best)})"


def values_text(values: Mapping[str, float]) -> str:
    """Returns tuned values as text, such as "learning_rate 0.002"."""
    return " and ".join(f"{key} {value:g}" for key, value in values.items())


def number_at(run: RunConfig, key: str) -> float | None:
    """Returns the number that a run has at a tuned key; None if there is no number.

    Args:
        run: settings of the run.
        key: a key of `train`, or the path of a key of the scheme, such as `timesteps.p2.gamma`.
    """
    value: Any = (run.scheme if "." in key else run.train).model_dump()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if type(value) in (int, float) else None


def arm_content(arm: Section, values: Mapping[str, float]) -> dict[str, Any]:
    """Returns the content of an arm as in a study file, with other values at the tuned keys."""
    content = arm.model_dump(exclude_unset=True)
    for key, value in values.items():
        *sections, last = (key if "." in key else f"train.{key}").split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return content


def next_value(grid: Sequence[float], best: float) -> float | None:
    """Returns the value with which to extend a grid whose best value is at an edge; None if it is at none.

    The value continues the spacing of the grid: arithmetic if the values are evenly spaced or not all above 0,
    otherwise geometric. A grid of one value has no edge.
    """
    values = sorted(set(grid))
    if len(values) < 2 or best not in (values[0], values[-1]):
        return None
    edge, inner = (values[-1], values[-2]) if best == values[-1] else (values[0], values[1])
    spacings = [right - left for left, right in zip(values, values[1:], strict=False)]
    even = len(spacings) > 1 and max(spacings) - min(spacings) < EVEN_SPACING * max(spacings)
    following = 2 * edge - inner if even or values[0] <= 0 else edge * edge / inner
    if following == 0:
        return 0.0
    return round(following, DIGITS - 1 - math.floor(math.log10(abs(following))))
