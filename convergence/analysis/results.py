"""Results of the analysis of a study, as data: comparisons of arms, failed runs, and the verdict."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from convergence.analysis.cost import Cost
from convergence.analysis.decision import Outcome
from convergence.analysis.effects import JSON_CONFIG, Effect, Quantity, Scale, Shown, Unit
from convergence.analysis.mechanism import Mechanism
from convergence.analysis.wording import effect_text, interval_text, margin_text
from convergence.study_plan import StudyPlan
from convergence.tables import HIGHER_IS_BETTER, metric_name
from diffusion.errors import FileError
from diffusion.files import atomic_write

Role = Literal["primary", "secondary", "replication"]


@dataclass(frozen=True)
class Noise:
    """Standard deviations over seeds of the level, averaged over training images.

    A level is a value of the metric on a scale where lower is better, such as the log of FD. With fewer than two pairs
    of runs, the standard deviations are NaN.
    """

    __pydantic_config__ = JSON_CONFIG

    between: tuple[float, float]
    """Standard deviation over the runs of the baseline, and over the runs of the candidate."""
    paired: float
    """Standard deviation of the paired differences, candidate minus baseline."""
    samples: float
    """Part of `paired` that comes from the finite number of generated samples; NaN if unknown."""

    @property
    def seeds(self) -> float:
        """Part of `paired` that comes from the seeds: 0 if the samples explain all of the variance, NaN if unknown."""
        return math.sqrt(max(self.paired**2 - self.samples**2, 0))


@dataclass(frozen=True)
class Comparison:
    """A candidate compared with a baseline in one metric, over the training images that all runs of both arms cover.

    `str(comparison)` states the outcome and its numbers in words.
    """

    __pydantic_config__ = JSON_CONFIG

    study: str
    features: str
    metric: str
    baseline: str
    candidate: str
    role: Role
    """`primary`: the comparison that answers the question of the study. `secondary`: any other comparison of the
    planned seeds. `replication`: the primary comparison repeated with seeds that were added later."""
    scale: Scale
    """`ratio`: values of the metric are compared by their ratio. `difference`: by their difference."""
    first_images: int | float
    """Start of the range of training images that all runs cover; `last_images` is its end."""
    last_images: int | float
    seeds: tuple[int, ...]
    effects: tuple[Effect, ...]
    """The effects `average`, `final`, `images` at each threshold from easy to hard, and `hours` at the primary
    threshold."""
    primary_threshold: float
    """Value of the metric: the training images until this value decide which arm is faster. NaN: no threshold."""
    margin: float | None
    """Largest change of the average that counts as no change, in the unit of the effect `average`. None: equivalence is
    not tested."""
    average_90: tuple[float, float]
    """90% interval of the effect `average`. If the interval is within the margin, two one-sided tests at 5% show
    equivalence."""
    within_margin: bool
    outcome: Outcome
    cross_images: float
    """Training images at which the arm that is better on average last becomes the worse one; NaN if it never does."""
    p_holm: float
    """p-value of the effect `average`, adjusted for the number of secondary comparisons (Holm 1979, A simple
    sequentially rejective multiple test procedure). NaN for the other comparisons, which are not adjusted."""
    noise: Noise
    notes: tuple[str, ...]
    """Sentences about what the runs do not allow to conclude."""

    @property
    def thresholds(self) -> list[float]:
        """Thresholds of the effects on training images: values of the metric, from easy to hard."""
        return [effect.threshold for effect in self.effects if effect.quantity == "images"]

    @property
    def average(self) -> Effect:
        """Effect on the metric averaged over training images: A in the decision table, the primary endpoint."""
        return self.effects[0]

    @property
    def final(self) -> Effect:
        """Effect on the metric at the last common checkpoint: E in the decision table."""
        return self.effects[1]

    @property
    def images(self) -> Effect | None:
        """Effect on the images until the primary threshold: S in the decision table; None without a threshold."""
        return self.effect("images", self.primary_threshold) if self.thresholds else None

    @property
    def hours(self) -> Effect | None:
        """Effect on the hours of training until the primary threshold; None if the cost of an arm is unknown."""
        return next((effect for effect in self.effects if effect.quantity == "hours"), None)

    @property
    def metric_name(self) -> str:
        """Name of the metric with its features, such as "FD (EfficientNet-Lite0)"."""
        return metric_name(self.features, self.metric)

    @property
    def short_name(self) -> str:
        """Name of the metric without its features, such as "FD"."""
        return self.metric_name.partition(" (")[0]

    @property
    def headline(self) -> str:
        """The outcome in a few words."""
        return self.sentence()[0]

    def effect(self, quantity: Quantity, threshold: float) -> Effect:
        """Returns the effect on images or hours until a threshold, over all seeds.

        Raises:
            KeyError: the comparison has no such effect.
        """
        for effect in self.effects:
            if effect.quantity == quantity and effect.threshold == threshold:
                return effect
        raise KeyError(f"no effect on {quantity} at the threshold {threshold}")

    def sentence(self) -> tuple[str, str]:
        """Returns the outcome, such as "b is faster than a", and the numbers that show it, such as "it needs ..."."""
        baseline, candidate, metric = self.baseline, self.candidate, self.short_name
        average, final, images = self.average, self.final, self.images
        on_average = f"{metric} {effect_text(average, 'on average')}"
        at_the_end = f"{metric} {effect_text(final, 'at the last checkpoint')}"
        needs = ""
        if images:
            hours = f" and {effect_text(self.hours, 'times the hours')}" if self.hours else ""
            needs = f"needs {effect_text(images, 'times the images')}{hours} to reach {metric} {images.threshold:.4g}"
        both = f"{candidate} and {baseline}"
        margin = margin_text(self.margin, self.scale) if self.margin else ""
        in_margin = f", within the margin of {margin}" if self.within_margin else ""
        match self.outcome:
            case "faster" | "slower":
                return f"{candidate} is {self.outcome} than {baseline}", f"it {needs}; {on_average}{in_margin}"
            case "better on average" | "worse on average":
                change = "higher" if (average.shown == "better") == (self.metric in HIGHER_IS_BETTER) else "lower"
                return (
                    f"{candidate} has a {change} {metric} on average than {baseline}",
                    f"{effect_text(average)}{in_margin}; a difference in images is not shown",
                )
            case "curves cross":
                place = f" at about {self.cross_images:,.0f} images" if self.cross_images > 0 else ""
                first, then = ("better", "worse") if average.shown == "better" else ("worse", "better")
                last = at_the_end if final.shown == then else f"{candidate} {needs}"
                order = f"{candidate} is {first} before and {then} after"
                if final.shown != then:
                    leader = candidate if average.shown == "better" else baseline
                    order = f"the early lead of {leader} is lost before the threshold"
                numbers = f"{order}; {on_average}{in_margin}; {last}; no single answer"
                return f"The curves of {both} cross{place}", numbers
            case "the same":
                interval = interval_text(average.estimate, *self.average_90, average.unit, "on average")
                return f"{both} are the same within {margin}", f"{metric} {interval.replace('(', '(90% interval: ')}"
            case "the same on average":
                not_at_the_end = ", not at the end" if final.shown != "not shown" else ""
                shown = [at_the_end] if not_at_the_end else []
                if images and images.shown != "not shown":
                    shown.append(f"but {candidate} {needs}")
                lead = f"{both} are the same within {margin} on average{not_at_the_end}"
                return lead, f"{'; '.join(shown)}; no single answer"
            case "identical":
                return f"{both} are identical", "every value of every seed is equal"
            case outcome:
                listed = [on_average]
                if outcome == "interim" or final.shown != "not shown":
                    listed.append(at_the_end)
                if images and (outcome == "interim" or images.shown != "not shown"):
                    listed.append(f"{candidate} {needs}")
                lead = "Interim result of" if outcome == "interim" else "Undecided between"
                return f"{lead} {both}", "; ".join(listed)

    def __str__(self) -> str:
        return " ".join([f"{': '.join(self.sentence())}.", *self.notes])


@dataclass(frozen=True)
class Sensitivity:
    """The effect of the primary comparison's candidate, by one endpoint and one metric."""

    __pydantic_config__ = JSON_CONFIG

    endpoint: str
    features: str
    metric: str
    unit: Unit
    estimate: float
    low: float
    high: float
    shown: Shown


