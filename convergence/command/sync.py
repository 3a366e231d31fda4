"""`convergence sync`: forwards the results of studies to MLflow."""

import sys

import click

from convergence.command.options import studies_argument, study_file
from convergence.tracking.follow import sync


@click.command("sync")
@studies_argument
@click.option(
    "--uri", envvar="MLFLOW_TRACKING_URI", show_envvar=True, default="sqlite:///mlflow.db", metavar="URI",
    help="Address of the MLflow server or store.",
)  # fmt: skip
def main(studies: tuple[str, ...], uri: str) -> None:
    """Forward the results of studies to MLflow.

    A running study does this itself. This command forwards what it could not, for instance because the server was down.
    """
    if not sync(uri, [study_file(name) for name in studies]):
        sys.exit(1)
