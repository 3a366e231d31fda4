"""What the Snakefile calls: loading studies, checks before any job starts, the tracking process, the last lines."""

import atexit
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger as snakemake_logger

from convergence import layout
from convergence.changed_folders import changed_folders
from convergence.errors import StudyError
from convergence.provenance import newest_provenances, stale_runs, tables_hash
from convergence.resources import count_images
from convergence.schema import Experiment
from convergence.sizes import few_images
from convergence.study_file import load_experiment
from convergence.tracking.problem import WARNING
from diffusion.config import Folder
from diffusion.errors import FileError, InputError
from diffusion.evaluation.weights import check_weights, hub_directory
from diffusion.files import atomic_write, read_json

# Snakemake passes `off` as text, YAML as a truth value.
TRACKING = {"on": True, "off": False, "True": True, "False": False}
# Densities and weights whose tables can be useless, such as a normal density without overlap with the timesteps.
DELICATE = {"log_normal_sigma", "logit_normal", "speed"}
BRACES = re.compile("[{}]")
LEFT_JOBS_SECONDS = 120  # until cancelled SLURM jobs must have ended
LAST_PASS_SECONDS = 120  # until the tracking process must have forwarded the rest
TRACKING_LOG = layout.RESULTS / "tracking.log"
_tracker: subprocess.Popen | None = None


def set_environment(root: str) -> None:
    """Set the environment of the processes of all jobs: where this project's packages are, and how memory is kept.

    Args:
        root: directory of the Snakefile.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Packages of the working directory do not hide those of this project.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Keep freed memory: page faults cost a third of the time of small convolutions. glibc reads these at start only.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))


def load_experiments(config: Mapping[str, Any], folder: Path = layout.EXPERIMENTS) -> dict[str, Experiment]:
    """Load and validate the studies that `--config experiments=a,b` names, or else the study `openmoji`.

    Args:
        config: Snakemake's configuration.
        folder: directory of the study files.

    Returns:
        The studies by name, in the order in which they are named.

    Raises:
        StudyError: A key of the configuration is unknown, a study file is missing or invalid, or a study has too few
            images.
    """
    unknown = set(config) - {"experiments", "tracking"}
    if unknown:
        raise StudyError(f"--config {unknown.pop()}: unknown key: use experiments=NAME,NAME or tracking=off")
    if str(config.get("tracking", "on")) not in TRACKING:
        raise StudyError(f"--config tracking={config['tracking']}: unknown value: use tracking=on or tracking=off")
    names = [name.strip().removesuffix(".yaml") for name in str(config.get("experiments") or "openmoji").split(",")]
    experiments = {name: load_experiment(folder / f"{name}.yaml") for name in names}
    for name, experiment in experiments.items():
        _check_images(experiment, folder / f"{name}.yaml")
    return experiments


def check_curves(experiments: Mapping[str, Experiment]) -> None:
    """Check the tables of curves from other people.

    Raises:
        StudyError: A table is missing or unusable.
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


def _check_images(experiment: Experiment, file: Path) -> None:
    """Check that a prepared dataset, or else the folder it is prepared from, has the images that the study needs.

    Raises:
        FileError: The manifest of the prepared dataset is damaged.
        StudyError: The folder does not exist, or there are too few images.
    """
    dataset = experiment.dataset
    manifest = layout.dataset_directory(dataset) / "manifest.json"  # written last
    if manifest.exists():
        count = read_json(manifest).get("count")
        if not isinstance(count, int):
            raise FileError(manifest, "is damaged (it has no number of images)")
        _check_count(experiment, count, file)
    elif isinstance(dataset, Folder):
        if not dataset.path.exists():
            raise StudyError(f"{file}: dataset.path: {dataset.path} does not exist: put images there or correct it")
        _check_count(experiment, count_images(dataset), file)


def _check_count(experiment: Experiment, count: int, file: Path) -> None:
    """Check that a dataset of `count` images is large enough for the study.

    Raises:
        StudyError: There are too few images.
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


def stop_on_hangup() -> None:
    """Stop as after Ctrl-C when the terminal is closed, unless `nohup` makes this process ignore that."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def check_directories(studies: Iterable[str]) -> None:
    """Check that Snakemake can use the directory of this project, and that results and reports can be written.

    Raises:
        StudyError: The path of the project has braces, or a directory cannot be written, is a file, or is a link to
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
    """Check that a directory can be written, or created in the first of its parents that exists.

    Raises:
        StudyError: It cannot.
    """
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not place.exists():
        raise StudyError(f"{place} is a link to {place.readlink()}, which does not exist: create it or remove the link")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise StudyError(f"{place.resolve()}: {error.strerror}: correct the path or its permission") from None


def date_back() -> None:
    """Set modification times in the future to the present: Snakemake fails jobs whose inputs are from the future.

    Such times come from a clock that was ahead. No file becomes newer, so no job runs again because of this.
    """
    now = time.time()
    for path in chain(layout.RESULTS.rglob("*"), layout.REPORTS.rglob("*")):
        with suppress(OSError):  # the file was removed meanwhile, or belongs to another user
            if path.stat().st_mtime > now:
                os.utime(path, (now, now))


def check_extractors(experiments: Mapping[str, Experiment]) -> None:
    """Check, before anything is trained, that the weights of the feature extractors still needed are available.

    Raises:
        StudyError: An extractor is unknown, or its weights are the wrong ones, or they are neither on this machine nor
            can be downloaded.
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


