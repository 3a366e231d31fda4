"""`convergence export`: converts weights of a run to the layout of guided-diffusion."""

import logging
from pathlib import Path

import click

from convergence.command.options import FILE, PATH, load_run
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
        StudyError: If the files have other suffixes.
    """
    from diffusion.published import write_published

    if weights.suffix != ".safetensors" or out.suffix != ".pt":
        raise StudyError(f"{weights}, {out}: export reads a .safetensors file and writes a .pt file: change the names")
    checkpoint = load_run(weights, "cpu")
    write_published(out, checkpoint.model.state_dict())
    logger.info("%s: images of %d pixels, %d timesteps", out, checkpoint.image_size, checkpoint.schedule.timesteps)
