"""Checkpoints in the layout of guided-diffusion (Dhariwal & Nichol 2021) and P2-weighting (Choi et al. 2022).

These files are plain state dicts: the net is inferred from keys and shapes.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoints import Checkpoint, _filled, _net, noise_schedule
from diffusion.config import Diffusion, Model, check_image_size
from diffusion.errors import InputError
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
    """Rebuild the net of a published checkpoint: a state dict written by torch.save, of float32 or float16.

    What its keys and shapes do not show are arguments; their defaults are those of the published nets. Attention must
    be in the order that guided-diffusion calls legacy (`use_new_attention_order` false), which no key shows either.

    Args:
        image_size: height and width of the images that the net was trained on.
        head_channels, heads: see `UNet`; at most one of them, by default 64 channels per head.
        schedule, timesteps: the noise schedule, a key of `SCHEDULES`, and its T.

    Raises:
        InputError: the file is damaged or holds something else, the net is of another kind, or an argument is wrong.
        OSError: the file cannot be read.
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
        model = _net(image_size, section)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *shapes]:
        if shapes.get(key) != expected.get(key):
            there, wanted = (str(list(s[key])) if key in s else "missing" for s in (shapes, expected))
            raise InputError(
                f"{path}: {key} is {there}, but {wanted} in the net that the other keys describe: only nets in the "
                "layout of guided-diffusion can be read"
            )
    return Checkpoint(_filled(model, weights, device), process, image_size)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        whole = zipfile.is_zipfile(file)
    try:
        # Files of torch before 1.6 are no zips and cannot be mapped. Nothing in the file is run.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: holds more than tensors (pickled code), which is not run, or is no file of torch.save: save the "
            "state dict alone"
        ) from None
    except Exception as error:  # a damaged file fails in many ways inside torch
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise InputError(f"{path}: cut short or damaged ({reason}): fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict: name a file of weights")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{path}: its entry {key!r} is no tensor, so it is not a plain state dict: name a file of weights alone"
            )
    return content


def infer_model(shapes: Mapping[str, tuple[int, ...]], image_size: int, attention: Mapping[str, int]) -> Model:
    """The model section of a published net, from the keys and shapes of its state dict.

    Args:
        shapes: key -> shape.
        image_size: height and width of the images; tells the resolution of each level.
        attention: `head_channels` or `heads`, or neither.

    Raises:
        ValueError: the net is of another kind, or image_size or the heads do not fit it.
    """
    if "label_emb.weight" in shapes:
        raise ValueError("class-conditional (it has label_emb.weight): only nets without classes can be sampled")
    try:
        channels_in = shapes["input_blocks.0.0.weight"][1]
        channels_out = shapes["out.2.weight"][0]
        channels = shapes["time_embed.0.weight"][1]
        # Every level but the first ends, on the way up, in a block that doubles the resolution.
        ups = [key for key in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.(in_layers\.0|conv)\.weight", key)]
        levels = len(ups) + 1
        res_blocks = len({key.split(".")[1] for key in shapes if key.startswith("output_blocks.")}) // levels - 1
        first = [f"input_blocks.{1 + level * (res_blocks + 1)}" for level in range(levels)]
        widths = [shapes[f"{stage}.0.out_layers.3.weight"][0] for stage in first]
        scale_shift_norm = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]
    except LookupError as error:
        raise ValueError(f"not in the layout of guided-diffusion (looking for {error})") from None
    if channels_in != 3:
        kind = "an upsampler" if channels_in == 6 else "another kind of net"
        raise ValueError(
            f"takes {channels_in} channels instead of 3, so it is {kind}: only nets of RGB images are read"
        )
    if any(width % channels for width in widths):
        raise ValueError(
            f"its levels are {', '.join(map(str, widths))} wide, not all a multiple of the {channels} channels of its "
            "time embedding: only whole multipliers are known"
        )
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(f"image size {image_size} cannot be halved {levels - 1} times, as this net does: mend it")
    model = Model(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        res_blocks=res_blocks,
        attention_resolutions=tuple(
            image_size // 2**level for level, stage in enumerate(first) if f"{stage}.1.qkv.weight" in shapes
        ),
        scale_shift_norm=scale_shift_norm,
        resblock_updown=not any("conv" in key for key in ups),
        learn_sigma=channels_out == 6,
        **attention,
    )
    check_image_size(image_size, model)
    return model


def write_published(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights (by name, each of its own shape [...]) as guided-diffusion does: a plain state dict of float32.

    Equal weights give equal bytes.
    """
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    with atomic_write(path) as file:
        torch.save(plain, file)
