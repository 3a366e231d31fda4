"""The schema of a study file: arms x seeds on one dataset. Without torch.

An `Experiment` is one study; `Experiment.run(arm)` gives the `RunConfig` of an arm.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from diffusion.config import (
    TRAIN_VERSION,
    Dataset,
    Diffusion,
    Model,
    Name,
    PositiveFloat,
    RunConfig,
    Sample,
    Scheme,
    Section,
    Train,
    check_image_size,
    check_sampling_steps,
)
from diffusion.validation import in_one_sentence


class Arm(Scheme):
    """A scheme as the experiment file writes it, with the arm it is matched to and its own training settings."""

    match: str | None = None
    """Another arm, whose expected gradient this one keeps by its weights."""
    weigh_twice: bool = False
    """Allows drawing by p2 *and* weighting the loss."""
    train: dict[str, Any] = {}
    """Keys of `train` that differ for this arm."""

    @model_validator(mode="after")
    def _consistent(self) -> "Arm":
        density, weight = self.timesteps.chosen[0], self.mse_weight.chosen[0]
        if density == "p2" and weight != "unweighted" and not (self.corrected or self.weigh_twice):
            raise ValueError(
                f"draws timesteps by p2 and weights the loss by {weight}, which weights twice: drop mse_weight, "
                "or say weigh_twice: true if it is meant, or importance_corrected: true"
            )
        if self.match and {"mse_weight", "vb_weight", "importance_corrected"} & self.model_fields_set:
            raise ValueError(
                "match sets both weights: drop mse_weight, vb_weight and importance_corrected, or drop match"
            )
        if not (self.correct_vb or self.match or self.corrected):
            raise ValueError("correct_vb: nothing is corrected: drop it, or say importance_corrected: true")
        return self


class EveryNSteps(Section):
    """Checkpoints from `start` (default: `every`) to `until`, `every` steps apart."""

    every: PositiveInt
    """Steps between checkpoints."""
    until: PositiveInt
    """No step lies beyond it."""
    start: int | None = Field(None, ge=0)
    """The first one; 0 is the untrained net; unset: `every`."""

    @property
    def steps(self) -> list[int]:
        """All of them, growing."""
        return list(range(self.every if self.start is None else self.start, self.until + 1, self.every))


class WeightsFile(Section):
    """Weights of a feature extractor on disk: a path, or with it the sha256 of others than the published ones."""

    path: Path
    """Of the file."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Unset: that of the published weights."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Evaluate(Section):
    """Samples against images of the dataset, by features of fixed nets."""

    features: tuple[str, ...] = Field(("inception-v3-compat",), min_length=1)
    """Feature extractors; the first one's is the primary comparison."""
    metrics: tuple[Literal["fd", "fd_infinity", "kid", "precision", "recall", "memorised"], ...] = Field(
        ("fd",), min_length=1
    )
    """`fd` among them, which the curves show."""
    reference: Literal["train", "held_out"] = "train"
    """Which part of the dataset."""
    reference_images: int | None = Field(None, ge=2)
    """How many of it; unset: all."""
    weights: dict[str, WeightsFile] = {}
    """Extractor -> its file of weights, where no network is: a path, or `{path: ..., sha256: ...}`."""

    @model_validator(mode="after")
    def _consistent(self) -> "Evaluate":
        for name in self.weights:
            if name not in self.features:
                raise ValueError(
                    f"weights: {name} is none of the features ({', '.join(self.features)}): drop or add it"
                )
        if "fd" not in self.metrics:
            raise ValueError("metrics: the curves show fd: add it")
        if self.reference == "held_out" and "memorised" in self.metrics:
            raise ValueError("metrics: memorised compares with the training images: say reference: train, or drop it")
        return self


