"""The experiment file: its schema and defaults, validated once, without torch.

An `Experiment` is one study. `Experiment.run(arm)` gives the `RunConfig` of an arm: exactly what determines a training
run, and therefore what its directory is named after.
"""

import difflib
import hashlib
import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from diffusion import StudyError

# Bump by hand when a change in `diffusion/` alters what a run computes: every run then starts a new directory.
TRAIN_VERSION = 2

GROUP_NORM_GROUPS = 32
# Files of a folder or zip that are taken for pictures.
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ImageSize = Annotated[int, Field(ge=8)]
Precision = Literal["auto", "fp32", "bf16"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=40)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Choice(Section):
    """A scheme by name, with or without parameters: `uniform`, or `{p2: {gamma: 0.5}}`. Exactly one field is set."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"name exactly one of {', '.join(cls.model_fields)}")
        return {name: {} if parameters is None else parameters for name, parameters in value.items()}

    @property
    def chosen(self) -> tuple[str, dict[str, float]]:
        """(name, parameters) of the scheme that was chosen."""
        name = next(iter(self.model_fields_set))
        return name, getattr(self, name).model_dump()


class NoParameters(Section):
    """A scheme without parameters."""


class P2(Section):
    """1 / (k + SNR)^gamma."""

    gamma: NonNegativeFloat = 0.5
    """0 is uniform."""
    k: PositiveFloat = 1.0
    """Keeps the weight of nearly clean images finite."""


class LossSecondMoment(Section):
    """sqrt(E[L_t^2]), learnt from the losses."""

    history: PositiveInt = 10
    """Losses remembered for each timestep; draws are uniform until all have so many."""
    uniform_share: float = Field(0.001, ge=0, le=1)
    """Share of uniform draws, so that no timestep is forgotten."""


class LogNormalSigma(Section):
    """ln(sigma) is normal."""

    mean: float = -1.2
    """Of ln(sigma), sigma = SNR^(-1/2)."""
    std: PositiveFloat = 1.2
    """Of ln(sigma)."""


class LogitNormal(Section):
    """logit(t / T) is normal."""

    mean: float = 0.0
    """Of logit(t / T); above 0: noisier."""
    std: PositiveFloat = 1.0
    """Of logit(t / T)."""


class SpeedDensity(Section):
    """SpeeD's draws."""

    k: PositiveFloat = 5.0
    """How many times as likely t < tau is."""
    tau: PositiveInt = 700
    """A timestep; at most `diffusion.timesteps`."""


class MinSNR(Section):
    """min(SNR, gamma) / SNR."""

    gamma: PositiveFloat = 5.0
    """SNR from which on a timestep weighs less."""


class SpeedWeight(Section):
    """SpeeD's weight."""

    lam: float = Field(0.6, ge=0.5, lt=1)
    """Weights run from 1 - lam to lam for t < tau."""
    tau: PositiveInt = 700
    """A timestep; at most `diffusion.timesteps`."""


class Density(Choice):
    """How timesteps are drawn: one of these. The functions are in `diffusion.timesteps`."""

    uniform: NoParameters | None = None
    """1 / T (Ho et al. 2020)."""
    p2: P2 | None = None
    """By the weight of Choi et al. 2022."""
    loss_second_moment: LossSecondMoment | None = None
    """Learnt (Nichol & Dhariwal 2021)."""
    log_normal_sigma: LogNormalSigma | None = None
    """Karras et al. 2022."""
    logit_normal: LogitNormal | None = None
    """Esser et al. 2024."""
    speed: SpeedDensity | None = None
    """SpeeD (Wang et al. 2024)."""

    @property
    def learnt(self) -> bool:
        """Whether it follows the losses during training."""
        return self.loss_second_moment is not None


class Weight(Choice):
    """How a term of the loss is weighted at timestep t: one of these. The functions are in `diffusion.losses`."""

    unweighted: NoParameters | None = None
    """1 (Ho et al. 2020)."""
    p2: P2 | None = None
    """Choi et al. 2022."""
    min_snr: MinSNR | None = None
    """Hang et al. 2023."""
    debiased: NoParameters | None = None
    """1 / sqrt(SNR) (Yu et al. 2023)."""
    speed: SpeedWeight | None = None
    """SpeeD (Wang et al. 2024)."""


# The order of keys in these four is hashed (`workflow.layout.pixels`): new ones go last, with a default.
class OpenMoji(Section):
    """Colour emoji from a package that is installed."""

    source: Literal["openmoji"]
    image_size: ImageSize
    """Height and width in pixels."""
    held_out: int = Field(0, ge=0)
    """Images that training does not see, for probes and for `evaluate.reference: held_out`."""


