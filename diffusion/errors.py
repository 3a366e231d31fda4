"""Exceptions of the library: for unusable values, for unusable files, and for requests to stop training."""

from pathlib import Path


class InputError(ValueError):
    """The library cannot use a value or a file. The message states what is wrong, where, and what to do."""


class FileError(InputError):
    """A file is missing, damaged, or does not have the expected content. The message is "<path>: <problem>".

    Args:
        path: file or directory. The exception has this path as its attribute `path`.
        problem: what is wrong, such as "is damaged (unexpected end of file)".
    """

    def __init__(self, path: Path | str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


class Stopped(Exception):
    """Training stopped because a stop was requested. The training state is saved, and training can resume from it."""
