"""Diffusion training schemes under study: the mathematics, the network, training, sampling and evaluation.

Nothing in this package knows of Snakemake or MLflow.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class StudyError(Exception):
    """A mistake of the user or the machine, told in one sentence: what, where, and what to do about it."""


class Stopped(Exception):
    """A long work was asked to stop and has saved how far it came."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """End a command with exit code 1 and one sentence on stderr where the user or the machine made a mistake."""
    try:
        yield
    except StudyError as error:
        sys.exit(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{place}{error.strerror or error}: make room, or mend the path or its permission, and try again")
