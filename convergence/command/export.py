"""`convergence export`: converts weights of a run to the layout of guided-diffusion."""

import logging
from pathlib import Path

import click

from convergence.command.options import FILE, PATH
from convergence.errors import StudyError

logger = logging.getLogger(__name__)


@click.command("export")
@click.argument("weights", type=FILE)
@click.argument("out", type=PATH)
def main(weights: Path, out: Path) -> None:
    """Convert weights of a run to the layout of guided-diffusion.

    Reads WEIGHTS, the weights.safetensors of a run, and writes OUT, a .pt file with a plain state dict.
    \f

    Raises:
        StudyError: If the files have other suffixes, or the run diverged.
    """
    from diffusion.checkpoints import load_checkpoint
    from diffusion.published import write_published

    if weights.suffix != ".safetensors" or out.suffix != ".pt":
        raise StudyError(f"{weights}, {out}: export reads a .safetensors file and writes a .pt file: change the names")
    checkpoint = load_checkpoint(weights, "cpu")
    if checkpoint.diverged:
        raise StudyError(f"{weights}: this run diverged, so its weights are useless: use a checkpoint of another run")
    write_published(out, checkpoint.model.state_dict())
    logger.info("%s: images of %d pixels, %d timesteps", out, checkpoint.image_size, checkpoint.schedule.timesteps)
