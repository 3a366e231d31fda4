"""`convergence export`: converts weights of a run to the layout of guided-diffusion."""

import logging
import shlex
from pathlib import Path

import click

from convergence.command.options import CHECKPOINT, PATH, load_run
from convergence.errors import StudyError

logger = logging.getLogger(__name__)


@click.command("export")
@click.argument("weights", type=CHECKPOINT)
@click.argument("out", type=PATH)
def main(weights: Path, out: Path) -> None:
    """Convert weights of a run to the layout of guided-diffusion.

    WEIGHTS is the weights.safetensors of a run, or the directory with this file. Writes OUT, a .pt file with a plain
    state dict, and OUT.json, the settings that `convergence sample` needs to sample from OUT.
    \f

    Raises:
        StudyError: if WEIGHTS is not a .safetensors file, or OUT is not a .pt file.
    """
    from diffusion.published import settings_file, write_published

    if weights.suffix != ".safetensors" or out.suffix != ".pt":
        raise StudyError(f"{weights}, {out}: export reads a .safetensors file and writes a .pt file: change the names")
    checkpoint = load_run(weights, "cpu")
    assert checkpoint.config  # that of a run has one
    settings = write_published(out, checkpoint.model.state_dict(), checkpoint.config, checkpoint.seed)
    options = [f"--{key.replace('_', '-')} {value}" for key, value in settings.needed.items()]
    logger.info(
        "%s: its settings are in %s; without that file, sample it with\n  convergence sample %s --out samples %s",
        out, settings_file(out), shlex.quote(str(out)), " ".join(sorted(options)),
    )  # fmt: skip
