"""Defines the keys of a study file. A study compares training schemes (arms) on one dataset, with several seeds.

`Experiment` is one study, and `Experiment.run(arm)` returns the settings of one arm as a `RunConfig`. This module does
not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from convergence.tuning import Tune, Tuned, arm_content, number_at, values_text
from diffusion.averages import RAW, Averages, average_name
from diffusion.config import (
    MAX_INTEGER,
    MAX_NAME,
    TRAIN_VERSION,
    BatchSize,
    Dataset,
    Diffusion,
    Model,
    Name,
    Net,
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
from diffusion.net_size import check_net_size
from diffusion.section import Distinct, Section
from diffusion.validation import first_mistake

MAX_CHECKPOINTS = 100_000  # each is three jobs, which Snakemake plans at once
MAX_SAMPLE_BYTES = 10**12  # the samples of a checkpoint are in memory together


Percent = Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")]
DEFAULT_MARGIN = "2%"


@dataclass(frozen=True)
class KeysOf:
    """Annotates a dict, so that the JSON schema describes the dict as a section."""

    section: type[Section]

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler.resolve_ref_schema(handler(self.section.__pydantic_core_schema__))


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
        tuple[Literal["fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage", "memorised"], ...],
        Distinct,
    ] = Field(("fd",), min_length=1)
    """Metrics to compute. `fd` is required, because the curves show it."""
    reference: Literal["train", "held_out"] = "train"
    """Images of the dataset that samples are compared with: training images or held-out images."""
    reference_images: int | None = Field(None, ge=2, le=MAX_INTEGER)
    """Number of images that samples are compared with. Unset: all training images or all held-out images, as \
`reference` says."""
    ema: Averages | None = None
    """Averages of the weights to sample and measure, from those in `train.ema_decay`; `raw`: the weights themselves, \