class Folder(Section):
    """Every picture below a folder, or in a zip."""

    source: Literal["folder"]
    path: Path
    """Of the folder or zip; relative to where Snakemake runs."""
    image_size: ImageSize
    """Height and width in pixels."""
    pad: int = Field(0, ge=0)
    """Black pixels added at every side, before the picture is reduced."""
    held_out: int = Field(0, ge=0)
    """Images that training does not see."""

    @field_validator("path")
    @classmethod
    def _home(cls, path: Path) -> Path:
        return path.expanduser()


class Torchvision(Section):
    """A dataset that torchvision fetches, or finds in `data/`."""

    source: Literal["torchvision"]
    name: str
    """Of a class in `torchvision.datasets`."""
    splits: tuple[str, ...] = Field(("train",), min_length=1)
    """One after the other."""
    image_size: ImageSize
    """Height and width in pixels."""
    pad: int = Field(0, ge=0)
    """Black pixels added at every side, before the picture is reduced."""
    held_out: int = Field(0, ge=0)
    """Images that training does not see."""


class HuggingFace(Section):
    """An image dataset of the Hugging Face hub (needs the package `datasets`)."""

    source: Literal["huggingface"]
    name: str
    """On the hub, or a folder of that layout."""
    split: str = "train"
    """Which part."""
    column: str = "image"
    """Where its pictures are."""
    revision: str | None = None
    """Commit, tag or branch on the hub; pins it."""
    image_size: ImageSize
    """Height and width in pixels."""
    pad: int = Field(0, ge=0)
    """Black pixels added at every side, before the picture is reduced."""
    held_out: int = Field(0, ge=0)
    """Images that training does not see."""


Dataset = Annotated[OpenMoji | Folder | Torchvision | HuggingFace, Field(discriminator="source")]


class Model(Section):
    """The ADM U-Net (Dhariwal & Nichol 2021); keys are the keyword arguments of `diffusion.unet.UNet`."""

    channels: PositiveInt = 128
    """Width at full resolution."""
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 2, 2), min_length=1)
    """Width of each level in `channels`; each level after the first halves height and width."""
    res_blocks: PositiveInt = 2
    """Residual blocks of a level on the way down."""
    attention_resolutions: tuple[PositiveInt, ...] = (16,)
    """Heights in pixels at which there is attention; the middle always has it."""
    head_channels: PositiveInt = 64
    """Width of an attention head."""
    heads: PositiveInt | None = None
    """Attention heads at every width, in place of `head_channels`."""
    scale_shift_norm: bool = True
    """Whether the timestep scales and shifts, or is added."""
    resblock_updown: bool = True
    """Whether residual blocks resize, or convolutions."""
    learn_sigma: bool = True
    """Whether the variance is learnt; without it the loss has no vb term."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, within residual blocks."""

    @model_validator(mode="after")
    def _channels_divide(self) -> "Model":
        widths = {self.channels * multiplier for multiplier in self.channel_mult}
        if any(width % GROUP_NORM_GROUPS for width in widths):
            raise ValueError(
                f"channels x channel_mult gives widths {sorted(widths)}, but each must be a multiple of "
                f"{GROUP_NORM_GROUPS}: change channels"
            )
        return self

    @model_validator(mode="after")
    def _heads_once(self) -> "Model":
        if self.heads and "head_channels" in self.model_fields_set:
            raise ValueError("heads and head_channels both say how many attention heads there are: drop one of them")
        return self


class Diffusion(Section):
    """The noise: `diffusion.gaussian`."""

    timesteps: int = Field(1000, ge=2)
    """T."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Of the betas: Ho et al. 2020, or Nichol & Dhariwal 2021."""


class Train(Section):
    """What one optimiser step does. A step is one batch of `batch_size` images, in pieces of `micro_batch`."""

    batch_size: PositiveInt = 256
    """Images per step."""
    micro_batch: PositiveInt | None = None
    """Images whose gradients are computed at once; unset: the whole batch."""
    learning_rate: PositiveFloat = 1e-4
    """Of AdamW."""
    learning_rate_warmup: int = Field(0, ge=0)
    """Steps in which it grows from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Per step, of the averaged weights that are sampled."""
    ema_warmup: bool = True
    """Whether the decay grows to its value, so that untrained weights are soon forgotten."""
    random_flip: bool = False
    """Whether pictures are mirrored with probability 1/2."""
    precision: Precision = "auto"
    """Of the net: bf16 on a GPU and fp32 on a CPU, unless said."""
    threads: PositiveInt = 1
    """CPU threads of each job of the study."""
    log_every: PositiveInt = 50
    """Steps between rows of the log."""

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> "Train":
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}: choose a divisor"
            )
        return self