def check_schemes(experiments: Mapping[str, Experiment]) -> None:
    """Check the tables of the arms that have functions which are not finite for all parameters.

    Raises:
        StudyError: A density or a weight is not finite, or losses are to be divided by a probability of 0.
    """
    for name, experiment in experiments.items():
        for arm in experiment.arms:
            run = experiment.run(arm)
            used = {run.scheme.timesteps.chosen[0], run.scheme.mse_weight.chosen[0], run.scheme.vb_weight.chosen[0]}
            if not used & DELICATE:
                continue
            try:
                tables_hash(run)  # imports torch, which is slow
            except InputError as error:
                raise StudyError(f"{layout.study_file(name)}: arms.{arm}: {error}") from None


def print_warnings(experiments: Collection[Experiment]) -> None:
    """Print what restricts results: other code or images than those on disk, and few images."""
    for experiment in experiments:
        for warning in [*stale_runs(experiment.name, newest_provenances(experiment)), *few_images(experiment)]:
            print(f"Warning: {warning}", file=sys.stderr)
    for warning in changed_folders(experiments):
        print(f"Warning: {warning}", file=sys.stderr)


def print_repeated(jobs: Iterable[tuple[Path, Any]]) -> None:
    """Print how many checkpoints this call trains again, and why.

    Args:
        jobs: of each training job: its weights, which exist if it has run before, and Snakemake's reason to run it.
    """
    again = [reason for weights, reason in jobs if weights.exists()]

    def dataset_in(files: str) -> bool:
        return any(Path(path).is_relative_to(layout.DATASETS) for reason in again for path in getattr(reason, files))

    if dataset_in("updated_input_run"):
        text = "Note: a dataset is prepared again; what is trained is trained again only if the new images differ"
    elif dataset_in("updated_input"):
        text = f"Warning: {len(again)} trained checkpoints are trained again: the dataset has other images than before"
    elif again:
        text = (
            f"Warning: {len(again)} trained checkpoints are trained again: only the two newest states of a run are "
            "kept, so more or fewer checkpoints before its last one start it from its seed"
        )
    else:
        return
    print(text, file=sys.stderr)


