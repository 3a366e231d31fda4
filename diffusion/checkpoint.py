"""A net on disk, and images sampled from it.

Our weights are safetensors that know which net they belong to. The published checkpoints of guided-diffusion (Dhariwal
& Nichol 2021) and P2-weighting (Choi et al. 2022) are plain state dicts: the net is inferred from keys and shapes.
"""

import errno
import json
import logging
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion import StudyError
from diffusion.config import Diffusion, Initial, Model, Sample, check_image_size, in_words
from diffusion.data import to_uint8
from diffusion.devices import autocast, largest_batch
from diffusion.files import check_unchanged, replacing, write_npy_header
from diffusion.gaussian import SCHEDULES, NoiseSchedule
from diffusion.progress import Progress
from diffusion.sampling import Denoiser, ddim_sample, ddpm_sample, latents
from diffusion.unet import UNet

logger = logging.getLogger(__name__)

PREVIEW_GAP = 1  # pixels


def build(config: Initial) -> tuple[UNet, NoiseSchedule]:
    """The untrained net of a run and its noise schedule."""
    return _net(config.dataset.image_size, config.model), noise_schedule(config.diffusion)


def _net(image_size: int, model: Model) -> UNet:
    return UNet(image_size=image_size, **model.model_dump())


def noise_schedule(diffusion: Diffusion) -> NoiseSchedule:
    """The noise schedule of a run."""
    return NoiseSchedule(SCHEDULES[diffusion.schedule](diffusion.timesteps))


def save_weights(path: Path, weights: dict[str, Tensor], config: Initial, seed: int, step: int, diverged: bool) -> None:
    """Write weights (by name, each of its own shape [...]) with what rebuilds the net. Equal runs give equal bytes."""
    about = {"config": config.canonical(), "seed": seed, "step": step, "diverged": diverged}
    # One metadata key: safetensors writes several in no fixed order.
    content = save({k: v.contiguous().cpu() for k, v in weights.items()}, {"checkpoint": json.dumps(about)})
    with replacing(path) as file:
        file.write(content)


@dataclass(frozen=True)
class Checkpoint:
    """A net with its weights, ready to sample. A published one does not say at which step of its training it is."""

    model: UNet
    schedule: NoiseSchedule
    image_size: int
    diverged: bool = False