which are then kept. The primary comparison uses the first one. Unset: the first one in `ema_decay` of each arm."""
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
    metric: Literal["fd", "kid", "precision", "recall", "density", "coverage"] = "fd"
    """Metric of the comparison: one of `evaluate.metrics`, computed from the first of `evaluate.features`."""


class Pair(Section):
    """Two arms that are compared."""

    baseline: str
    """Arm that the candidate is compared with."""
    candidate: str
    """Arm that is compared with the baseline."""

    def __str__(self) -> str:
        return f"{self.candidate} against {self.baseline}"


class Compare(Section):
    """The comparisons of arms in the verdict. One comparison is primary; all others are secondary."""

    baseline: str
    """Arm that the candidates are compared with."""
    candidates: tuple[str, ...] = Field(min_length=1)
    """Arms that are compared with the baseline."""
    primary: Primary
    """The comparison that the study is made for. Choose it before the first result."""
    also: Annotated[tuple[Pair, ...], Distinct] = ()
    """Further pairs of arms. Their comparisons are secondary."""
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
        for pair in self.also:
            if pair.baseline == pair.candidate:
                raise ValueError(f"also: {pair.baseline} is compared with itself: name two arms")
            if pair.baseline == self.baseline and pair.candidate in self.candidates:
                raise ValueError(f"also: {pair} is compared already: remove this pair")
        return self


class Experiment(Section):
    """One study: a file `experiments/<name>.yaml`."""

    name: Name
    """Name of the study; equal to the file name without .yaml."""
    dataset: Dataset
    """Training images."""
    model: Net = Model()
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
    tune: Tune | None = None
    """Trials that choose settings for each arm (`convergence tune`); unset: none."""
    tuned: Tuned | None = None
    """The trials that this study follows from. `convergence tune` writes this section, and the verdict states it."""
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
        for name, arm in self.arms.items():
            self._check_sections(name, arm)
        for name, arm in self.arms.items():
            self._check_arm(name, arm)
        if self.compare:
            self._check_compare(self.compare)
        if self.tune:
            self._check_tune(self.tune)
        if self.tuned:
            self._check_tuned(self.tuned)
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

    def _check_sections(self, name: str, arm: Arm) -> None:
        if "timesteps" in arm.diffusion:
            raise ValueError(f"arms.{name}.diffusion.timesteps: all arms have the same: set diffusion.timesteps")
        for key in ("train", "diffusion"):
            try:
                self._section(arm, key)
            except ValidationError as error:
                separator = "." if error.errors()[0]["loc"] else ": "
                mistake = first_mistake(error, type(getattr(self, key)))
                raise ValueError(f"arms.{name}.{key}{separator}{mistake}") from None

    def _check_arm(self, name: str, arm: Arm) -> None:
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
            run = self._run(arm)
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
        train = run.train
        if train.decay and not train.decay.steps.to and self.steps[-1] > train.decay.steps.until:
            raise ValueError(
                f"arms.{name}.train.decay: the learning rate of {name} is 0 after step {train.decay.steps.until}, but "
                f"the last checkpoint is at step {self.steps[-1]}: raise until, or set `to`"
            )
        if train.batch_size % self.processes:
            raise ValueError(
                f"processes: {self.processes} does not divide the batch_size {train.batch_size} of {name}: choose a "
                "divisor"
            )
        for average in self.evaluate.ema or ():
            if average not in train.averages:
                kept = ", ".join(map(average_name, train.averages))
                raise ValueError(
                    f"evaluate.ema: {name} does not keep the average {average_name(average)} (it keeps {kept}): add it "
                    "to ema_decay, or remove it"
                )

    def _check_compare(self, compare: Compare) -> None:
        also = [name for pair in compare.also for name in (pair.baseline, pair.candidate)]
        for name in [compare.baseline, *compare.candidates, *also]:
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

    def _check_tune(self, tune: Tune) -> None:
        if self.compare is None:
            raise ValueError("tune: the best values are those with the best primary metric: add the section compare")
        self._check_trial_seeds("tune", tune.seeds)
        trained = [step for step in self.steps if step]
        if tune.until not in trained:
            nearest = min(trained, key=lambda step: abs(step - tune.until))
            raise ValueError(f"tune.until: {tune.until} is not the step of a checkpoint: use {nearest}")
        if not 1 <= len(tune.grid) <= 2:
            raise ValueError(
                f"tune: {len(tune.grid)} keys are tuned: write one or two keys with a list of values each, such as "
                "learning_rate: [1e-3, 2e-3]"
            )
        if "batch_size" in tune.grid:
            raise ValueError(
                "tune.batch_size: trials are compared at equal training images, and other batch sizes have checkpoints "
                "at other images: make a study of each batch size"
            )
        for key in tune.grid:
            targets = [arm.match for arm in self.arms.values() if arm.match]
            if "." in key and any(number_at(self.run(target), key) is not None for target in targets):
                raise ValueError(
                    f"tune.{key}: {targets[0]} is matched by another arm, which would keep the untuned weights: remove "
                    "the arm with match, or tune keys of train only"
                )
            if all(number_at(self.run(arm), key) is None for arm in self.arms):
                raise ValueError(
                    f"tune.{key}: no arm has a number at this key: tune a numeric key of train, such as learning_rate, "
                    "or of an arm's scheme, such as timesteps.p2.gamma"
                )
        for name in self.arms:
            if len(f"{name}_tuned") > MAX_NAME or f"{name}_tuned" in self.arms:
                raise ValueError(f"arms.{name}: the name {name}_tuned must be free and not too long: rename the arm")
            for values in self.grid(name):
                try:
                    self._check_arm(name, self.arm(name, values))
                except ValueError as error:
                    raise ValueError(f"tune: {values_text(values)}: {first_mistake(error, Arm)}") from None
        if len(f"{self.name}_tuned") > MAX_NAME:
            raise ValueError(f"name: {self.name}_tuned has more than {MAX_NAME} letters: choose a shorter name")

    def _check_tuned(self, tuned: Tuned) -> None:
        self._check_trial_seeds("tuned", tuned.seeds)
        for name, best in tuned.arms.items():
            for arm in (name, best.arm):
                if arm not in self.arms:
                    raise ValueError(f"tuned.arms.{name}: there is no arm {arm}: run convergence tune {tuned.study}")
            run = self.run(best.arm)
            for key, value in best.values.items():
                if number_at(run, key) != value:
                    raise ValueError(
                        f"tuned.arms.{name}: {key} of {best.arm} is {number_at(run, key)} instead of {value:g}: "
                        "correct it, or remove the section tuned"
                    )

    def _check_trial_seeds(self, section: str, seeds: tuple[int, ...]) -> None:
        planned = {*self.seeds, *(self.compare and self.compare.planned_seeds or ())}
        if both := planned & set(seeds):
            raise ValueError(
                f"{section}.seeds: {min(both)} is also a seed of the study, so the verdict would use a trial: choose "
                "other seeds"
            )

    @property
    def text(self) -> str:
        """Content of the study file when it was read. The file may change later."""
        return self._text

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints in ascending order; 0 is the untrained net."""
        return self.checkpoints.steps if isinstance(self.checkpoints, EveryNSteps) else list(self.checkpoints)

    @property
    def tuned_keys(self) -> list[str]:
        """Keys whose values are tried in `tune`."""
        return list(self.tune.grid) if self.tune else []

    def grid(self, arm_name: str) -> list[dict[str, float]]:
        """Returns the values of each trial of one arm, at the tuned keys that the arm has; [] if it has none."""
        run, keys = self.run(arm_name), self.tune.grid if self.tune else {}
        lists = {key: values for key, values in keys.items() if number_at(run, key) is not None}
        return [dict(zip(lists, values, strict=True)) for values in product(*lists.values()) if values]

    def run(self, arm_name: str, values: Mapping[str, float] | None = None) -> RunConfig:
        """Returns the settings of one arm: the sections of the study, the arm's `train` keys, and the arm's scheme.

        Args:
            arm_name: name of the arm.
            values: values of a trial, which replace those of the arm at the tuned keys.
        """
        return self._run(self.arm(arm_name, values or {}))

    def arm(self, arm_name: str, values: Mapping[str, float]) -> Arm:
        """Returns an arm with the values of a trial at the tuned keys."""
        return Arm.model_validate(arm_content(self.arms[arm_name], values)) if values else self.arms[arm_name]

    def _run(self, arm: Arm) -> RunConfig:
        target = self.arms[arm.match] if arm.match else None
        diffusion = self._section(arm, "diffusion")
        other = self._section(target, "diffusion") if target else diffusion
        train = self._section(arm, "train")
        if RAW in (self.evaluate.ema or ()) and RAW not in train.averages:
            train = train.model_copy(update={"ema_decay": (*train.averages, RAW)})
        return RunConfig(
            dataset=self.dataset,
            model=self.model,
            diffusion=diffusion,
            train=train,
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
