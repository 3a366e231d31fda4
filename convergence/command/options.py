"""Arguments and options that several subcommands share."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from convergence.errors import StudyError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)


def studies_argument(function: Callable) -> Callable:
    """Add the argument `studies`, which is a tuple of names of studies."""
    return click.argument("studies", nargs=-1, required=True, metavar="STUDY...", callback=_study_names)(function)


def _study_names(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> tuple[str, ...]:
    from convergence.layout import EXPERIMENTS

    names = [name for value in values for name in value.split(",") if name]
    return tuple(name.removeprefix(f"{EXPERIMENTS}/").removesuffix(".yaml") for name in names)


def study_file(name: str) -> Path:
    """Returns the path of the file of a study, relative to the working directory."""
    from convergence.layout import EXPERIMENTS

    return EXPERIMENTS / f"{name}.yaml"


class Names(click.ParamType):
    """A comma-separated list of names.

    Args:
        choices: The allowed names.
    """

    name = "names"

    def __init__(self, choices: Sequence[str]):
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Returns the names of a comma-separated list."""
        names = tuple(value.split(","))
        for name in names:
            if name not in self.choices:
                self.fail(f"'{name}' is not one of {', '.join(map(repr, self.choices))}.", param, ctx)
        return names


def device_option(function: Callable) -> Callable:
    """Add the option `--device`, whose value `find_device` resolves."""
    choice = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--device", type=choice, default="auto", help="auto: the GPU if there is one.")(function)


def find_device(name: str) -> str:
    """Returns the torch device, "cpu" or "cuda", for the value of `--device`.

    Raises:
        StudyError: If the name is "cuda" and torch finds no GPU.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise StudyError(f"torch {torch.__version__} finds no GPU on this machine: use --device cpu")
    return "cuda" if available and name != "cpu" else "cpu"
