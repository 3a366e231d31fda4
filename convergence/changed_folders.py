"""Whether the folders of studies still contain the images that their datasets were made from."""

import os
import shlex
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from convergence import layout
from convergence.schema import Experiment
from diffusion.config import Folder
from diffusion.errors import InputError
from diffusion.files import read_json

CHECK_SECONDS = 2


def changed_folders(experiments: Iterable[Experiment]) -> Iterator[str]:
    """Yields one sentence for each folder or zip file that has changed since its dataset was prepared.

    Names, sizes and times are compared, and no file is opened. A check that takes more than two seconds is given up.
    """
    for directory, experiment in {layout.dataset_directory(e.dataset): e for e in experiments}.items():
        dataset = experiment.dataset
        # os.path.exists is also False if a folder above it cannot be read.
        if isinstance(dataset, Folder) and os.path.exists(dataset.path) and (directory / "manifest.json").exists():
            try:
                change = _change(dataset.path, directory)
            except OSError as error:
                yield f"{dataset.path}: not checked whether its images have changed ({error})"
                continue
            if change:
                yield (
                    f"{dataset.path} has changed since {directory} was prepared from it ({change}), and studies still "
                    f"use the images of that time: {_remedy(dataset.path, experiment.name)}"
                )


def _change(source: Path, directory: Path) -> str:
    """Describes how a source differs from the dataset prepared from it; "" if it does not."""
    from diffusion.data.files import FILES, differences, snapshot  # imports Pillow, which is slow

    files = snapshot(source, CHECK_SECONDS)
    try:
        return differences(read_json(directory / FILES), files)
    except InputError:  # prepared by an earlier version, which stored no list of files
        manifest = read_json(directory / "manifest.json")
        before = manifest["count"] + len(manifest.get("skipped", ()))
        return f"{len(files)} images instead of {before}" if source.is_dir() and len(files) != before else ""


def _remedy(source: Path, study: str) -> str:
    """Returns how to make a new dataset next to the old one: the name of a dataset is that of its path."""
    source = source if source.name.strip(".") else Path(os.path.abspath(source))
    names = (source.with_name(f"{source.stem}-{number}{source.suffix}") for number in count(2))
    new = next(name for name in names if not os.path.lexists(name))
    command = shlex.join(["ln", "-s", source.name, str(new)])
    return f"for a new dataset next to it, run `{command}` and set dataset.path: {new} in {layout.study_file(study)}"