def gpus(experiment: Experiment, elsewhere: bool) -> int:
    """Returns the number of GPUs that a process of a job needs, 0 or 1.

    With `device: auto` it is 1 if this machine has a GPU, or if jobs run elsewhere: the machine that submits jobs to a
    cluster often has none.

    Args:
        experiment: the study of the job.
        elsewhere: whether jobs run on other machines.
    """
    return int(experiment.device == "cuda" or (experiment.device == "auto" and (elsewhere or _has_gpu())))


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def cancel_left_jobs(jobs: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Cancel the SLURM jobs of a killed Snakemake that this call is about to submit again.

    Two jobs would write the same outputs. A training job saves its state before it ends, so nothing is lost. Snakemake
    locks the directory, so no other Snakemake waits for these jobs.

    Args:
        jobs: rule and wildcards of each job that this call will run.

    Raises:
        WorkflowError: The jobs do not end within two minutes, or squeue fails.
    """
    # The plugin stores the rule and the wildcards in the comment of a job.
    comments = {f"rule_{rule}_wildcards_{'_'.join(wildcards)}" for rule, wildcards in jobs}

    def left_jobs() -> list[str]:
        command = ["squeue", "--me", "--noheader", "--format=%i|%Z|%k"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise WorkflowError(
                f"squeue fails ({error}): start this on a login node of the cluster, or without --workflow-profile"
            ) from None
        queue = [line.split("|", 2) for line in output.splitlines()]
        return [number for number, place, comment in queue if place == os.getcwd() and comment in comments]

    left = left_jobs()
    if not left:
        return
    print(f"Cancelling the SLURM jobs of a killed Snakemake first: {' '.join(left)}", file=sys.stderr)
    subprocess.run(["scancel", *left], check=True)
    deadline = time.monotonic() + LEFT_JOBS_SECONDS
    while left := left_jobs():
        if time.monotonic() > deadline:
            raise WorkflowError(
                f"SLURM jobs {' '.join(left)} of a killed Snakemake do not end within 2 minutes: cancel them with "
                "scancel, or ask the administrators of the cluster, then start again"
            )
        time.sleep(2)


def save_study_files(experiments: Mapping[str, Experiment]) -> None:
    """Write the study files as they were read: other processes of this study must use the same settings."""
    layout.STUDIES.mkdir(parents=True, exist_ok=True)
    for name, experiment in experiments.items():
        with atomic_write(layout.STUDIES / f"{name}.yaml") as file:
            file.write(experiment.text.encode())


def start_tracking(config: Mapping[str, Any], experiments: Mapping[str, Experiment]) -> None:
    """Start the process that forwards the results of the jobs to MLflow."""
    global _tracker
    studies = [name for name, experiment in experiments.items() if experiment.tracking]
    if not studies or not TRACKING[str(config.get("tracking", "on"))]:
        return
    layout.RESULTS.mkdir(exist_ok=True)
    for name in studies:
        layout.untracked(name).touch()
    command = [sys.executable, "-m", "convergence", "sync", "--follow", str(os.getpid()), *studies]
    with TRACKING_LOG.open("a") as log:
        # In a session of its own it does not receive Ctrl-C, so it can report how the jobs ended.
        _tracker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True)


def stop_tracking(experiments: Iterable[str]) -> list[str]:
    """Let the tracking process forward the rest and end, and print what it could not forward.

    Args:
        experiments: names of the studies, for the hint that is printed if the process does not end properly.

    Returns:
        One line per study in MLflow: its name and its address.
    """
    if _tracker is None:
        return []
    _tracker.send_signal(signal.SIGTERM)
    rest = f"the next run of the study, or `convergence sync {' '.join(experiments)}`, forwards the rest"
    try:
        lines = _tracker.communicate(timeout=LAST_PASS_SECONDS)[0].splitlines()
    except subprocess.TimeoutExpired:
        lines = [f"{WARNING}MLflow does not answer in time: {rest}"]
    if _tracker.returncode not in (None, 0, -signal.SIGTERM):  # SIGTERM ends a process that has not begun
        lines.append(f"{WARNING}the process that forwards results to MLflow has failed ({TRACKING_LOG}): {rest}")
    for line in lines:
        if line.startswith(WARNING):
            print(line, file=sys.stderr)
    return [line for line in lines if not line.startswith(WARNING)]


def track_rest(config: Mapping[str, Any], experiments: Mapping[str, Experiment]) -> None:
    """Forward what MLflow may lack of these studies since a process was killed or MLflow failed."""
    left = [name for name, experiment in experiments.items() if experiment.tracking and layout.untracked(name).exists()]
    if left and TRACKING[config.get("tracking", "on")]:
        subprocess.run([sys.executable, "-m", "convergence", "sync", *left], stdout=sys.stderr)


def print_results(experiments: Iterable[str], outputs: Collection[Path], tracked: list[str]) -> None:
    """Print the last lines of a run: the warnings and the answer of each study, its files, commands that show more.

    Args:
        experiments: names of the selected studies.
        outputs: files of all jobs of this call, including jobs whose files were up to date. Other files are not named:
            they may be of another call.
        tracked: result of `stop_tracking`.
    """
    from convergence.analysis.verdict import read_verdict  # slow to import, and not needed before the end

    lines = []
    for name in experiments:
        verdict = layout.report_directory(name) / "verdict.json"
        if verdict in outputs:
            result = read_verdict(verdict)
            answer = result.answer or "compares nothing, because the study has no section `compare`."
            lines += [f"Warning: {warning}" for warning in result.warnings]
            lines += [f"{name}: {answer}", *(f"  {run.arm} seed {run.seed} {run.reason}" for run in result.failed)]
            lines.append(f"  The verdict: {verdict.with_suffix('.md').resolve()}")
    if layout.FIGURE in outputs:
        lines += ["", f"The figure: {layout.FIGURE.resolve()}"]
    if lines:
        lines += ["", f"All results in one page: `{report_command(experiments)}`"]
    if tracked:
        lines += [f"In MLflow: {_mlflow_command()}open", *(f"  {line}" for line in tracked)]
    if lines:
        print("\n" + "\n".join(lines) + "\n", file=sys.stderr)


def report_command(experiments: Iterable[str]) -> str:
    """Returns the command that writes `reports/report.html` for these studies: with make where the Makefile is."""
    studies = ",".join(experiments)
    if Path.cwd() == layout.ROOT:
        return f"make report EXPERIMENTS={studies}"
    config = ["--config", f"experiments={studies}"]
    stylesheet = str(layout.ROOT / "workflow/report/report.css")
    run = layout.snakemake_command("--cores", "all", *config)
    report = layout.snakemake_command("--report", str(layout.HTML_REPORT), "--report-stylesheet", stylesheet, *config)
    return f"{run} && {report}"


def _mlflow_command() -> str:
    """The command that serves MLflow's store, if that is a database of this directory."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    if Path.cwd() == layout.ROOT:
        return "`make ui`, then "
    return f"`mlflow server --backend-store-uri sqlite:///{Path.cwd()}/mlflow.db`, then "


def at_exit_if_nothing_is_left(action: Callable[[], None]) -> None:
    """Call a function at the end of this process if Snakemake finds no job to run: it calls no hook then."""

    def keep(record: logging.LogRecord) -> bool:
        if record.msg == NOTHING_TO_BE_DONE_MSG:
            atexit.register(action)
        return True

    snakemake_logger.addFilter(keep)