def load_checkpoint(path: Path, device: torch.device | str, digest: str | None = None) -> Checkpoint:
    """Rebuild the net of a weights file.

    Args:
        digest: the sha256 that the file had when it was written, if that is known.

    Raises:
        StudyError: the file is damaged or was not written by `save_weights`.
    """
    if digest is not None and path.exists():
        check_unchanged(path, digest)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["checkpoint"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = Initial.model_validate_json(about["config"])
        with torch.device("meta"):
            model = _net(config.dataset.image_size, config.model)
        model = _filled(model, weights, device)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StudyError(
            f"{path}: not a whole checkpoint of a run ({reason}): if a run wrote it, delete it and run the same "
            "command again; otherwise name another file"
        ) from None
    schedule = noise_schedule(config.diffusion)
    return Checkpoint(model, schedule, config.dataset.image_size, about["diverged"])


def _filled(model: UNet, weights: Mapping[str, Tensor], device: torch.device | str) -> UNet:
    """A net that was built without memory, on a device and with its weights, as float32, ready to evaluate."""
    model = model.to_empty(device=device).to(memory_format=torch.channels_last)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


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
        StudyError: the file is damaged or holds something else, the net is of another kind, or an argument is wrong.
        OSError: the file cannot be read.
    """
    weights = _read_state_dict(path)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    attention = {"head_channels": head_channels, "heads": heads}
    try:
        section = infer_model(shapes, image_size, {name: n for name, n in attention.items() if n is not None})
        process = noise_schedule(Diffusion(schedule=schedule, timesteps=timesteps))
    except ValueError as error:
        raise StudyError(f"{path}: {in_words(error)}") from None
    with torch.device("meta"):
        model = _net(image_size, section)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *shapes]:
        if shapes.get(key) != expected.get(key):
            there, wanted = (str(list(s[key])) if key in s else "missing" for s in (shapes, expected))
            raise StudyError(
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
        raise StudyError(
            f"{path}: holds more than tensors (pickled code), which is not run, or is no file of torch.save: save the "
            "state dict alone"
        ) from None
    except Exception as error:  # a damaged file fails in many ways inside torch
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise StudyError(f"{path}: cut short or damaged ({reason}): fetch it again") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: holds a {type(content).__name__}, not a state dict: name a file of weights")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise StudyError(
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
    with replacing(path) as file:
        torch.save(plain, file)


def sample_checkpoint(checkpoint: Checkpoint, settings: Sample, destination: Path, device: torch.device | str) -> None:
    """Sample `settings.images` images to a uint8 array [N, H, W, 3] at `destination`, one batch in memory at a time.

    Sample i depends on (settings.seed, i) and the weights alone. A diverged net gives an empty array.

    Raises:
        OSError: the disk is full, or nothing may be written there.
    """
    count = 0 if checkpoint.diverged else settings.images
    shape = (count, checkpoint.image_size, checkpoint.image_size, 3)
    if shutil.disk_usage(destination.parent).free < math.prod(shape):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
    image = (3, checkpoint.image_size, checkpoint.image_size)
    size = settings.batch_size or largest_batch(checkpoint.model, image, device, settings.precision)
    denoise = _telling(checkpoint.model, count, settings, device)
    with replacing(destination) as file:
        write_npy_header(file, shape)
        batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
        start = [latents(settings.seed, indices, image) for indices in batches[:1]]
        for indices, following in pairwise([*batches, range(0)]):
            x = _sample(denoise, checkpoint, settings, indices, start.pop().to(device))
            # Drawn while a GPU still works on these.
            start = [latents(settings.seed, following, image)] if following else []
            file.write(to_uint8(x).cpu().numpy().tobytes())


def _telling(model: UNet, count: int, settings: Sample, device: torch.device | str) -> Denoiser:
    """The model in the precision asked for, telling how far `count` samples have come: one batch may take minutes."""
    progress = Progress("samples", count)
    done = 0.0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        with autocast(device, settings.precision):
            output = model(x, t).float()
        done += len(x) / settings.steps
        progress.at(done)
        return output

    return denoise


def preview(images: np.ndarray, destination: Path, columns: int = 8, rows: int = 4, scale: int = 1) -> None:
    """Save the first columns * rows images as a PNG, row by row, parted by white lines.

    Args:
        images: uint8 [N, H, W, 3] in 0..255; where there are too few, white stays.
        destination: the PNG, of rows * (H + 1) + 1 by columns * (W + 1) + 1 pixels, times the scale.
        scale: pixels of the PNG along each side of a pixel.
    """
    height, width = images.shape[1] + PREVIEW_GAP, images.shape[2] + PREVIEW_GAP
    canvas = np.full((rows * height + PREVIEW_GAP, columns * width + PREVIEW_GAP, 3), 255, np.uint8)
    for index, image in enumerate(images[: columns * rows]):
        top, left = index // columns * height + PREVIEW_GAP, index % columns * width + PREVIEW_GAP
        canvas[top : top + images.shape[1], left : left + images.shape[2]] = image
    with replacing(destination) as file:
        Image.fromarray(canvas.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")


def _sample(denoise: Denoiser, checkpoint: Checkpoint, settings: Sample, indices: range, x: Tensor) -> Tensor:
    if settings.sampler == "ddim":
        return ddim_sample(denoise, checkpoint.schedule, x, settings.steps)

    _, channels, height, width = x.shape

    def noise(step: int) -> Tensor:
        return latents(settings.seed, indices, (channels, height, width), f"ddpm{step}").to(x.device)

    return ddpm_sample(denoise, checkpoint.schedule, x, settings.steps, noise)
