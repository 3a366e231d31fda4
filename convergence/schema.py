"""Defines the keys of a study file. A study compares training schemes (arms) on one dataset, with several seeds.

`Experiment` is one study, and `Experiment.run(arm)` returns the settings of one arm as a `RunConfig`. This module does
not import torch.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from diffusion.config import (
    MAX_INTEGER,
    TRAIN_VERSION,
    BatchSize,
    Dataset,
    Diffusion,
    Model,
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    Sample,
    Scheme,
    Seed,
    Train,
    UserPath,
    check_image_size,
    check_sampling_steps,
)
from diffusion.errors import InputError
from diffusion.nets.size import check_net_size
from diffusion.section import Section
from diffusion.validation import first_mistake

MAX_CHECKPOINTS = 100_000  # each is three jobs, which Snakemake plans at once
MAX_SAMPLE_BYTES = 10**12  # the samples of a checkpoint are in memory together


def _distinct(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values and len(set(values)) < len(values):
        raise ValueError(f"{max(values, key=values.count)} appears twice: remove one")
    return values


Distinct = AfterValidator(_distinct)
Percent = Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")]
DEFAULT_MARGIN = "2%"


@dataclass(frozen=True)
class KeysOf:
    """Annotates a dict, so that the JSON schema describes the dict as a section."""

    section: type[Section]

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self.section.__pydantic_core_schema__)


class Arm(Scheme):
    """One training scheme of the study."""

    match: str | None = None
    """Name of another arm. The loss weights of this arm are chosen so that both arms have equal expected gradients."""
    weigh_twice: bool = False
    """Allows this arm to draw timesteps by p2 and also to weight the loss."""
    train: Annotated[dict[str, Any], KeysOf(Train)] = {}
    """Keys of `train` that have another value in this arm."""
    diffusion: Annotated[dict[str, Any], KeysOf(Diffusion)] = {}
    """Keys of `diffusion` that have another value in this arm; all arms have the same number of timesteps."""

    @model_validator(mode="after")
    def _consistent(self) -> "Arm":
        density, weight = self.timesteps.chosen[0], self.mse_weight.chosen[0]
        if density == "p2" and weight != "unweighted" and not (self.corrected or self.weigh_twice):
            raise ValueError(
                f"draws timesteps by p2 and weights the loss by {weight}, so the weight is applied twice: remove "
                "mse_weight, or set importance_corrected: true, or set weigh_twice: true if this is intended"
            )
        if self.match and {"mse_weight", "vb_weight", "importance_corrected"} & self.model_fields_set:
            raise ValueError(
                "match sets both weights: remove mse_weight, vb_weight and importance_corrected, or remove match"
            )
        if not (self.correct_vb or self.match or self.corrected):
            raise ValueError(
                "correct_vb: false has no effect without match or importance_corrected: remove it, or set "
                "importance_corrected: true"
            )
        return self


class EveryNSteps(Section):
    """Checkpoints at regular intervals."""

    every: PositiveInt
    """Steps between two checkpoints."""
    until: PositiveInt
    """Upper limit of the steps (inclusive)."""
    start: NonNegativeInt | None = None
    """Step of the first checkpoint; 0 is the untrained net. Unset: the value of `every`."""

    @model_validator(mode="after")
    def _few(self) -> "EveryNSteps":
        if len(self._range) > MAX_CHECKPOINTS:
            raise ValueError(f"these are {len(self._range):,} checkpoints: raise every, or lower until")
        return self

    @property
    def _range(self) -> range:
        return range(self.every if self.start is None else self.start, self.until + 1, self.every)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints in ascending order."""
        return list(self._range)


class WeightsFile(Section):
    """Local file with the weights of a feature extractor: a path, or a path with a SHA-256."""

    path: UserPath
    """File with the weights."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the file. Unset: the SHA-256 of the published weights."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "format": "path"}, handler(core_schema)]}


class Evaluate(Section):
    """How sampled images are compared with images of the dataset: by features that pretrained nets compute."""

    features: Annotated[tuple[str, ...], Distinct] = Field(("inception-v3-compat",), min_length=1)
    """Feature extractors. The primary comparison uses the first one."""
    metrics: Annotated[
        tuple[Literal["fd", "fd_infinity", "kid", "precision", "recall", "memorised"], ...], Distinct
    ] = Field(("fd",), min_length=1)
    """Metrics to compute. `fd` is required, because the curves show it."""
    reference: Literal["train", "held_out"] = "train"
    """Images of the dataset that samples are compared with: training images or held-out images."""
    reference_images: int | None = Field(None, ge=2, le=MAX_INTEGER)
    """Number of images that samples are compared with. Unset: all training images or all held-out images, as \
