"""`convergence sync`: sends the results of studies to MLflow."""

import sys

import click

from convergence import layout
from convergence.command.options import studies_argument
from convergence.tracking.follow import follow, sync


@click.command("sync")
@studies_argument
@click.option(
    "--uri", envvar="MLFLOW_TRACKING_URI", show_envvar=True, default="sqlite:///mlflow.db", metavar="URI",
    help="Address of the MLflow server or store.",
)  # fmt: skip
@click.option("--follow", "parent", type=int, hidden=True, metavar="PID",
              help="Forward repeatedly until this parent process ends: a running study starts this.")  # fmt: skip
def main(studies: tuple[str, ...], uri: str, parent: int | None) -> None:
    """Forward the results of studies to MLflow.

    A running study does this itself. This command sends the results that are missing in MLflow, for instance because
    the server was down. The settings are those with which each study ran last.
    """
    started = {name: layout.STUDIES / f"{name}.yaml" for name in studies}
    paths = [path if path.exists() else layout.study_file(name) for name, path in started.items()]
    if parent is not None:
        follow(uri, paths, parent)
    elif not sync(uri, paths):
        sys.exit(1)
