"""The settings of one training run, validated without torch.

A `RunConfig` holds exactly what determines a training run.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

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


# The order of keys in these four is hashed (`convergence.layout.pixels`): new ones go last, with a default.
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
    """The ADM U-Net (Dhariwal & Nichol 2021); keys are the keyword arguments of `diffusion.nets.unet.UNet`."""

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
