"""Checks studies, images, curves, directories, feature extractors and schemes before any job starts."""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convergence import layout
from convergence.errors import StudyError
from convergence.gpus import MAX_JOBS_PER_GPU
from convergence.provenance import tables_hash
from convergence.resources import count_images
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from diffusion.config import Folder
from diffusion.errors import FileError, InputError
from diffusion.evaluation.weights import check_weights, hub_directory
from diffusion.files import read_json

# Snakemake passes `off` as text, YAML as a truth value.
TRACKING = {"on": True, "off": False, "True": True, "False": False}
# Densities, weights and paths that are 0 or not finite for some parameters, such as a normal density far from all
# timesteps.
CAN_BE_NOT_FINITE = {"log_normal_sigma", "logit_normal", "speed", "flow", "karras"}
BRACES = re.compile("[{}]")


def load_experiments(config: Mapping[str, Any], folder: Path = layout.EXPERIMENTS) -> dict[str, Experiment]:
    """Loads and validates the studies that `--config experiments=a,b` names, or else the study `openmoji`.

    Args:
        config: Snakemake's configuration.
        folder: directory of the study files.

    Returns:
        the studies by name, in the order of the configuration.

    Raises:
        StudyError: a key of the configuration is unknown, a study file is missing or invalid, or a study has too few
            images.
    """
    unknown = set(config) - {"experiments", "tracking", "jobs_per_gpu"}
    if unknown:
        raise StudyError(
            f"--config {unknown.pop()}: unknown key: use experiments=NAME,NAME, tracking=off or jobs_per_gpu=NUMBER"
        )
    if str(config.get("tracking", "on")) not in TRACKING:
        raise StudyError(f"--config tracking={config['tracking']}: unknown value: use tracking=on or tracking=off")
    names = [name.strip().removesuffix(".yaml") for name in str(config.get("experiments") or "openmoji").split(",")]
    experiments = {name: load_experiment(folder / f"{name}.yaml") for name in names}
    if len({experiment.sample.keep for experiment in experiments.values()}) > 1:
        # A rule of Snakemake has the same outputs for all studies.
        raise StudyError("--config experiments: only some of these studies have sample.keep: true: run them separately")
    for name, experiment in experiments.items():
        _check_images(experiment, folder / f"{name}.yaml")
    return experiments


def tracked_studies(config: Mapping[str, Any], experiments: Mapping[str, Experiment]) -> list[str]:
    """Returns the names of the studies whose results this call sends to MLflow."""
    on = TRACKING[str(config.get("tracking", "on"))]
    return [name for name, experiment in experiments.items() if on and experiment.tracking]


def chosen_jobs_per_gpu(config: Mapping[str, Any]) -> int | None:
    """Returns the number of jobs that share a GPU, as `--config jobs_per_gpu=N` states it; None if it is not stated.

    Raises:
        StudyError: the value is not a whole number from 1 to 16.
    """
    value = config.get("jobs_per_gpu")
    if value is not None and (type(value) is not int or not 1 <= value <= MAX_JOBS_PER_GPU):
        raise StudyError(f"--config jobs_per_gpu={value}: use a whole number from 1 to {MAX_JOBS_PER_GPU}")
    return value


def check_experiments(experiments: Mapping[str, Experiment]) -> None:
    """Checks that the jobs of studies can write their results, and that their inputs can be used.

    Raises:
        StudyError: a directory cannot be written, or external curves, weights of a feature extractor, or a scheme
            cannot be used.
    """
    _check_directories(experiments)
    _check_curves(experiments)
    _check_extractors(experiments)
    _check_schemes(experiments)


def _check_images(experiment: Experiment, file: Path) -> None:
    """Checks that a prepared dataset, or the folder that it will be prepared from, has enough images for the study.

    Raises:
        FileError: the manifest of the prepared dataset is damaged.
        StudyError: the folder does not exist, or there are too few images.
    """
    dataset = experiment.dataset
    manifest = layout.dataset_directory(dataset) / "manifest.json"  # written last
    if manifest.exists():
        count = read_json(manifest).get("count")
        if not isinstance(count, int):
            raise FileError(manifest, "is damaged (the number of images is missing)")
        _check_count(experiment, count, file)
    elif isinstance(dataset, Folder):
        if not dataset.path.exists():
            raise StudyError(f"{file}: dataset.path: {dataset.path} does not exist: put images there or correct it")
        _check_count(experiment, count_images(dataset), file)