class Probe(Section):
    """How loss and gradient of every checkpoint are measured in bins of timesteps: `diffusion.evaluation.probe`."""

    images: PositiveInt = 256
    """Of those held out from training, where there are any."""
    batch_size: PositiveInt = 16
    """Images in each of the batches whose gradients are compared."""
    bins: PositiveInt = 10
    """Of equal width in t."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "Probe":
        if self.images % self.batch_size or self.images < 2 * self.batch_size:
            raise ValueError(
                f"images {self.images} is not two or more batches of batch_size {self.batch_size}: choose a multiple"
            )
        return self


class Primary(Section):
    """The comparison that the study is made for."""

    candidate: str
    """An arm among the candidates."""
    metric: Literal["fd", "kid", "precision", "recall"] = "fd"
    """One of `evaluate.metrics`, in the first of `evaluate.features`."""


class Compare(Section):
    """Which arms are compared. One comparison is primary, the others are secondary."""

    baseline: str
    """An arm."""
    candidates: tuple[str, ...] = Field(min_length=1)
    """Arms that are compared with it."""
    primary: Primary
    """Declared before anything is seen."""
    thresholds: tuple[PositiveFloat, ...] | None = Field(None, min_length=1)
    """Values of the primary metric, for speed-ups; unset: at 1/4, 1/2 and 3/4 of the baseline's own way."""

    @model_validator(mode="after")
    def _arms_differ(self) -> "Compare":
        arms = [self.baseline, *self.candidates]
        for arm in self.candidates:
            if arms.count(arm) > 1:
                raise ValueError(f"{arm} is named twice, or is the baseline: name every arm once")
        return self


