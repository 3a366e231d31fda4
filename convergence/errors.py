"""Defines the error of a study, and how commands and jobs report errors of the user."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion.errors import FileError, InputError

# How a command, which writes no results, advises to write a file again.
RUN_AGAIN = "run the study again"
SAME_COMMAND = "run the same command again"


class StudyError(InputError):
    """A mistake in a study or a command, or an unusable result.

    The message states what is wrong, where, and what to do.
    """


def with_remedy(error: InputError, again: str = SAME_COMMAND) -> str:
    """Returns the message of an error, with advice if the error is about a file in results/ or reports/.

    Such a file was written by a job. The advice is to delete the file, if it exists, and to write it again.

    Args:
        error: the error.
        again: how to write the file again, such as `RUN_AGAIN`.
    """
    from convergence.layout import REPORTS, RESULTS  # slow to import: `convergence --help` imports this module

    written = [folder.absolute() for folder in (RESULTS, REPORTS)]
    if not isinstance(error, FileError) or not any(map(error.path.absolute().is_relative_to, written)):
        return str(error)
    return f"{error}: {'delete it and ' if error.path.exists() else ''}{again}"


@contextmanager
def exit_on_user_error(again: str = RUN_AGAIN) -> Iterator[None]:
    """Ends the process with exit code 1 and a message if the body raises an `InputError` or an `OSError`.

    Args:
        again: how to write a file in results/ or reports/ again, as for `with_remedy`.
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
