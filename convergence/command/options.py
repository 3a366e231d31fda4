"""Defines arguments and options that several subcommands share."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convergence.errors import RUN_AGAIN, StudyError, with_remedy
from diffusion.errors import FileError

if TYPE_CHECKING:
    from diffusion.checkpoints import Checkpoint

PATH = click.Path(path_type=Path)


class _Checkpoint(click.Path):
    """Click type of a checkpoint: its file, or the directory with its weights.safetensors."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path of the file."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.is_dir():
            return path
        if (weights := path / "weights.safetensors").is_file():
            return weights
        inside = sorted(path.glob("step*/weights.safetensors"), key=lambda file: (file.stat().st_mtime, file))
        advice = f"name one of its checkpoints, such as {inside[-1].parent}" if inside else "name a file of weights"
        self.fail(f"the directory {path} has no weights.safetensors: {advice}.", param, ctx)


CHECKPOINT = _Checkpoint(exists=True, path_type=Path)


def studies_argument(function: Callable) -> Callable:
    """Adds the argument `studies`, a tuple of names of studies, to a click command."""
    return click.argument("studies", nargs=-1, required=True, metavar="STUDY...", callback=_study_names)(function)


def _study_names(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> tuple[str, ...]:
    from convergence.layout import EXPERIMENTS

    names = [os.path.normpath(name) for value in values for name in value.split(",") if name]
    if not names:
        raise click.BadParameter("there is no name of a study.", context, parameter)
    return tuple(name.removeprefix(f"{EXPERIMENTS}/").removesuffix(".yaml") for name in names)


class Names(click.ParamType):
    """Click type of a comma-separated list of names.

    Args:
        choices: the allowed names.
    """

    name = "names"

    def __init__(self, choices: Sequence[str]):
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Returns the names of a comma-separated list."""
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        for name in names:
            if name not in self.choices:
                self.fail(f"'{name}' is not one of {', '.join(map(repr, self.choices))}.", param, ctx)
        return names


def device_option(function: Callable) -> Callable:
    """Adds the option `--device` to a click command. `find_device` converts the value to a torch device."""
    choice = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--device", type=choice, default="auto", help="auto: the GPU if there is one.")(function)


def find_device(name: str, threads: int | None = None) -> str:
    """Sets the number of torch's CPU threads, and returns the torch device for a value of `--device`: "cpu" or "cuda".

    Args:
        name: "auto", "cpu" or "cuda".
        threads: number of threads; None for torch's choice.
    """
    import torch

    from convergence.jobs import use_torch

    return use_torch(threads, int(name == "cuda" or (name == "auto" and torch.cuda.is_available())))


def load_run(path: Path, device: str) -> "Checkpoint":
    """Loads and returns the checkpoint of a run.

    Raises:
        StudyError: if the file is damaged or is not a checkpoint of a run, or the run diverged.
    """
    from diffusion.checkpoints import load_checkpoint

    try:
        checkpoint = load_checkpoint(path, device)
    except FileError as error:
        message = with_remedy(error, RUN_AGAIN)
        raise StudyError(message if message != str(error) else f"{message}: name another file") from None
    if checkpoint.diverged:
        raise StudyError(f"{path}: this run diverged, so its weights are useless: use a checkpoint of another run")
    return checkpoint
