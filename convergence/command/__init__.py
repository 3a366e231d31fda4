"""Defines the command `convergence`. Each subcommand is a module with a click command named `main`."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from convergence.errors import StudyError, exit_on_user_error
from diffusion.errors import FileError, InputError

# Name of each subcommand, which is also its module, and the first line of its help. The modules are imported on use:
# torch, pandas and MLflow take seconds to import, and an installation of the library alone lacks some of them.
SUBCOMMANDS = {
    "budget": "Estimate the hours, disk space and jobs of studies.",
    "plan": "Estimate how many seeds a difference needs, from the metrics of a finished study.",
    "tune": "Choose settings for each arm by trials, and write a study with the best.",
    "judge": "Compare two arms of a CSV file of curves, and write the verdict and its figures.",
    "orphans": "List results that belong to no study any more.",
    "carry": "Run studies on a machine without a network.",
    "sync": "Forward the results of studies to MLflow.",
    "evaluate": "Compare a set of generated images with a set of real ones.",
    "sample": "Sample images from a checkpoint.",
    "export": "Convert weights of a run to the layout of guided-diffusion.",
}


class _Subcommands(click.Group):
    """A click group that imports the module of a subcommand on use, and reports errors in one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return import_module(f"{__name__}.{cmd_name}").main if cmd_name in SUBCOMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        with exit_on_user_error(), _explain_missing_packages(), _keys_as_options(ctx):
            return super().invoke(ctx)


@contextmanager
def _explain_missing_packages() -> Iterator[None]:
    """Turns the error for a package that is not installed into a `StudyError` that states how to install the package.

    Raises:
        ModuleNotFoundError: if the missing module belongs to this project.
        StudyError: if the missing module belongs to another package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("convergence", "diffusion"):
            raise
        raise StudyError(
            f"this command needs the Python package {package}, which is not installed: "
            "run `pip install '.[study]'` in a clone of the project"
        ) from None


@contextmanager
def _keys_as_options(ctx: click.Context) -> Iterator[None]:
    """Turns an error of the library about a value into a `StudyError` that names the option of the subcommand.

    Raises:
        InputError: if the error is about a file or a study.
        StudyError: if the error is about a value.
    """
    try:
        yield
    except InputError as error:
        if isinstance(error, (FileError, StudyError)):
            raise
        message = str(error)
        for parameter in import_module(f"{__name__}.{ctx.invoked_subcommand}").main.params:
            message = re.sub(rf"(^|: ){parameter.name}: ", rf"\1{parameter.opts[0]}: ", message)
        raise StudyError(message) from None


@click.group(
    cls=_Subcommands,
    context_settings={"show_default": True, "max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
def main() -> None:
    """Plan, judge and maintain studies of how fast diffusion models converge.

    Studies are read from experiments/ in the working directory. Snakemake runs them: see `make help` in the clone.
    `convergence COMMAND --help` shows the options of a command.
    """
    logging.basicConfig(format="%(message)s")
    for package in ("convergence", "diffusion"):
        logging.getLogger(package).setLevel(logging.INFO)
