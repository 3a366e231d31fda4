"""Checkpoints in the layout of guided-diffusion (Dhariwal & Nichol 2021) and P2-weighting (Choi et al. 2022).

These files are plain state dicts. The net is inferred from their keys and shapes.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion.build import build_net, noise_schedule
from diffusion.checkpoints import Checkpoint, with_weights
from diffusion.config import Diffusion, Model, check_image_size
from diffusion.errors import FileError, InputError
from diffusion.files import atomic_write
from diffusion.validation import first_mistake


def load_published(
    path: Path,
    device: torch.device | str,
    image_size: int,
    head_channels: int | None = None,
    heads: int | None = None,
    schedule: str = "linear",
    timesteps: int = 1000,
) -> Checkpoint:
    """Rebuilds the net of a published checkpoint: a state dict of float32 or float16, written by `torch.save`.

    The arguments give what keys and shapes do not show. Their defaults are the values of the published nets. Attention
    must have the order that guided-diffusion calls legacy (`use_new_attention_order` false).

    Args:
        path: The file.
        device: Device of the net.
        image_size: Height and width in pixels of the images that the net was trained on.
        head_channels: Channels per attention head; see `UNet`. The default is 64, unless `heads` is given.
        heads: Number of attention heads, instead of `head_channels`.
        schedule: Noise schedule, a key of `SCHEDULES`.
        timesteps: T of the noise schedule.

    Returns:
        The net with its noise schedule.

    Raises:
        FileError: If the file is damaged, does not hold a plain state dict, or its tensors do not fit the net that
            they describe.
        InputError: If the net is of another kind, or an argument does not fit it.
        OSError: If the file cannot be read.
    """
    weights = _read_state_dict(path)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    attention = {"head_channels": head_channels, "heads": heads}
    try:
        section = infer_model(shapes, image_size, {name: n for name, n in attention.items() if n is not None})
        process = noise_schedule(Diffusion(schedule=schedule, timesteps=timesteps))
    except ValueError as error:
        raise InputError(f"{path}: {first_mistake(error, Model)}") from None
    with torch.device("meta"):
        model = build_net(image_size, section)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *shapes]:
        if shapes.get(key) != expected.get(key):
            actual, wanted = (str(list(s[key])) if key in s else "missing" for s in (shapes, expected))
            raise FileError(
                path,
                f"{key} is {actual}, but {wanted} in the net that the other keys describe; only nets in the layout of "
                "guided-diffusion can be read",
            )
    return Checkpoint(with_weights(model, weights, device), process, image_size)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the file without running code in it.

    Raises:
        FileError: If the file is damaged or does not hold a plain state dict.
    """
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    try:
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
        if not isinstance(value, Tensor):
            raise FileError(
                path, f"is not a plain state dict: its entry {key!r} is not a tensor; give a file of weights alone"
            )
    return content


def infer_model(shapes: Mapping[str, tuple[int, ...]], image_size: int, attention: Mapping[str, int]) -> Model:
    """Returns the model section of a published net.

    Args:
        shapes: Maps the keys of its state dict to shapes.
        image_size: Height and width of its images, which determine the resolution of each level.
        attention: `head_channels` or `heads`, or neither.

    Raises:
        ValueError: If the net is of another kind, or `image_size` or `attention` does not fit it.
    """
    if "label_emb.weight" in shapes:
        raise ValueError("class-conditional (it has label_emb.weight); only unconditional nets can be sampled")
    try:
        channels_in = shapes["input_blocks.0.0.weight"][1]
        channels_out = shapes["out.2.weight"][0]
        channels = shapes["time_embed.0.weight"][1]
        # In the decoder, every level except the first ends with a block that doubles the resolution.
        ups = [key for key in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.(in_layers\.0|conv)\.weight", key)]
        levels = len(ups) + 1
        res_blocks = len({key.split(".")[1] for key in shapes if key.startswith("output_blocks.")}) // levels - 1
        stages = [f"input_blocks.{1 + level * (res_blocks + 1)}" for level in range(levels)]
        widths = [shapes[f"{stage}.0.out_layers.3.weight"][0] for stage in stages]
        scale_shift_norm = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]
    except LookupError as error:
        raise ValueError(f"not in the layout of guided-diffusion (it has no {error})") from None
    if channels_in != 3:
        kind = "an upsampler" if channels_in == 6 else "another kind of net"
        raise ValueError(
            f"the input has {channels_in} channels instead of 3, so this is {kind}; only nets of RGB images can be read"
        )
    if any(width % channels for width in widths):
        raise ValueError(
            f"its levels have widths {', '.join(map(str, widths))}, not all multiples of the {channels} channels of "
            "its time embedding; only integer multipliers are supported"
        )
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(
            f"image_size {image_size} cannot be halved {levels - 1} times, as this net does; use its image size"
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
    check_image_size(image_size, model)
    return model


def write_published(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes weights as guided-diffusion does: a plain state dict of float32. Equal weights give equal bytes.

    Args:
        path: The file.
        weights: Maps parameter names to tensors [...].
    """
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    with atomic_write(path) as file:
        torch.save(plain, file)
