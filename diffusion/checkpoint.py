"""A net on disk: weights as safetensors that know which net they belong to, and images sampled from them."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion import StudyError
from diffusion.config import Initial, Sample
from diffusion.data import to_uint8
from diffusion.files import replacing
from diffusion.gaussian import SCHEDULES, NoiseSchedule
from diffusion.sampling import ddim_sample, ddpm_sample, latents
from diffusion.unet import UNet

logger = logging.getLogger(__name__)

TELL_SECONDS = 10
PREVIEW_GAP = 1  # pixels


def build(config: Initial) -> tuple[UNet, NoiseSchedule]:
    """The untrained net of a run and its noise schedule."""
    model = UNet(image_size=config.dataset.image_size, **config.model.model_dump())
    return model, NoiseSchedule(SCHEDULES[config.diffusion.schedule](config.diffusion.timesteps))


def save_weights(path: Path, weights: dict[str, Tensor], config: Initial, seed: int, step: int, diverged: bool) -> None:
    """Write weights with what is needed to rebuild the net. Equal runs give equal bytes."""
    about = {"config": config.canonical(), "seed": seed, "step": step, "diverged": diverged}
    # One metadata key: safetensors writes several in no fixed order.
    content = save({k: v.contiguous().cpu() for k, v in weights.items()}, {"checkpoint": json.dumps(about)})
    with replacing(path) as file:
        file.write(content)


@dataclass(frozen=True)
class Checkpoint:
    """A net with its weights, ready to sample, and where it came from."""

    model: UNet
    schedule: NoiseSchedule
    image_size: int
    seed: int
    step: int
    diverged: bool


def load_checkpoint(path: Path, device: torch.device | str) -> Checkpoint:
    """Rebuild the net of a weights file.

    Raises:
        StudyError: the file is damaged or was not written by `save_weights`.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["checkpoint"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = Initial.model_validate_json(about["config"])
        model, schedule = build(config)
        model.load_state_dict(weights)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StudyError(f"{path}: not a whole checkpoint ({reason}): delete it and start again") from None
    return Checkpoint(
        model.to(device).eval().requires_grad_(False),
        schedule,
        config.dataset.image_size,
        about["seed"],
        about["step"],
        about["diverged"],
    )


def sample_checkpoint(checkpoint: Checkpoint, settings: Sample, destination: Path, device: torch.device | str) -> None:
    """Sample `settings.images` images to a uint8 array [N, H, W, 3] at `destination`, batch by batch.

    Sample i depends on (settings.seed, i) and the weights alone. A diverged net gives an empty array.
    """
    size = checkpoint.image_size
    count = 0 if checkpoint.diverged else settings.images
    start = told = time.monotonic()
    with replacing(destination) as file:
        if count == 0:
            np.save(file, np.zeros((0, size, size, 3), np.uint8))
        else:
            array = np.lib.format.open_memmap(file.name, "w+", np.uint8, (count, size, size, 3))
        for first in range(0, count, settings.batch_size):
            indices = range(first, min(first + settings.batch_size, count))
            array[indices.start : indices.stop] = to_uint8(_sample(checkpoint, settings, indices, device)).cpu().numpy()
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                rate = indices.stop / (told - start)
                left = (count - indices.stop) / rate
                logger.info("%d/%d samples, %.1f images/s, %.0f s left", indices.stop, count, rate, left)


def preview(images: np.ndarray, destination: Path, columns: int = 8, rows: int = 4) -> None:
    """Save the first columns * rows images as a PNG, row by row, in native resolution, parted by white lines.

    Args:
        images: uint8 [N, H, W, 3] in 0..255; where there are too few, white stays.
        destination: the PNG, of rows * (H + 1) + 1 by columns * (W + 1) + 1 pixels.
    """
    height, width = images.shape[1] + PREVIEW_GAP, images.shape[2] + PREVIEW_GAP
    canvas = np.full((rows * height + PREVIEW_GAP, columns * width + PREVIEW_GAP, 3), 255, np.uint8)
    for index, image in enumerate(images[: columns * rows]):
        top, left = index // columns * height + PREVIEW_GAP, index % columns * width + PREVIEW_GAP
        canvas[top : top + images.shape[1], left : left + images.shape[2]] = image
    with replacing(destination) as file:
        Image.fromarray(canvas).save(file, format="PNG")


def _sample(checkpoint: Checkpoint, settings: Sample, indices: range, device: torch.device | str) -> Tensor:
    shape = (3, checkpoint.image_size, checkpoint.image_size)
    x = latents(settings.seed, indices, shape).to(device)
    if settings.sampler == "ddim":
        return ddim_sample(checkpoint.model, checkpoint.schedule, x, settings.steps)

    def noise(step: int) -> Tensor:
        return latents(settings.seed, indices, shape, f"ddpm{step}").to(device)

    return ddpm_sample(checkpoint.model, checkpoint.schedule, x, settings.steps, noise)