`reference` says."""
    weights: dict[str, WeightsFile] = {}
    """Feature extractor -> local file with its weights, for machines without a network."""

    @model_validator(mode="after")
    def _consistent(self) -> "Evaluate":
        for name in self.weights:
            if name not in self.features:
                raise ValueError(f"weights: {name} is not one of the features ({', '.join(self.features)}): remove it")
        if "fd" not in self.metrics:
            raise ValueError("metrics: must include fd, which the curves show: add it")
        if self.reference == "held_out" and "memorised" in self.metrics:
            raise ValueError("metrics: memorised needs training images: set reference: train, or remove memorised")
        return self


class Probe(Section):
    """How the loss and the gradient noise of a checkpoint are measured in bins of timesteps.

    The measurement is defined in `diffusion.evaluation.probe`.
    """

    images: BatchSize = 256
    """Number of images; held-out images if the dataset has any, otherwise training images."""
    batch_size: BatchSize = 16
    """Images per batch. The gradients of different batches are compared."""
    bins: PositiveInt = 10
    """Number of bins of timesteps, all of the same width."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "Probe":
        if self.images % self.batch_size or self.images < 2 * self.batch_size:
            raise ValueError(
                f"images {self.images} is not two or more whole batches of batch_size {self.batch_size}: set images to "
                f"{2 * self.batch_size}, {3 * self.batch_size}, ... or change batch_size"
            )
        return self


class Primary(Section):
    """The comparison that answers the question of the study."""

    candidate: str
    """Arm that is compared with the baseline: one of `candidates`."""
    metric: Literal["fd", "kid", "precision", "recall"] = "fd"
    """Metric of the comparison: one of `evaluate.metrics`, computed from the first of `evaluate.features`."""


class Compare(Section):
    """The comparisons of arms in the verdict. One comparison is primary; all others are secondary."""

    baseline: str
    """Arm that the candidates are compared with."""
    candidates: tuple[str, ...] = Field(min_length=1)
    """Arms that are compared with the baseline."""
    primary: Primary
    """The comparison that the study is made for. Choose it before the first result."""
    thresholds: Annotated[tuple[PositiveFloat, ...] | None, Distinct] = Field(None, min_length=1)
    """Values of the primary metric. For each value, the numbers of training images that the arms need to reach this \
value are compared. The verdict uses the middle value. Unset: the lowest value that all planned runs reach."""
    planned_seeds: Annotated[tuple[Seed, ...] | None, Distinct] = Field(None, min_length=1)
    """Seeds that decide the verdict. The verdict is interim until the runs of all these seeds are evaluated. Unset: \
the value of `seeds` when the first checkpoint is evaluated."""
    margin: Percent | PositiveFloat | None = None
    """Largest change of the primary metric that counts as the same: a percentage for fd (unset: 2%), a number for \
other metrics (no default)."""

    @model_validator(mode="after")
    def _arms_differ(self) -> "Compare":
        arms = [self.baseline, *self.candidates]
        for arm in self.candidates:
            if arms.count(arm) > 1:
                raise ValueError(f"{arm} appears twice among baseline and candidates: name every arm once")
        return self