@dataclass(frozen=True)
class FailedRun:
    """A run that diverged or collapsed, and the reason, which names the step."""

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
    """Question that the study answers; None if the study compares nothing."""
    answer: str | None = None
    """Answer in plain text, without markup; None if there is no question."""
    outcome: Outcome | None = None
    """Outcome of the primary comparison; None if no seed has values of both arms."""
    plan: StudyPlan | None = None
    """What the verdict judges by: arms, metric, thresholds, margin and planned seeds. None: the study compares
    nothing."""
    plan_changes: tuple[str, ...] = ()
    """Sentences about what the study file changed after the plan was fixed."""
    comparisons: tuple[Comparison, ...] = ()
    costs: tuple[Cost, ...] = ()
    """Training cost of each arm; empty if the costs are unknown."""
    sensitivity: tuple[Sensitivity, ...] = ()
    mechanism: tuple[Mechanism, ...] = ()
    failed: tuple[FailedRun, ...] = ()
    warnings: tuple[str, ...] = ()
    """Sentences that restrict the verdict, such as that the code has changed since training."""

    @property
    def primary(self) -> Comparison | None:
        """The primary comparison; None if no seed has values of both arms."""
        return next((comparison for comparison in self.comparisons if comparison.role == "primary"), None)


_ADAPTER = TypeAdapter(StudyVerdict)


def save_verdict(verdict: StudyVerdict, path: Path) -> None:
    """Writes a verdict as JSON. Numbers that are not finite become the strings "Infinity", "-Infinity" and "NaN"."""
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
