"""The errors of a study, and how a command reports them."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion.errors import FileError, InputError

# How a command, which writes no results, advises to write a file again.
RUN_AGAIN = "run the study again"
SAME_COMMAND = "run the same command again"


class StudyError(InputError):
    """A mistake in a study, or an unusable result. The message states what is wrong, where, and what to do."""


def with_remedy(error: InputError, again: str = SAME_COMMAND) -> str:
    """Returns the message of an error, with the advice to write the file again if it is a file of a job.

    Args:
        error: The error.
        again: How to write the file again.
    """
    from convergence.layout import REPORTS, RESULTS  # slow to import: `convergence --help` imports this module

    written = [folder.absolute() for folder in (RESULTS, REPORTS)]
    if not isinstance(error, FileError) or not any(map(error.path.absolute().is_relative_to, written)):
        return str(error)
    return f"{error}: {'delete it and ' if error.path.exists() else ''}{again}"


@contextmanager
def exit_on_user_error(again: str = RUN_AGAIN) -> Iterator[None]:
    """End the command with exit code 1 and one sentence on stderr after an `InputError` or an `OSError`.

    Args:
        again: As for `with_remedy`.
    """
    try:
        yield
    except InputError as error:
        sys.exit(with_remedy(error, again))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        remedy = "free space" if full else "correct the path or its permission"
        sys.exit(f"{place}{error.strerror or error}: {remedy}, and try again")
