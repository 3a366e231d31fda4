"""Writes and reads checkpoints (the weights of a run at one training step), and samples images from checkpoints."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffusion.build import build_net, noise_schedule
from diffusion.config import Initial, Sample
from diffusion.data.batches import to_uint8
from diffusion.devices import CudaGraphed, compute_copy, largest_batch
from diffusion.errors import FileError, InputError
from diffusion.files import atomic_write, check_unchanged
from diffusion.paths import NoisePath
from diffusion.prefetch import prefetched
from diffusion.progress import Progress, log_ready
from diffusion.sampling import Denoiser, ddpm_sample, latents, ode_sample

PREVIEW_GAP = 1  # pixels between the images of a preview


def save_weights(path: Path, weights: dict[str, Tensor], config: Initial, seed: int, step: int, diverged: bool) -> None:
    """Writes a safetensors file with the weights of a net and the settings from which the net can be rebuilt.

    Equal arguments give files with equal bytes.

    Args:
        path: file to write.
        weights: maps parameter names to tensors [...].
        config: settings of the run.
        seed: seed of the run.
        step: optimizer step of the checkpoint.
        diverged: whether the run diverged, that is, the loss or a weight became infinite or NaN.
    """
    about = {"config": config.canonical(), "seed": seed, "step": step, "diverged": diverged}
    # safetensors writes several metadata keys in arbitrary order, so all of it is in one key.
    content = save({k: v.contiguous().cpu() for k, v in weights.items()}, {"checkpoint": json.dumps(about)})
    with atomic_write(path) as file:
        file.write(content)


@dataclass(frozen=True)
class Checkpoint:
    """A net with its weights and everything else that sampling requires."""

    model: nn.Module
    """Net in evaluation mode, with float32 weights."""
    schedule: NoisePath
    """Path on which the net was trained, with what the net predicts."""
    image_size: int
    """Height and width in pixels of the images that the net generates."""
    seed: int = 0
    """Seed of the run. The latents (the initial noise x_T) depend on this seed and on `Sample.seed`."""
    diverged: bool = False
    """Whether the run diverged. `sample_checkpoint` returns no images for a run that diverged."""
    config: Initial | None = None
    """Settings of the run; None for a net that `diffusion.published.load_published` read."""


def load_checkpoint(path: Path, device: torch.device | str, digest: str | None = None) -> Checkpoint:
    """Reads a file that `save_weights` wrote, and rebuilds the net.

    Args:
        path: file to read.
        device: device of the net.
        digest: SHA-256 digest that the file must have. None: the digest of the file is not checked.

    Returns:
        the net with its weights and its noise schedule.

    Raises:
        FileError: if the file is damaged, was not written by `save_weights`, or does not have the given digest; if a
            weight is not finite although the run did not diverge.
        OSError: if the file does not exist.
    """
    if digest is not None and path.exists():
        check_unchanged(path, digest)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["checkpoint"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config, seed, diverged = Initial.model_validate_json(about["config"]), int(about["seed"]), about["diverged"]
        with torch.device("meta"):
            model = build_net(config.dataset.image_size, config.model)
        if not diverged:
            indices = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
            check_finite({name: weight for name, weight in weights.items() if name not in indices})
        model = with_weights(model, weights, device)
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        missing = "it has no " if isinstance(error, KeyError) else ""
        reason = missing + " ".join(str(error).split())[:120]
        raise FileError(path, f"is not a complete checkpoint of a run ({reason})") from None
    return Checkpoint(model, noise_schedule(config.diffusion), config.dataset.image_size, seed, diverged, config)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Checks that all weights are dense tensors of finite floating-point numbers.

    Args:
        weights: state dict; maps names to tensors [...].

    Raises:
        InputError: if a tensor is not dense, does not have a floating-point dtype, or contains NaN or infinity.
    """
    for key, value in weights.items():
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            raise InputError(f"{key} is {value.dtype} ({value.layout}), not a dense tensor of floating-point numbers")
        if not value.float().isfinite().all():
            raise InputError(f"{key} has values that are NaN or infinite")


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device | str) -> nn.Module:
    """Moves a net from the meta device to `device`, loads the weights as float32, and sets evaluation mode.

    The returned net requires no gradients.

    Args:
        model: net that was built under `torch.device("meta")`.
        weights: state dict of the net; maps names to tensors [...].
        device: device of the returned net.
    """
    # Without `assign`, empty tensors are made first, for which torch imports sympy (0.5 s).
    model.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()}, assign=True)
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def sample_checkpoint(checkpoint: Checkpoint, settings: Sample, device: torch.device | str) -> np.ndarray:
    """Samples images from a checkpoint.

    For given weights and settings, the noise of image i depends only on `settings.seed`, `checkpoint.seed` and i.

    Args:
        checkpoint: net on `device`, with its noise schedule and the seed of its run.
        settings: number of images, sampler, steps, seed, precision and batch size.
        device: device of the net.

    Returns:
        images, uint8 [N, H, W, 3] in 0..255. N is `settings.images`. If the run diverged or a sample contains a value
        that is not finite, N is 0.
    """
    count = 0 if checkpoint.diverged else settings.images
    image = (3, checkpoint.image_size, checkpoint.image_size)
    images = np.empty((count, checkpoint.image_size, checkpoint.image_size, 3), np.uint8)
    if not count:
        return images
    model = compute_copy(checkpoint.model, settings.precision)
    size = settings.batch_size or largest_batch(model, image, device)
    denoise = _reporting(model, count, settings, device)
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    noise = [f"ddpm{step}" for step in range(settings.steps - 1)] if settings.sampler == "ddpm" else []

    def draw(batch: tuple[range, str]) -> Tensor:
        indices, stream = batch
        return latents(settings.seed, checkpoint.seed, indices, image, stream)

    with prefetched(draw, product(batches, ["latents", *noise]), device) as draws:
        for indices in batches:
            x = _sample(denoise, checkpoint, settings, draws)
            if not x.isfinite().all():
                return images[:0]
            images[indices.start : indices.stop] = to_uint8(x).cpu().numpy()
    return images