class Scheme(Section):
    """How the timesteps of a run are drawn and weighted."""

    timesteps: Density = Density(uniform=NoParameters())
    """Density that timesteps are drawn from."""
    stratified: bool = False
    """One shared offset for the whole batch: its timesteps cover the density evenly."""
    mse_weight: Weight = Weight(unweighted=NoParameters())
    """Of the term that trains the mean."""
    vb_weight: Weight = Weight(unweighted=NoParameters())
    """Of the term that trains the variance."""
    importance_corrected: bool | None = None
    """Weights over T p_t: the expected gradient is that of uniform draws; unset: as the density's paper has it."""
    correct_vb: bool = True
    """Whether the correction, or the match, also reaches the vb term."""

    @property
    def corrected(self) -> bool:
        """Whether the weights are divided by T p_t."""
        if self.importance_corrected is None:
            return self.timesteps.learnt
        return self.importance_corrected


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


class Regular(Section):
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


class Sample(Section):
    """How every checkpoint is sampled."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Song et al. 2021 (eta = 0), or Ho et al. 2020."""
    steps: PositiveInt = 25
    """Evaluations of the net per sample."""
    images: int = Field(10_000, ge=2)
    """Samples of a checkpoint: the N of its FD."""
    batch_size: PositiveInt | None = None
    """Images at once; unset: what the memory of a GPU holds."""
    precision: Precision = "auto"
    """As `train.precision`."""
    seed: int = Field(0, ge=0)
    """Of the latents, which all checkpoints share."""
    keep: bool = False
    """Whether the arrays of samples stay after evaluation."""


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
    """How loss and gradient of every checkpoint are measured in bins of timesteps: `diffusion.probe`."""

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


class Hashed(Section):
    """A section whose JSON is canonical, so that equal content has an equal hash."""

    def canonical(self) -> str:
        """Sorted-key JSON of what differs from the defaults: a new key with a default changes no old hash."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)

    @cached_property
    def hash8(self) -> str:
        """Eight hexadecimal digits of the sha256 of `canonical()`."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:8]


class Initial(Hashed):
    """What determines the untrained weights, beside the seed: arms that agree in it start from the same net."""

    dataset: Dataset
    model: Model
    diffusion: Diffusion
    train_version: int


class RunConfig(Initial):
    """What determines a training run, beside the seed and the number of steps."""

    train: Train
    scheme: Scheme
    match: Scheme | None = None

    @property
    def initial(self) -> Initial:
        """What it starts from."""
        return Initial(**{name: getattr(self, name) for name in Initial.model_fields})


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
    checkpoints: Regular | tuple[int, ...]
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
    RESERVED_NAMES: ClassVar[set[str]] = {"datasets", "references"}

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice: drop one")
        return seeds

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_in_order(cls, value: Regular | tuple[int, ...]) -> Regular | tuple[int, ...]:
        steps = value.steps if isinstance(value, Regular) else list(value)
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
            raise ValueError(f"arms.{name}.train{'.' if mistake['loc'] else ': '}{_sentence(mistake, Train)}") from None
        if batch_size % self.processes:
            raise ValueError(
                f"processes: {self.processes} do not divide the batch_size {batch_size} of {name}: take a divisor"
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, growing; 0 is the untrained net."""
        return self.checkpoints.steps if isinstance(self.checkpoints, Regular) else list(self.checkpoints)

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


def load_experiment(path: Path) -> Experiment:
    """Read and validate an experiment file.

    Raises:
        StudyError: the file is missing, no YAML, or breaks the schema; a line per mistake with file, key and remedy.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        if known := ", ".join(sorted(p.stem for p in path.parent.glob("[!.]*.yaml"))):
            raise StudyError(f"{path}: no such experiment: name one of {known}") from None
        raise StudyError(f"{path}: no such experiment: start this where the Snakefile lies, and name a study "
                         "without folder and .yaml") from None  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}): save it as UTF-8 text, or mend its permission") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: mend it there: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: must hold keys and values such as `name: {path.stem}`, not {type(content).__name__}")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        # A list of which every item is wrong is not also too short.
        mistakes = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        raise StudyError("\n".join(f"{path}: {_sentence(e)}" for e in mistakes)) from None
    if experiment.name != path.stem:
        raise StudyError(f"{path}: name is {experiment.name}, but the file is called {path.stem}: make them equal")
    return experiment


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key overwrite an earlier one in silence; a study must not lose an arm that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice: drop one", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _scheme(arm: Arm) -> Scheme:
    return Scheme(**{name: getattr(arm, name) for name in Scheme.model_fields})


