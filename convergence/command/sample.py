"""`convergence sample`: samples images from a checkpoint."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convergence.command.options import CHECKPOINT, PATH, device_option, find_device, load_run
from convergence.errors import StudyError
from diffusion.errors import InputError

if TYPE_CHECKING:
    from diffusion.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

GRID_IMAGES = 64  # images in samples.png, at most
GRID_PIXELS = 64  # smaller images are enlarged to about this size


@click.command("sample")
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Directory for samples.npy and samples.png.")
@click.option("--images", type=int, default=64, metavar="N", help="Number of images.")
@click.option("--sampler", type=click.Choice(["ddim", "ddpm", "heun", "dpm"]), default="ddim", help="Sampler.")
@click.option("--steps", type=int, default=25, metavar="N", help="Steps of the sampler.")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the latents.")
@click.option("--batch-size", type=int, metavar="N", show_default="what fits the GPU memory",
              help="Images per batch.")  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: bf16 on a GPU, else fp32."
)
@device_option
@click.option("--threads", type=click.IntRange(min=1), metavar="N", show_default="torch's choice", help="CPU threads.")
@click.option("--image-size", type=int, metavar="N",
              help="For a .pt file that was not exported: height and width of its images.")  # fmt: skip
@click.option("--head-channels", type=int, metavar="N", show_default="64",
              help="For a .pt file: channels per attention head.")  # fmt: skip
@click.option("--heads", type=int, metavar="N", help="For a .pt file, instead: attention heads at every resolution.")
@click.option("--schedule", type=click.Choice(["linear", "cosine"]), show_default="linear",
              help="For a .pt file: noise schedule.")  # fmt: skip
@click.option("--timesteps", type=int, metavar="T", show_default="1000",
              help="For a .pt file: timesteps of its training.")  # fmt: skip
@click.option("--run-seed", type=int, metavar="N", show_default="0",
              help="For a .pt file: seed of its run, which changes the latents too.")  # fmt: skip
def main(
    checkpoint: Path,
    out: Path,
    device: str,
    threads: int | None,
    image_size: int | None,
    head_channels: int | None,
    heads: int | None,
    schedule: str | None,
    timesteps: int | None,
    run_seed: int | None,
    **settings: Any,
) -> None:
    """Sample images from a checkpoint.

    CHECKPOINT is the weights.safetensors of a run, the directory with this file, the file of another average of the
    weights, such as weights.power0.1.safetensors, or a .pt file in the layout of guided-diffusion. Writes samples.npy,
    uint8 [N, H, W, 3], and samples.png, a grid of up to 64 samples.
    \f

    Raises:
        UsageError: if both `--heads` and `--head-channels` are given.
        InputError: if the options do not fit the checkpoint.
        StudyError: if the GPU memory is too small, or the samples are not finite.
        OSError: if the samples do not fit the disk.
    """
    if heads and head_channels:
        raise click.UsageError("--heads and --head-channels exclude each other.")

    import torch

    from diffusion.checkpoints import preview, sample_checkpoint
    from diffusion.config import Sample, check_sampling_steps
    from diffusion.files import check_free_space, save_npy
    from diffusion.gaussian import NoiseSchedule
    from diffusion.validation import first_mistake

    device = find_device(device, threads)
    layout = {"image_size": image_size, "head_channels": head_channels, "heads": heads, "schedule": schedule,
              "timesteps": timesteps, "run_seed": run_seed}  # fmt: skip
    loaded = _load(checkpoint, device, {name: value for name, value in layout.items() if value is not None})
    try:
        sample = Sample(**settings)
        check_sampling_steps(sample, loaded.schedule.timesteps, isinstance(loaded.schedule, NoiseSchedule))
    except ValueError as error:
        raise InputError(first_mistake(error, Sample)) from None

    out.mkdir(parents=True, exist_ok=True)
    array, grid = out / "samples.npy", out / "samples.png"
    check_free_space(array, sample.images * 3 * loaded.image_size**2)
    try:
        images = sample_checkpoint(loaded, sample, device)
    except torch.OutOfMemoryError:
        raise StudyError("a batch of images does not fit the GPU memory: use a smaller --batch-size") from None
    if not len(images):
        raise StudyError(f"{checkpoint}: its samples are not finite: use another checkpoint, or --precision fp32")
    save_npy(array, images)
    shown = min(sample.images, GRID_IMAGES)
    columns = math.ceil(math.sqrt(shown))
    preview(images, grid, columns, math.ceil(shown / columns), max(1, GRID_PIXELS // loaded.image_size))
    logger.info("%d samples are in %s; %s shows %d of them", sample.images, array, grid, shown)


def _load(path: Path, device: str, layout: dict[str, Any]) -> "Checkpoint":
    """Returns the checkpoint at `path`.

    Args:
        path: a .safetensors file of this project, or any other file for a published checkpoint.
        device: torch device.
        layout: the given options that describe a published checkpoint, as keyword arguments of `load_published`.

    Raises:
        StudyError: if these options are given for a file of this project.
    """
    from diffusion.published import load_published

    if path.suffix == ".safetensors":
        if layout:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in layout)
            raise StudyError(f"{path} describes its own net: leave out {given}")
        return load_run(path, device)
    return load_published(path, device, **layout)
