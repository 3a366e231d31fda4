"""The errors of a study, and how a command reports them."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion.errors import InputError


class StudyError(InputError):
    """A mistake in a study, or an unusable result. The message states what is wrong, where, and what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the command with exit code 1 and one sentence on stderr after an `InputError` or an `OSError`."""
    try:
        yield
    except InputError as error:
        sys.exit(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        remedy = "free space" if full else "correct the path or its permission"
        sys.exit(f"{place}{error.strerror or error}: {remedy}, and try again")
