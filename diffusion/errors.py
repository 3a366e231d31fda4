"""Exceptions of the library: an unusable value, an unusable file, and a requested stop."""

from pathlib import Path


class InputError(ValueError):
    """A value or file that the library cannot use. The message states what is wrong, where, and what to do."""


class FileError(InputError):
    """A file that is missing, damaged, or belongs to something else.

    Args:
        path: The file or directory. It is also the attribute `path` of the exception.
        problem: What is wrong, such as "is damaged (unexpected end of file)". The message is "<path>: <problem>".
    """

    def __init__(self, path: Path | str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


class Stopped(Exception):
    """Training was asked to stop. Its state is saved, and training can resume from it."""