def _check_count(experiment: Experiment, count: int, file: Path) -> None:
    """Checks that a dataset of `count` images is large enough for the study.

    Raises:
        StudyError: there are too few images.
    """
    dataset, evaluate = experiment.dataset, experiment.evaluate
    if not count:
        place = getattr(dataset, "path", "it")
        raise StudyError(f"{file}: dataset: there are no images in {place}: name a folder of images or a complete zip")
    if dataset.held_out >= count:
        raise StudyError(
            f"{file}: dataset.held_out: {dataset.held_out} of {count} images leaves none to train on: lower it"
        )
    available = dataset.held_out if evaluate.reference == "held_out" else count - dataset.held_out
    part = f"part `{evaluate.reference}` ({count} images, dataset.held_out {dataset.held_out})"
    if available < 2:
        raise StudyError(f"{file}: dataset: the {part} needs at least 2 images, but has {available}: add images")
    if available < (evaluate.reference_images or 0):
        raise StudyError(
            f"{file}: evaluate.reference_images: {evaluate.reference_images} is more than the {available} images of "
            f"the {part}: lower it"
        )
    probe = experiment.probe
    if probe and not dataset.held_out and count < 2 * probe.batch_size:
        raise StudyError(
            f"{file}: probe.batch_size: {count} images are fewer than two batches of {probe.batch_size}: lower it"
        )


def _check_directories(studies: Iterable[str]) -> None:
    """Checks that Snakemake can use the directory of this project, and that results and reports can be written.

    Raises:
        StudyError: the path of the project has braces, or a directory cannot be written, is a file, or is a link to
            nothing.
    """
    if BRACES.search(str(layout.ROOT)):
        raise StudyError(f"{layout.ROOT}: braces are wildcards of Snakemake: rename the directory")
    for study in studies:
        _check_directory(layout.RESULTS / study)
        _check_directory(layout.report_directory(study))
    for path in (layout.DATASETS, layout.REFERENCES, layout.FRONT_PAGE.parent):
        _check_directory(path)


def _check_directory(path: Path) -> None:
    """Checks that a directory can be written, or can be created in the first of its parents that exists.

    Raises:
        StudyError: the directory cannot be written or created.
    """
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not place.exists():
        raise StudyError(f"{place} is a link to {place.readlink()}, which does not exist: create it or remove the link")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise StudyError(f"{place.resolve()}: {error.strerror}: correct the path or its permission") from None


def _check_curves(experiments: Mapping[str, Experiment]) -> None:
    """Checks the tables of curves from other people.

    Raises:
        StudyError: a table is missing or unusable.
    """
    for name, curves in [(name, e.external_curves) for name, e in experiments.items() if e.external_curves]:
        from convergence.tables import read_curves  # imports pandas, which is slow

        key = f"{layout.study_file(name)}: external_curves"
        if not curves.exists():
            raise StudyError(f"{key}: {curves} does not exist: correct the path or remove the key")
        if BRACES.search(str(curves)):
            raise StudyError(f"{key}: {curves}: braces are wildcards of Snakemake: rename the file")
        try:
            read_curves(curves)
        except StudyError as error:
            raise StudyError(f"{key}: {error}") from None


def _check_extractors(experiments: Mapping[str, Experiment]) -> None:
    """Checks that the weights are available for all feature extractors whose references do not exist yet.

    Raises:
        StudyError: an extractor is unknown, its weights are wrong, or the weights are not on this machine and cannot be
            downloaded.
    """
    for name, experiment in experiments.items():
        evaluate = experiment.evaluate
        for features in evaluate.features:
            if layout.reference_path(experiment.dataset, features, evaluate).exists():
                continue
            weights = evaluate.weights.get(features)
            try:
                if check_weights(features, *(weights.path, weights.sha256) if weights else ()) is None:
                    _check_directory(hub_directory())
            except InputError as error:
                raise StudyError(f"{layout.study_file(name)}: evaluate.features: {error}") from None


def _check_schemes(experiments: Mapping[str, Experiment]) -> None:
    """Checks the tables of arms with a density, weight or path that is not finite for some parameters.

    Raises:
        StudyError: a density or a weight is not finite, x_0 does not follow from the prediction at some timestep, or
            losses are to be divided by a probability of 0.
    """
    for name, experiment in experiments.items():
        arms = [(arm, values) for arm in experiment.arms for values in (None, *experiment.grid(arm))]
        for arm, run in [(arm, experiment.run(arm, values)) for arm, values in arms]:
            used = {run.scheme.timesteps.chosen[0], run.scheme.mse_weight.chosen[0], run.scheme.vb_weight.chosen[0]}
            used.add(run.diffusion.schedule.chosen[0])
            if not used & CAN_BE_NOT_FINITE:
                continue
            try:
                tables_hash(run)  # imports torch, which is slow
            except InputError as error:
                raise StudyError(f"{layout.study_file(name)}: arms.{arm}: {error}") from None
