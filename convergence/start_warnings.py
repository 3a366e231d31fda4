"""Prints warnings before any job starts: old code, changed folders, few images, checkpoints that are trained again."""

import os
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from convergence import layout
from convergence.provenance import NewestProvenances, newest_provenances, stale_runs
from convergence.resources import count_images
from convergence.schema import Experiment
from diffusion.config import Folder
from diffusion.errors import InputError
from diffusion.evaluation.weights import DIMENSIONS
from diffusion.files import read_json

CHECK_SECONDS = 2


def print_warnings(experiments: Collection[Experiment]) -> None:
    """Prints warnings about results of other code, few images, and image folders that have changed."""
    for experiment in experiments:
        newest = newest_provenances(experiment)
        for warning in [*stale_runs(experiment.name, newest), *few_images(experiment, newest)]:
            print(f"Warning: {warning}", file=sys.stderr)
    for warning in changed_folders(experiments):
        print(f"Warning: {warning}", file=sys.stderr)


def print_repeated(jobs: Iterable[tuple[Path, Any]]) -> None:
    """Prints how many finished checkpoints this call trains again, and why.

    Args:
        jobs: for each training job, the path of its weights and Snakemake's reason to run the job. The weights exist if
            the job has run before.
    """
    again = [reason for weights, reason in jobs if weights.exists()]
    changed = [reason for reason in again if reason.input_changed]

    def dataset_in(files: str) -> bool:
        return any(Path(path).is_relative_to(layout.DATASETS) for reason in again for path in getattr(reason, files))

    if dataset_in("updated_input_run"):
        print(
            "Note: a dataset is prepared again; finished checkpoints are kept unless the new images differ",
            file=sys.stderr,
        )
        again = changed
    if not again:
        return
    if changed:
        cause = (
            "only the two newest states of a run are kept, so adding or removing checkpoints before the last one "
            "trains it again from step 0"
        )
    elif dataset_in("updated_input"):
        cause = "the dataset has other images than before"
    else:
        cause = str(again[0])
    print(f"Warning: {len(again)} trained checkpoints are trained again: {cause}", file=sys.stderr)


def few_images(experiment: Experiment, newest: NewestProvenances) -> list[str]:
    """Returns a warning if a study has few training images, and a warning if it has few reference images.

    Training images are few if they do not fill one batch. Reference images are few if their number does not exceed the
    number of dimensions of the features. The list is empty if the number of images is not known, because the dataset is
    not downloaded yet.

    Args:
        experiment: the study.
        newest: (arm, provenance) of each run, as `convergence.provenance.newest_provenances` returns them.

    Raises:
        FileError: if the manifest of the dataset is damaged.
    """
    dataset, evaluate, file = experiment.dataset, experiment.evaluate, layout.study_file(experiment.name)
    manifest = layout.dataset_directory(dataset) / "manifest.json"
    recorded = [facts["dataset_images"] for _, facts in newest if "dataset_images" in facts]
    if manifest.exists():
        count = read_json(manifest)["count"]
    elif recorded:  # the dataset was deleted
        count = recorded[0]
    elif isinstance(dataset, Folder):
        count = count_images(dataset)
    else:
        return []
    training = count - dataset.held_out
    batch_size = max(experiment.run(arm).train.batch_size for arm in experiment.arms)
    references = evaluate.reference_images or (dataset.held_out if evaluate.reference == "held_out" else training)
    dimensions = max(DIMENSIONS[name] for name in evaluate.features)
    of = f"{count:,} images, dataset.held_out {dataset.held_out:,}"
    warnings = []
    if training < batch_size:
        warnings.append(
            f"{file}: training has {training:,} images ({of}), fewer than its batch_size {batch_size:,}, so each batch "
            "has images more than once: use more images, or lower dataset.held_out or train.batch_size"
        )
    if references <= dimensions:
        warnings.append(
            f"{file}: the metrics compare with {references:,} reference images ({of}), but the features have "
            f"{dimensions:,} dimensions, so the covariance of the references is singular, and FD depends strongly on "
            f"their number: use more than {dimensions:,}"
        )
    return warnings


def changed_folders(experiments: Iterable[Experiment]) -> Iterator[str]:
    """Yields one sentence for each folder or zip file that has changed since a dataset was prepared from it.

    Names, sizes and times of the images are compared, and no file is opened. The check of a folder stops after two
    seconds.
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
    """Returns advice on how to make a new dataset: a link to the source gets a dataset of its own."""
    source = source if source.name.strip(".") else Path(os.path.abspath(source))
    names = (source.with_name(f"{source.stem}-{number}{source.suffix}") for number in count(2))
    new = next(name for name in names if not os.path.lexists(name))
    command = shlex.join(["ln", "-s", source.name, str(new)])
    return f"for a new dataset next to it, run `{command}` and set dataset.path: {new} in {layout.study_file(study)}"
