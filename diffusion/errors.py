"""The exceptions that the library raises for a caller's mistake, an unusable file, and a requested stop."""

from pathlib import Path


class InputError(ValueError):
    """A value or a file that the library cannot use. The message states what is wrong, where, and what to do."""


class FileError(InputError):
    """A file that is missing, damaged, or belongs to something else.

    Args:
        path: the file or directory.
        problem: what is wrong with it, such as "is damaged (unexpected end of file)". It follows the path.
    """

    def __init__(self, path: Path | str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


class Stopped(Exception):
    """A training run was asked to stop and has saved its state."""
