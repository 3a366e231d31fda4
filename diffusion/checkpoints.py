"""Checkpoints of this project: a net on disk, and images sampled from it."""

import errno
import json
import logging
import math
import os
import shutil
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

from diffusion.config import Diffusion, Initial, Model, Sample
from diffusion.data.batches import to_uint8
from diffusion.devices import autocast, largest_batch
from diffusion.errors import InputError
from diffusion.files import atomic_write, check_unchanged, write_npy_header
from diffusion.gaussian import SCHEDULES, NoiseSchedule
from diffusion.nets.unet import UNet
from diffusion.progress import Progress
from diffusion.sampling import Denoiser, ddim_sample, ddpm_sample, latents

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
    with atomic_write(path) as file:
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
        InputError: the file is damaged or was not written by `save_weights`.
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
        raise InputError(
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
    with atomic_write(destination) as file:
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
        progress.update(done)
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
    with atomic_write(destination) as file:
        Image.fromarray(canvas.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")


def _sample(denoise: Denoiser, checkpoint: Checkpoint, settings: Sample, indices: range, x: Tensor) -> Tensor:
    if settings.sampler == "ddim":
        return ddim_sample(denoise, checkpoint.schedule, x, settings.steps)

    _, channels, height, width = x.shape

    def noise(step: int) -> Tensor:
        return latents(settings.seed, indices, (channels, height, width), f"ddpm{step}").to(x.device)

    return ddpm_sample(denoise, checkpoint.schedule, x, settings.steps, noise)
