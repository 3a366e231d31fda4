"""Describes an error of MLflow in one sentence: what is wrong, and what to do."""

import os
import re

WARNING = "Warning: "  # begins a line of `convergence sync --follow` that is no address
# Pattern in the message of an error -> what to do. `{0}` is the first group of the pattern.
REMEDIES = {
    r"[Ee]xperiment (\d+) .*deleted": "run `{environment}mlflow experiments restore -x {0}`",
    r"database schema|locate revision": "copy the database, then run `mlflow db upgrade {uri}`, or install the version "
    "of MLflow that wrote it",
    r"database is locked": "end the process that uses the database",
    r"not a database|malformed|no such table|no such column|duplicate column": "move the database away, so that a new "
    "one is made from results/",
    r"readonly|unable to open|Permission denied|Read-only": "correct the permissions",
    r"disk is full|No space left|quota": "free space",
    r"": "start that server or correct MLFLOW_TRACKING_URI",
}


def problem(error: Exception, uri: str, study: str) -> str:
    """Returns the first part of a sentence: which study is not tracked, where, why, and how to correct this.

    Args:
        error: error that MLflow raised.
        uri: address of MLflow's tracking store or server.
        study: name of the study.
    """
    text = " ".join(str(error).split())
    match, remedy = next((match, advice) for pattern, advice in REMEDIES.items() if (match := re.search(pattern, text)))
    shown = masked(uri, uri)
    environment = "" if os.environ.get("MLFLOW_TRACKING_URI") == uri else f"MLFLOW_TRACKING_URI={shown} "
    remedy = remedy.format(*match.groups(), environment=environment, uri=shown)
    # SQLAlchemy appends the statement and a link; urllib3 precedes the reason with the server and the request.
    reason = re.sub(r' (\[SQL: |\(Background on ).*|.*port=\d+\): |"\)\)$', "", text)
    return (
        f"the study {study} is not tracked in {shown} ({masked(reason, uri)[:200] or type(error).__name__}): {remedy}"
    )


def masked(text: str, uri: str) -> str:
    """Returns a text in which *** replaces the user name and the password of an MLflow address.

    Args:
        text: any text.
        uri: address that may contain a user name and a password.
    """
    login = "" if uri.startswith("sqlite") else uri.partition("//")[2].rpartition("@")[0]
    words = {login, *login.split(":", 1), *re.findall(r"[?&](?:user|password)=([^&]+)", uri)}
    for word in sorted(filter(None, words), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "***", text)
    return text
