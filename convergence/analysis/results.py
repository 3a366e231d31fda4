"""What the analysis of a study finds, as data: comparisons of arms, effects on the probes, the verdict."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from convergence.analysis.effects import JSON_CONFIG, NO_DIFFERENCE, Effect, Outcome, Quantity, Scale
from convergence.analysis.wording import change_text, count_text, speedup_text
from convergence.tables import metric_name
from diffusion.errors import FileError
from diffusion.files import atomic_write


@dataclass(frozen=True)
class Noise:
    """Standard deviations over seeds of the metric averaged over training images, on the scale of the comparison.

    They are NaN with fewer than two pairs.
    """

    __pydantic_config__ = JSON_CONFIG

    between: float
    """Of the runs of one arm, pooled over both arms."""
    paired: float
    """Of the paired differences."""


@dataclass(frozen=True)
class Comparison:
    """A candidate compared with a baseline in one metric, over the training images that all their runs cover.

    `str(comparison)` states the outcome and its numbers in words.
    """

    __pydantic_config__ = JSON_CONFIG

    study: str
    features: str
    metric: str
    baseline: str
    candidate: str
    primary: bool
    """Whether this is the comparison that the study was made for."""
    scale: Scale
    """"log": the metric is compared by ratios; "plain": by differences."""
    first_images: int | float
    """Training images of the first common checkpoint."""
    last_images: int | float
    seeds: tuple[int, ...]
    effects: tuple[Effect, ...]
    """`average`, `final`, then `images` and `seconds` at each threshold, from easy to hard."""
    noise: Noise
    outcome: Outcome
    """Of the candidate, from the effect `average`."""

    @property
    def thresholds(self) -> list[float]:
        """Values of the metric at which speed-ups are measured, from easy to hard."""
        return [effect.threshold for effect in self.effects if effect.quantity == "images"]

    @property
    def middle_threshold(self) -> float:
        """The middle threshold, the easier of two; NaN if there is none."""
        thresholds = self.thresholds
        return thresholds[(len(thresholds) - 1) // 2] if thresholds else np.nan

    @property
    def average(self) -> Effect:
        """The primary endpoint: the advantage in the metric averaged over training images."""
        return self.effect("average")

    @property
    def metric_name(self) -> str:
        """What was measured, such as "FD (EfficientNet-Lite0)"."""
        return metric_name(self.features, self.metric)

    def effect(self, quantity: Quantity, threshold: float | None = None) -> Effect:
        """Returns the effect on a quantity over all seeds; times are those to the middle threshold by default.

        Raises:
            KeyError: the comparison has no such effect.
        """
        if quantity in ("images", "seconds") and threshold is None:
            threshold = self.middle_threshold
        for effect in self.effects:
            if effect.quantity == quantity and (threshold is None or effect.threshold == threshold):
                return effect
        raise KeyError(f"no effect on {quantity} at the threshold {threshold}")

    def __str__(self) -> str:
        average, name = self.average, self.metric_name
        if self.outcome == NO_DIFFERENCE:
            text = f"No difference shown between {self.candidate} and {self.baseline} in {name}"
        else:
            text = f"{self.candidate} is {self.outcome} than {self.baseline} in {name}"
        images = f"{self.first_images:,.0f} to {self.last_images:,.0f} training images"
        if average.pairs:
            change = change_text(average, self.metric, self.scale)
            text += f": {change} on average over {images}, {count_text(average.pairs, 'paired seed')}."
        else:
            text += f": in every pair of runs over {images} at least one diverged or collapsed."
        if self.thresholds:
            effect = self.effect("images")
            speedup = speedup_text(effect)
            reason = f", because {_why_unknown(effect)}" if speedup == "unknown" else ""
            text += f" Speed-up in images to {name} {self.middle_threshold:.4g}: {speedup}{reason}."
        return text + self._cautions()

    def _cautions(self) -> str:
        """What the number of seeds and the failed runs do not allow to conclude."""
        average, text = self.average, ""
        if average.pairs == 1:
            text += " With one seed there is no interval, and nothing can be concluded."
        if average.pairs == 2:
            text += " With two seeds the interval extends 12.7 standard errors to each side"
            text += "." if self.outcome == NO_DIFFERENCE else ": confirm this result with more seeds."
        for arm, count in ((self.baseline, average.failed_baseline), (self.candidate, average.failed_candidate)):
            if count:
                text += f" {count_text(count, 'run')} of {arm} diverged or collapsed."
        return text


def _why_unknown(effect: Effect) -> str:
    """Why the pairs of runs give no speed-up at a threshold."""
    times = np.array([(seed.baseline, seed.candidate) for seed in effect.per_seed])
    if np.isnan(times).all():
        return "all runs reach it before their first checkpoint"
    if np.isposinf(times).all():
        return "no run reaches it"
    return "too few runs cross it between their checkpoints"


@dataclass(frozen=True)
class ProbeEffect:
    """The advantage of a candidate in one quantity that the probes measure, averaged over training images."""

    __pydantic_config__ = JSON_CONFIG

    timesteps: str
    """A bin of timesteps such as "0-99", or "all"."""
    metric: str
    baseline: str
    candidate: str
    scale: Scale
    average: Effect


@dataclass(frozen=True)
class FailedRun:
    """A run that diverged or collapsed, and where."""

    __pydantic_config__ = JSON_CONFIG

    arm: str
    seed: int
    reason: str


@dataclass(frozen=True)
class StudyVerdict:
    """The verdict on one study."""

    __pydantic_config__ = JSON_CONFIG

    study: str
    question: str | None = None
    """None: the study compares nothing."""
    answer: str | None = None
    """The answer in plain text, without markup; None if there is no question."""
    outcome: Outcome | None = None
    """Of the primary comparison; None if it has no value in both arms."""
    comparisons: tuple[Comparison, ...] = ()
    mechanism: tuple[ProbeEffect, ...] = ()
    matched: tuple[str, ...] = ()
    """Candidates with the same expected gradient as the baseline."""
    failed: tuple[FailedRun, ...] = ()
    warnings: tuple[str, ...] = ()
    """Sentences that restrict the verdict, such as that the code has changed since training."""


_ADAPTER = TypeAdapter(StudyVerdict)


def save_verdict(verdict: StudyVerdict, path: Path) -> None:
    """Writes a verdict as JSON. Numbers that are not finite become "Infinity", "-Infinity" and "NaN"."""
    with atomic_write(path) as file:
        file.write(_ADAPTER.dump_json(verdict, indent=1) + b"\n")


def read_verdict(path: Path | str) -> StudyVerdict:
    """Reads a verdict that `save_verdict` wrote.

    Raises:
        FileError: the file is missing, damaged, or not a verdict.
    """
    try:
        return _ADAPTER.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        mistake = error.errors()[0]
        place = ".".join(map(str, mistake["loc"]))
        raise FileError(path, f"is not a verdict ({place + ': ' if place else ''}{mistake['msg']})") from None