class Experiment(Section):
    """One study: a file `experiments/<name>.yaml`."""

    name: Name
    """Name of the study; equal to the file name without .yaml."""
    dataset: Dataset
    """Training images."""
    model: Model = Model()
    """The net."""
    diffusion: Diffusion = Diffusion()
    """The forward process, which adds noise."""
    train: Train = Train()
    """Optimisation settings of all arms."""
    checkpoints: EveryNSteps | tuple[int, ...]
    """Steps at which checkpoints are saved, sampled and evaluated: at regular intervals, or a list of steps."""
    seeds: Annotated[tuple[Seed, ...], Distinct] = Field(min_length=1)
    """Each arm is trained once per seed. Arms with the same seed share initial weights, data order, noise, most \
timesteps and latents."""
    arms: dict[Name, Arm] = Field(min_length=1, json_schema_extra={"additionalProperties": False})
    """Name of an arm -> its training scheme."""
    sample: Sample = Sample()
    """How images are sampled from checkpoints."""
    evaluate: Evaluate = Evaluate()
    """How sampled images are evaluated."""
    probe: Probe | None = Probe()
    """How the loss and the gradient noise of checkpoints are measured; null: not at all."""
    compare: Compare | None = None
    """The comparisons of the verdict; unset: the study has no verdict."""
    external_curves: UserPath | None = None
    """CSV file of curves from other people. These curves are drawn in grey and are not used for the verdict."""
    tracking: bool = True
    """Whether the results of the study are sent to MLflow."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the nets; auto: a GPU if there is one, otherwise the CPU."""
    processes: int = Field(1, gt=0, le=1024)
    """Number of data-parallel processes per training run. Each process has one GPU (on a CPU: `train.threads` \
threads)."""

    _text: str = PrivateAttr("")
    RESERVED_ARMS: ClassVar[set[str]] = {"init"}
    RESERVED_NAMES: ClassVar[set[str]] = {"datasets", "references", "studies", "pages", "published"}

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_ascend(cls, value: EveryNSteps | tuple[int, ...]) -> EveryNSteps | tuple[int, ...]:
        steps = value.steps if isinstance(value, EveryNSteps) else list(value)
        if not steps or steps[-1] < 1 or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
            remedy = "put them in order" if steps else "add some, or raise until"
            raise ValueError(f"steps must be increasing, none below 0 and the last above 0, but are {steps}: {remedy}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.name in self.RESERVED_NAMES:
            raise ValueError(f"name: results/{self.name}/ is reserved: choose another name")
        checkpoints = len(self.arms) * len(self.seeds) * len(self.steps)
        if checkpoints > MAX_CHECKPOINTS:
            raise ValueError(
                f"arms x seeds x checkpoints: {checkpoints:,} are more than the {MAX_CHECKPOINTS:,} that Snakemake can "
                "plan: use fewer"
            )
        self._check_sizes()
        for name in self.arms:
            self._check_sections(name)
        for name in self.arms:
            self._check_arm(name)
        if self.compare:
            self._check_compare(self.compare)
        return self

    def _check_sizes(self) -> None:
        dataset, probe = self.dataset, self.probe
        try:
            check_image_size(dataset.image_size, self.model)
            check_net_size(self.model, dataset.image_size)
        except InputError as error:
            raise ValueError(f"model and dataset.image_size: {error}") from None
        sample_bytes = 3 * self.sample.images * dataset.image_size**2
        if sample_bytes > MAX_SAMPLE_BYTES:
            raise ValueError(f"sample.images: {self.sample.images:,} need {sample_bytes / 1e9:,.0f} GB: lower it")
        needs_held_out = self.evaluate.reference == "held_out" or "memorised" in self.evaluate.metrics
        if needs_held_out and dataset.held_out < 2:
            raise ValueError(
                "evaluate: needs images that are excluded from training: set dataset.held_out to 2 or more"
            )
        if probe and probe.bins > self.diffusion.timesteps:
            raise ValueError(
                f"probe.bins: {probe.bins} is more than the {self.diffusion.timesteps} timesteps: lower it"
            )
        if probe and 0 < dataset.held_out < 2 * probe.batch_size:
            raise ValueError(
                f"probe.batch_size: {dataset.held_out} held-out images do not give two batches of "
                f"{probe.batch_size}: lower it, or raise dataset.held_out"
            )

    def _check_sections(self, name: str) -> None:
        arm = self.arms[name]
        if "timesteps" in arm.diffusion:
            raise ValueError(f"arms.{name}.diffusion.timesteps: all arms have the same: set diffusion.timesteps")
        for key in ("train", "diffusion"):
            try:
                self._section(arm, key)
            except ValidationError as error:
                separator = "." if error.errors()[0]["loc"] else ": "
                mistake = first_mistake(error, type(getattr(self, key)))
                raise ValueError(f"arms.{name}.{key}{separator}{mistake}") from None

    def _check_arm(self, name: str) -> None:
        arm = self.arms[name]
        if name in self.RESERVED_ARMS:
            raise ValueError(f"arms.{name}: this name is reserved for the untrained net: choose another name")
        if arm.match:
            target = self.arms.get(arm.match)
            if target is None or target.match:
                raise ValueError(
                    f"arms.{name}.match: {arm.match} cannot be matched: match must name another arm that has no "
                    "`match` of its own"
                )
            if target.timesteps.learned:
                raise ValueError(
                    f"arms.{name}.match: the density of {arm.match} changes during training: match an arm with a "
                    "constant density"
                )
        for key in ("timesteps", "mse_weight", "vb_weight"):
            tau = getattr(arm, key).chosen[1].get("tau", 0)
            if tau > self.diffusion.timesteps:
                raise ValueError(
                    f"arms.{name}.{key}.speed.tau: {tau} exceeds the {self.diffusion.timesteps} timesteps: lower it"
                )
        try:
            run = self.run(name)
        except ValidationError as error:
            raise ValueError(f"arms.{name}: {first_mistake(error, RunConfig)}") from None
        if run.match_diffusion and run.match_diffusion.schedule != run.diffusion.schedule:
            raise ValueError(
                f"arms.{name}.match: {arm.match} has another diffusion.schedule, so its timesteps have other noise "
                "levels: match an arm with the same schedule"
            )
        try:
            check_sampling_steps(self.sample, run.diffusion.timesteps, run.diffusion.ancestral)
        except InputError as error:
            raise ValueError(f"sample: {error}") from None
        batch_size = run.train.batch_size
        if batch_size % self.processes:
            raise ValueError(
                f"processes: {self.processes} does not divide the batch_size {batch_size} of {name}: choose a divisor"
            )

    def _check_compare(self, compare: Compare) -> None:
        for name in [compare.baseline, *compare.candidates]:
            if name not in self.arms:
                raise ValueError(f"compare: {name} is not among the arms: choose from {', '.join(self.arms)}")
        if compare.primary.candidate not in compare.candidates:
            known = ", ".join(compare.candidates)
            raise ValueError(
                f"compare.primary: {compare.primary.candidate} is not among the candidates: choose from {known}"
            )
        metric, margin = compare.primary.metric, compare.margin
        if metric not in self.evaluate.metrics:
            raise ValueError(f"compare.primary.metric: {metric} is not evaluated: add it to evaluate.metrics")
        if margin is not None and (metric == "fd") != isinstance(margin, str):
            kind = "a percentage such as 2%" if metric == "fd" else "a change of it, without %"
            raise ValueError(f"compare.margin: {margin} does not fit the metric {metric}: write {kind}")

    @property
    def text(self) -> str:
        """Content of the study file when it was read. The file may change later."""
        return self._text

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints in ascending order; 0 is the untrained net."""
        return self.checkpoints.steps if isinstance(self.checkpoints, EveryNSteps) else list(self.checkpoints)

    def run(self, arm_name: str) -> RunConfig:
        """Returns the settings of one arm: the sections of the study with the arm's keys, and the arm's scheme."""
        arm = self.arms[arm_name]
        target = self.arms[arm.match] if arm.match else None
        diffusion = self._section(arm, "diffusion")
        other = self._section(target, "diffusion") if target else diffusion
        return RunConfig(
            dataset=self.dataset,
            model=self.model,
            diffusion=diffusion,
            train=self._section(arm, "train"),
            scheme=_scheme(arm),
            match=_scheme(target) if target else None,
            match_diffusion=other if other != diffusion else None,
            train_version=TRAIN_VERSION,
        )

    def _section(self, arm: Arm, key: Literal["train", "diffusion"]) -> Any:
        """Returns a section of the study with the keys of an arm."""
        section = getattr(self, key)
        return type(section)(**{**section.model_dump(), **getattr(arm, key)})


def _scheme(arm: Arm) -> Scheme:
    return Scheme(**{name: getattr(arm, name) for name in Scheme.model_fields})