def check_image_size(image_size: int, model: Model) -> None:
    """Make sure that the net fits images of `image_size` pixels.

    Raises:
        ValueError: a level cannot be halved, attention lies at no level, or heads do not divide a width.
    """
    halvings = len(model.channel_mult) - 1
    if image_size % 2**halvings:
        raise ValueError(
            f"dataset.image_size: {image_size} cannot be halved {halvings} times, as model.channel_mult with "
            f"{halvings + 1} entries asks: use a multiple of {2**halvings}"
        )
    levels = {image_size // 2**level: model.channels * m for level, m in enumerate(model.channel_mult)}
    for resolution in model.attention_resolutions:
        if resolution not in levels:
            known = ", ".join(map(str, levels))
            raise ValueError(f"model.attention_resolutions: the net has no resolution {resolution}: take from {known}")
    # The middle block always attends.
    for width in [levels[r] for r in model.attention_resolutions] + [list(levels.values())[-1]]:
        key = "heads" if model.heads else "head_channels"
        if width % getattr(model, key):
            raise ValueError(
                f"model.{key}: {getattr(model, key)} does not divide the attended width {width}: choose a divisor"
            )


def check_sampling_steps(sample: Sample, timesteps: int) -> None:
    """Make sure that the sampler can take so many steps through T = `timesteps`.

    Raises:
        ValueError: it cannot.
    """
    # DDIM takes every n-th timestep, so only some numbers of steps exist.
    possible = {len(range(0, timesteps, stride)) for stride in range(1, timesteps + 1)}
    if sample.sampler == "ddim" and sample.steps not in possible:
        near = min(possible, key=lambda steps: abs(steps - sample.steps))
        raise ValueError(
            f"sample.steps: no whole stride through {timesteps} timesteps takes {sample.steps} steps: take {near}"
        )
    if sample.sampler == "ddpm" and not 2 <= sample.steps <= timesteps:
        raise ValueError(f"sample.steps: {sample.steps} do not fit {timesteps} timesteps: take 2 to {timesteps}")


def in_words(error: ValueError) -> str:
    """The first mistake that a section (pydantic) or a check found in its values, in one sentence."""
    return _sentence(error.errors()[0]) if isinstance(error, ValidationError) else str(error)


def _keys_at(location: tuple[Any, ...], root: type[BaseModel]) -> set[str]:
    """The keys of the section that a location within the root leads to."""
    sections = [root]
    for part in location:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        # Names of arms, and of members of a union, lead no further.
        sections = [inner for field in fields for inner in _sections_in(field.annotation)] or sections
    return {key for section in sections for key in section.model_fields}


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in _sections_in(argument)]


# What pydantic says of a type of mistake is about Python: what to write instead.
REMEDIES = {
    "tuple_type": "write a list, such as [0, 1]",
    "too_short": "name at least one",
    "string_pattern_mismatch": "write small letters, digits and _, as in my_arm2",
    "dict_type": "write keys and values, as in {key: value}; none at all is {}",
    "model_type": "write keys and values, as in {key: value}; none at all is {}",
}


def _sentence(error: Any, root: type[BaseModel] = Experiment) -> str:
    """One mistake that pydantic found in a section, in words."""
    # Second in the location of a union is pydantic's name of the member, not a key; so is what has brackets.
    union = error["loc"][:1] in (("dataset",), ("checkpoints",))
    parts = error["loc"][:1] + error["loc"][2:] if union else error["loc"]
    location, kind, given = ".".join(str(part) for part in parts if "[" not in str(part)), error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _keys_at(error["loc"][:-1], root)
        close = difflib.get_close_matches(str(error["loc"][-1]).lower(), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
        return f"{location}: unknown key; {remedy}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{location}{'.source' if kind != 'missing' else ''}: missing: add it"
    if kind == "union_tag_invalid":
        return f"{location}.source: {error['ctx']['tag']} is unknown: name one of {error['ctx']['expected_tags']}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{location}: {message}" if location else message
    if kind in REMEDIES:
        return f"{location}: {REMEDIES[kind]}, but it is {given!r}"
    return f"{location}: {message[0].lower() + message[1:]}, but it is {given!r}"