def _reporting(model: nn.Module, count: int, settings: Sample, device: torch.device | str) -> Denoiser:
    """Returns a function that calls the model, as a CUDA graph on a GPU, and reports the progress of sampling.

    The function reports progress at each call of the model, because one batch may take minutes.
    """
    progress = Progress("samples", count)
    done = 0.0

    def call(x: Tensor, t: Tensor) -> list[Tensor]:
        return [model(x, t).float()]

    graphed = CudaGraphed(call) if torch.device(device).type == "cuda" else call

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        (output,) = graphed(x, t)
        done += len(x) / settings.calls
        progress.update(done)
        log_ready()
        return output

    return denoise


def preview(images: np.ndarray, destination: Path, columns: int = 8, rows: int = 4, scale: int = 1) -> None:
    """Writes a PNG file with the first `rows` * `columns` images in a grid. White lines separate the images.

    Args:
        images: uint8 [N, H, W, 3] in 0..255. Cells without an image are white.
        destination: PNG file to write. At a scale of 1, the height is rows * (H + 1) + 1 pixels, and the width is
            columns * (W + 1) + 1 pixels.
        columns: number of images per row.
        rows: number of rows.
        scale: factor by which the height and width of the grid are enlarged.
    """
    height, width = images.shape[1] + PREVIEW_GAP, images.shape[2] + PREVIEW_GAP
    canvas = np.full((rows * height + PREVIEW_GAP, columns * width + PREVIEW_GAP, 3), 255, np.uint8)
    for index, image in enumerate(images[: columns * rows]):
        top, left = index // columns * height + PREVIEW_GAP, index % columns * width + PREVIEW_GAP
        canvas[top : top + images.shape[1], left : left + images.shape[2]] = image
    with atomic_write(destination) as file:
        Image.fromarray(canvas.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")


def _sample(denoise: Denoiser, checkpoint: Checkpoint, settings: Sample, draws: Iterator[Tensor]) -> Tensor:
    """Samples one batch. `draws` yields the latents of the batch and then, for DDPM, the noise of each step."""
    start, schedule = next(draws), checkpoint.schedule
    if settings.sampler == "ddpm":
        return ddpm_sample(denoise, schedule, start, settings.steps, lambda step: next(draws))
    return ode_sample(denoise, schedule, start, settings.steps, settings.sampler)
