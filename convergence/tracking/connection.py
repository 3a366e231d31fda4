"""Connects to MLflow's tracking store or to an MLflow server."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

ANSWER_SECONDS = 1.5


def configure_mlflow() -> None:
    """Sets MLflow's environment variables: little output and short retries.

    Long retries are not needed, because the process that sends results to MLflow tries again in its next pass.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # An open connection to an SQLite file that was deleted accepts writes without an error.
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "2")
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def is_server(uri: str) -> bool:
    """Returns whether an MLflow address names a server, and not a database or a directory."""
    return uri.startswith("http")


def check_answer(uri: str) -> None:
    """Checks that a server or database server answers at once. MLflow itself retries for up to two minutes.

    Args:
        uri: address of MLflow's tracking store or server.

    Raises:
        MlflowException: a server does not answer.
        SQLAlchemyError: a database server accepts no connection.
    """
    # Imported here, as in all functions of this file, because it takes seconds.
    from mlflow.store.db.utils import create_sqlalchemy_engine
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    if is_server(uri):
        server = get_default_host_creds(uri)
        http_request(server, "/health", "GET", timeout=ANSWER_SECONDS, max_retries=0, raise_on_status=False)
    elif _database(uri) not in (None, "sqlite"):
        create_sqlalchemy_engine(uri).connect().close()


def connect(uri: str) -> "MlflowClient":
    """Returns an MLflow client for the address of a tracking store or server.

    The tables of an empty database are created.
    """
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if _database(uri):
        # MLflow puts its default directory into an SQL statement without quoting; a file URL has no special characters.
        SqlAlchemyStore(uri, Path("mlruns").resolve().as_uri())
    return MlflowClient(uri)


def artifact_root() -> str:
    """Returns where the artifacts of new MLflow experiments are stored, unless an MLflow server chooses the place."""
    return (os.environ.get("MLFLOW_ARTIFACTS_DESTINATION") or Path("mlartifacts").resolve().as_uri()).rstrip("/")


def is_elsewhere(location: str, expected: str) -> bool:
    """Returns whether artifacts are in an unexpected local directory that is outside of the working directory.

    Args:
        location: artifact location of an MLflow experiment.
        expected: artifact location that a new MLflow experiment would have.
    """
    path = _local_path(location)
    return path is not None and path != _local_path(expected) and not path.is_relative_to(Path.cwd())


def _local_path(location: str) -> Path | None:
    """Returns the path of a local artifact location, given as a path or a file URL; None for other locations."""
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else location).resolve()


def _database(uri: str) -> str | None:
    """Returns the kind of a database, such as `sqlite`; None for other addresses."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    kind = uri.partition(":")[0].partition("+")[0]
    return kind if kind in DATABASE_ENGINES else None