class Experiment(Section):
    """One study: arms x seeds on one dataset."""

    name: Name
    """That of the file, without .yaml."""
    dataset: Dataset
    """What is learnt."""
    model: Model = Model()
    """The net."""
    diffusion: Diffusion = Diffusion()
    """The noise."""
    train: Train = Train()
    """What one step does."""
    checkpoints: EveryNSteps | tuple[int, ...]
    """Steps at which a run is sampled and evaluated: regular ones, or a list."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """A run of every arm each; arms of a seed share all random numbers."""
    arms: dict[Name, Arm] = Field(min_length=1)
    """Name -> how it draws and weights timesteps."""
    sample: Sample = Sample()
    """How checkpoints are sampled."""
    evaluate: Evaluate = Evaluate()
    """What samples are compared with, and how."""
    probe: Probe | None = Probe()
    """How the mechanism is measured; null: not at all."""
    compare: Compare | None = None
    """What the verdict is on; unset: no verdict."""
    published: Path | None = None
    """A table of curves from elsewhere, laid in grey under the study's own; it enters no verdict."""
    tracking: bool = True
    """Whether MLflow tracks it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where nets run; auto: on a GPU if there is one."""
    processes: PositiveInt = 1
    """Data-parallel processes of one training run, a GPU each (on a CPU: `train.threads` threads each)."""

    RESERVED_ARMS: ClassVar[set[str]] = {"init"}
    RESERVED_NAMES: ClassVar[set[str]] = {"datasets", "references", "pages", "published"}

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice: drop one")
        return seeds

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_in_order(cls, value: EveryNSteps | tuple[int, ...]) -> EveryNSteps | tuple[int, ...]:
        steps = value.steps if isinstance(value, EveryNSteps) else list(value)
        if not steps or steps[-1] < 1 or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
            remedy = "put them in order" if steps else "list some, or raise until"
            raise ValueError(f"steps must grow from 0 or more to at least 1, but are {steps}: {remedy}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.name in self.RESERVED_NAMES:
            raise ValueError(f"name: results/{self.name}/ holds something else: choose another")
        check_image_size(self.dataset.image_size, self.model)
        check_sampling_steps(self.sample, self.diffusion.timesteps)
        needs_held_out = self.evaluate.reference == "held_out" or "memorised" in self.evaluate.metrics
        if needs_held_out and self.dataset.held_out < 2:
            raise ValueError("evaluate: needs images that training does not see: set dataset.held_out to 2 or more")
        if self.probe and self.probe.bins > self.diffusion.timesteps:
            raise ValueError(f"probe.bins: {self.probe.bins} bins for {self.diffusion.timesteps} timesteps: lower it")
        if self.probe and 0 < self.dataset.held_out < 2 * self.probe.batch_size:
            raise ValueError(
                f"probe.batch_size: {self.dataset.held_out} held-out images are not two batches of "
                f"{self.probe.batch_size}: lower it, or raise dataset.held_out"
            )
        for name in self.arms:
            self._check_arm(name)
        for name in [self.compare.baseline, *self.compare.candidates] if self.compare else []:
            if name not in self.arms:
                raise ValueError(f"compare: {name} is not among the arms: name one of {', '.join(self.arms)}")
        if self.compare and self.compare.primary.candidate not in self.compare.candidates:
            known, candidate = ", ".join(self.compare.candidates), self.compare.primary.candidate
            raise ValueError(f"compare.primary: {candidate} is not among the candidates: name one of {known}")
        if self.compare and self.compare.primary.metric not in self.evaluate.metrics:
            metric = self.compare.primary.metric
            raise ValueError(f"compare.primary.metric: {metric} is not evaluated: add it to evaluate.metrics")
        return self

    def _check_arm(self, name: str) -> None:
        arm = self.arms[name]
        if name in self.RESERVED_ARMS:
            raise ValueError(f"arms.{name}: this name is taken by the untrained net: choose another")
        if arm.match:
            target = self.arms.get(arm.match)
            if target is None or target.match:
                raise ValueError(
                    f"arms.{name}.match: {arm.match} is no other arm that is not matched itself: name such an arm"
                )
            if target.timesteps.learnt:
                raise ValueError(f"arms.{name}.match: the density of {arm.match} changes: match an arm whose stays")
        for key in ("timesteps", "mse_weight", "vb_weight"):
            tau = getattr(arm, key).chosen[1].get("tau", 0)
            if tau > self.diffusion.timesteps:
                raise ValueError(
                    f"arms.{name}.{key}.speed.tau: {tau} is beyond the {self.diffusion.timesteps} timesteps: lower it"
                )
        try:
            batch_size = self.run(name).train.batch_size
        except ValidationError as error:
            mistake = error.errors()[0]
            raise ValueError(
                f"arms.{name}.train{'.' if mistake['loc'] else ': '}{in_one_sentence(mistake, Train)}"
            ) from None
        if batch_size % self.processes:
            raise ValueError(
                f"processes: {self.processes} do not divide the batch_size {batch_size} of {name}: take a divisor"
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, growing; 0 is the untrained net."""
        return self.checkpoints.steps if isinstance(self.checkpoints, EveryNSteps) else list(self.checkpoints)

    @property
    def comparison(self) -> dict[str, Any]:
        """Which arms are compared: the section `compare`, or all with the first; and what a reader must know.

        `baseline`, `candidates`, `features` (of the primary comparison), `matched` (candidates that are matched to the
        baseline), and where there is a section `compare` its `primary` and `thresholds`.
        """
        first, *others = self.arms
        compare = {"baseline": first, "candidates": others}
        compare |= self.compare.model_dump(mode="json") if self.compare else {}
        matched = [arm for arm in compare["candidates"] if self.arms[arm].match == compare["baseline"]]
        return compare | {"features": self.evaluate.features[0], "matched": matched}

    def run(self, arm_name: str) -> RunConfig:
        """The run of an arm: shared sections, its own training settings, its scheme, and whom it is matched to."""
        arm = self.arms[arm_name]
        return RunConfig(
            dataset=self.dataset,
            model=self.model,
            diffusion=self.diffusion,
            train=Train(**{**self.train.model_dump(), **arm.train}),
            scheme=_scheme(arm),
            match=_scheme(self.arms[arm.match]) if arm.match else None,
            train_version=TRAIN_VERSION,
        )


def _scheme(arm: Arm) -> Scheme:
    return Scheme(**{name: getattr(arm, name) for name in Scheme.model_fields})
