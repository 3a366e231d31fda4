"""Reads and writes checkpoints in the layout of guided-diffusion (Dhariwal & Nichol 2021).

P2-weighting (Choi et al. 2022) uses the same layout. A checkpoint is a plain state dict, and its keys and shapes show
most settings of the net. The other settings are arguments or come from the settings file, a JSON file that
`write_published` writes next to the checkpoint.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt, ValidationError
from torch import Tensor

from diffusion.build import build_net, noise_schedule
from diffusion.checkpoints import Checkpoint, check_finite, with_weights
from diffusion.config import GROUP_NORM_GROUPS, Diffusion, Initial, Model, Seed
from diffusion.errors import FileError, InputError
from diffusion.files import atomic_write, read_json, sha256
from diffusion.validation import first_mistake

INPUT = "input_blocks.0.0.weight"  # a key that every net has


class Settings(Diffusion):
    """Settings of a published net that the keys and shapes of its state dict do not show."""

    image_size: int
    """Height and width in pixels of the images that the net was trained on."""
    head_channels: PositiveInt | None = None
    """Number of channels per attention head."""
    heads: PositiveInt | None = None
    """Number of attention heads, instead of `head_channels`."""
    run_seed: Seed = 0
    """Seed of the training run. The latents (the initial noise x_T) depend on this seed."""

    @property
    def needed(self) -> dict[str, Any]:
        """The settings that `load_published` needs; all nets of guided-diffusion predict epsilon."""
        return self.model_dump(exclude_none=True, exclude={"predict", "loss_in"})


def load_published(
    path: Path,
    device: torch.device | str,
    image_size: int | None = None,
    head_channels: int | None = None,
    heads: int | None = None,
    schedule: str | None = None,
    timesteps: int | None = None,
    run_seed: int | None = None,
) -> Checkpoint:
    """Reads a published checkpoint (a state dict that `torch.save` wrote), and rebuilds the net.

    The net must have the attention order that guided-diffusion calls legacy (`use_new_attention_order` is false). If
    all keys have the same prefix, such as `module.` after parallel training, the prefix is removed.

    Only `path` and `device` are required if there is a settings file. Without a settings file, `image_size` is also
    required, and each other argument has the default value that is stated below.

    Args:
        path: file to read.
        device: device of the net.
        image_size: height and width in pixels of the images that the net was trained on.
        head_channels: number of channels per attention head. The default is 64, unless `heads` is given.
        heads: number of attention heads, instead of `head_channels`.
        schedule: noise schedule, a key of `diffusion.gaussian.SCHEDULES`. The default is "linear".
        timesteps: number of timesteps T of the noise schedule. The default is 1000.
        run_seed: seed of the training run, on which the latents depend. The default is 0.

    Returns:
        the net with its weights and its noise schedule.

    Raises:
        FileError: if the checkpoint is damaged, is not a plain state dict, or has tensors that do not fit together; if
            the settings file is damaged or belongs to other weights.
        InputError: if the net is not an unconditional U-Net of RGB images, or if an argument does not fit the net or
            contradicts the settings file.
        OSError: if the checkpoint cannot be read.
    """
    given = {"image_size": image_size, "head_channels": head_channels, "heads": heads, "schedule": schedule,
             "timesteps": timesteps, "run_seed": run_seed}  # fmt: skip
    weights = _read_state_dict(path)
    settings = _settings(path, {name: value for name, value in given.items() if value is not None})
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    attention = settings.model_dump(include={"head_channels", "heads"}, exclude_none=True)
    try:
        section = infer_model(shapes, settings.image_size, attention)
    except ValueError as error:
        raise InputError(f"{path}: {first_mistake(error, Model)}") from None
    with torch.device("meta"):
        model = build_net(settings.image_size, section)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *shapes]:
        if shapes.get(key) != expected.get(key):
            actual, wanted = (str(list(s[key])) if key in s else "missing" for s in (shapes, expected))
            raise FileError(
                path,
                f"{key} is {actual}, but {wanted} in the net that the other keys describe; only nets in the layout of "
                "guided-diffusion can be read",
            )
    model = with_weights(model, weights, device)
    return Checkpoint(model, noise_schedule(settings), settings.image_size, settings.run_seed)


def settings_file(path: Path) -> Path:
    """Returns the path of the settings file that belongs to the checkpoint `path`."""
    return path.with_name(f"{path.name}.json")


def _settings(path: Path, given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a checkpoint: those in `given`, and the others from the settings file or the defaults.

    Raises:
        FileError: if the settings file is damaged or belongs to other weights.
        InputError: if a given value is invalid or contradicts the settings file, or if the image size is unknown.
    """
    file = settings_file(path)
    if not file.exists():
        if "image_size" not in given:
            raise InputError(
                f"{path}: image_size: a published checkpoint does not contain the size of its images, and there is no "
                f"{file.name}: give the size"
            )
        try:
            return Settings(**given)
        except ValidationError as error:
            raise InputError(f"{path}: {first_mistake(error, Settings)}") from None
    content = read_json(file)
    if content.pop("sha256", None) != sha256(path):
        raise FileError(file, f"belongs to other weights than those in {path}: delete it, and give the settings")
    try:
        settings = Settings(**content)
    except ValidationError as error:
        raise FileError(file, f"is damaged ({first_mistake(error, Settings)}): export the weights again") from None
    for name, value in given.items():
        if value != (known := settings.model_dump()[name]):
            raise InputError(
                f"{path}: {name}: {value} contradicts {file.name} ({'unset' if known is None else known}): omit it"
            )
    return settings


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Returns the state dict in a file of `torch.save`, without the prefix that all keys have.

    The function does not run pickled code in the file.

    Raises:
        FileError: if the file is damaged or is not a plain state dict of finite floating-point numbers.
    """
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusable file is reported below, in one sentence
            # Files of torch before 1.6 are not zip files and cannot be memory-mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise FileError(
            path,
            "is not a file of torch.save, or holds pickled objects besides tensors, which are not loaded; save the "
            "state dict alone",
        ) from None
    except Exception as error:  # torch raises many types for a damaged file
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise FileError(path, f"is truncated or damaged ({reason}); download it again") from None
    if not isinstance(content, dict):
        raise FileError(path, f"holds a {type(content).__name__}, not a state dict; give a file of weights")
    for key, value in content.items():
        if not isinstance(key, str):
            raise FileError(path, f"is not a state dict: its key {key!r} is not text; give a file of weights alone")
        if not isinstance(value, Tensor):
            raise FileError(
                path,
                f"is not a plain state dict: its entry {key!r} is not a tensor; give a file of weights alone",
            )
    try:
        check_finite(content)
    except InputError as error:
        raise FileError(path, f"{error}; use another checkpoint") from None
    prefix = next((key.removesuffix(INPUT) for key in content if key.endswith(INPUT)), "")
    if not all(key.startswith(prefix) for key in content):
        raise FileError(path, f"has weights besides those of the net with the prefix {prefix}; save that net alone")
    return {key.removeprefix(prefix): value for key, value in content.items()}


def infer_model(shapes: Mapping[str, tuple[int, ...]], image_size: int, attention: Mapping[str, int]) -> Model:
    """Returns the settings of a U-Net, inferred from the shapes of the tensors in a state dict.

    Args:
        shapes: maps the keys of the state dict to shapes.
        image_size: height and width in pixels of the images that the net was trained on.
        attention: value of `head_channels` or of `heads`. If empty, `head_channels` has its default.

    Raises:
        ValueError: if the net is not an unconditional U-Net of RGB images in the layout of guided-diffusion, or if
            `image_size` or `attention` does not fit the net.
    """
    if "label_emb.weight" in shapes:
        raise ValueError("class-conditional (it has label_emb.weight); only unconditional nets can be sampled")
    try:
        channels_in = shapes[INPUT][1]
        channels_out = shapes["out.2.weight"][0]
        channels = shapes["time_embed.0.weight"][1]
        # In the decoder, every level except the first ends with a block that doubles the resolution.
        ups = [key for key in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.(in_layers\.0|conv)\.weight", key)]
        levels = len(ups) + 1
        res_blocks = len({key.split(".")[1] for key in shapes if key.startswith("output_blocks.")}) // levels - 1
        stages = [f"input_blocks.{1 + level * (res_blocks + 1)}" for level in range(levels)]
        widths = [shapes[f"{stage}.0.out_layers.3.weight"][0] for stage in stages]
        scale_shift_norm = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]
    except KeyError as error:
        raise ValueError(f"not in the layout of guided-diffusion (it has no {error})") from None
    except IndexError:
        raise ValueError(
            "not in the layout of guided-diffusion (a weight has too few dimensions, as of another kind of net)"
        ) from None
    if channels_in != 3:
        kind = "an upsampler" if channels_in == 6 else "another kind of net"
        raise ValueError(
            f"the input has {channels_in} channels instead of 3, so this is {kind}; only nets of RGB images can be read"
        )
    for unit, reason in (
        (channels, "channels of its time embedding; only integer multipliers are supported"),
        (GROUP_NORM_GROUPS, "groups of a group norm; only nets of guided-diffusion can be read"),
    ):
        if not unit or any(width % unit for width in widths):
            raise ValueError(
                f"its levels have widths {', '.join(map(str, widths))}, not all multiples of the {unit} {reason}"
            )
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(
            f"image_size: {image_size} cannot be halved {levels - 1} times, as this net does; use its image size"
        )
    model = Model(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        res_blocks=res_blocks,
        attention_resolutions=tuple(
            image_size // 2**level for level, stage in enumerate(stages) if f"{stage}.1.qkv.weight" in shapes
        ),
        scale_shift_norm=scale_shift_norm,
        resblock_updown=not any("conv" in key for key in ups),
        learn_sigma=channels_out == 6,
        **attention,
    )
    name = "heads" if model.heads else "head_channels"
    divisor = model.heads or model.head_channels or 1
    for key, shape in shapes.items():
        if key.endswith("qkv.weight") and len(shape) == 3 and shape[1] % divisor:
            default = "" if attention else "the default "
            raise ValueError(
                f"{name}: {default}{divisor} does not divide the {shape[1]} channels of an attention block; set it to "
                "the value with which the net was trained"
            )
    return model


def write_published(path: Path, weights: Mapping[str, Tensor], config: Initial, seed: int) -> Settings:
    """Writes weights in the layout of guided-diffusion: a plain state dict of float32 tensors.

    The function also writes the settings file, which `load_published` reads. Equal weights give checkpoints with equal
    bytes.

    Args:
        path: checkpoint to write.
        weights: maps parameter names to tensors [...].
        config: settings of the run.
        seed: seed of the run.

    Returns:
        the settings in the settings file. If this file is missing, `load_published` needs these settings as arguments.

    Raises:
        InputError: if the net is not a U-Net, or does not predict epsilon on a linear or cosine schedule.
    """
    if not isinstance(config.model, Model):
        raise InputError(
            f"the net is a {config.model.chosen[0]}, but only U-Nets have the layout of guided-diffusion: read the "
            "state dict in weights.safetensors instead"
        )
    if not config.diffusion.has_bound:
        raise InputError(
            "the net does not predict epsilon on a linear or cosine schedule, as nets of guided-diffusion do: read the "
            "state dict in weights.safetensors instead"
        )
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    heads = config.model.model_dump(include={"head_channels", "heads"})
    path_of = config.diffusion.model_dump(include={"timesteps", "schedule"})
    settings = Settings(image_size=config.dataset.image_size, run_seed=seed, **heads, **path_of)
    with atomic_write(path) as file:
        torch.save(plain, file)
    content = settings.needed | {"sha256": sha256(path)}
    with atomic_write(settings_file(path)) as file:
        file.write(json.dumps(content, indent=2).encode())
    return settings
