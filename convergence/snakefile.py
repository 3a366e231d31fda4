"""What the Snakefile calls: loading studies, checks before any job starts, the tracking process, the terminal."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger as snakemake_logger
from snakemake_interface_logger_plugins.common import LogEvent

from convergence import layout
from convergence.answers import answer, plain, sections
from convergence.errors import StudyError
from convergence.resources import pictures
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from diffusion.config import Folder
from diffusion.errors import InputError
from diffusion.evaluation.weights import check_weights
from diffusion.files import read_json

FIGURE, VERDICT = layout.REPORTS / "fid_curves.png", layout.REPORTS / "verdict.md"
# What Snakemake says of its own scheduling.
NOISE = ("Select jobs to execute", "Execute ", "Removing temporary output", "Would remove temporary output")
# Snakemake hands `off` on as a word, YAML as a truth value.
TRACKING = {"on": True, "off": False, True: True, False: False}
LEFT_JOBS_SECONDS = 120
LAST_PASS_SECONDS = 120  # for the tracking process to forward what is left
_tracker: subprocess.Popen | None = None


def set_environment(root: str) -> None:
    """What the processes of all jobs inherit: where our packages are, and how memory is kept."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Keep freed memory: page faults cost a third of the time of small convolutions. glibc reads these at start only.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))


def load_experiments(config: Mapping[str, Any], folder: Path) -> dict[str, Experiment]:
    """The studies that `--config experiments=a,b` names, validated; openmoji when it names none.

    Raises:
        StudyError: a file is missing or wrong, or the images of a study are not there.
    """
    unknown = set(config) - {"experiments", "tracking"}
    if unknown:
        raise StudyError(f"--config {unknown.pop()}: unknown key: say experiments=NAME,NAME or tracking=off")
    if config.get("tracking", "on") not in TRACKING:
        raise StudyError(f"--config tracking={config['tracking']}: say tracking=on or tracking=off")
    names = [name.strip().removesuffix(".yaml") for name in str(config.get("experiments") or "openmoji").split(",")]
    experiments = {name: load_experiment(folder / f"{name}.yaml") for name in names}
    for name, experiment in experiments.items():
        dataset = experiment.dataset
        prepared = layout.dataset_directory(dataset) / "manifest.json"  # written last
        if isinstance(dataset, Folder) and not dataset.path.exists() and not prepared.exists():
            raise StudyError(
                f"{folder / name}.yaml: dataset.path: {dataset.path} is not there: put images there or mend it"
            )
        if prepared.exists():
            _check_count(experiment, read_json(prepared)["count"], folder / f"{name}.yaml")
        elif isinstance(dataset, Folder):
            _check_count(experiment, pictures(dataset), folder / f"{name}.yaml")
        if experiment.published and not experiment.published.exists():
            raise StudyError(f"{folder / name}.yaml: published: there is no {experiment.published}: mend or drop it")
    return experiments


def _check_count(experiment: Experiment, found: int, file: Path) -> None:
    """Make sure that of the pictures found there are as many as the study takes.

    Raises:
        StudyError: there are fewer.
    """
    dataset, evaluate = experiment.dataset, experiment.evaluate
    if not found:
        place = getattr(dataset, "path", "it")
        raise StudyError(f"{file}: dataset: there are no pictures in {place}: name a folder with some, or a whole zip")
    if dataset.held_out >= found:
        raise StudyError(
            f"{file}: dataset.held_out: {dataset.held_out} of {found} pictures leaves none to train on: lower it"
        )
    left = dataset.held_out if evaluate.reference == "held_out" else found - dataset.held_out
    wanted = evaluate.reference_images or 1
    if left < wanted:
        raise StudyError(
            f"{file}: evaluate.reference_images: {wanted} ({evaluate.reference}) of {found} pictures, of which "
            f"dataset.held_out keeps {dataset.held_out}: too few: lower it"
        )


def check_writable() -> None:
    """Make sure that results can be written at all.

    Raises:
        StudyError: a directory of results is read-only.
    """
    for path in (layout.RESULTS, layout.REPORTS):
        if path.exists() and not os.access(path, os.W_OK):
            raise StudyError(f"{path.resolve()}: Read-only: nothing can be written there: mend the mount or permission")


def date_back() -> None:
    """Give results from the future, left by a clock that was ahead, the present time: Snakemake fails jobs over them.

    min(time, now) never turns an older file into a newer one, so nothing is made again because of it.
    """
    now = time.time()
    for path in chain(layout.RESULTS.rglob("*"), layout.REPORTS.rglob("*")):
        with suppress(OSError):  # gone meanwhile, or another user's
            if path.stat().st_mtime > now:
                os.utime(path, (now, now))


def check_extractors(experiments: Mapping[str, Experiment]) -> None:
    """Make sure, before anything is trained, that every reference still to be made will find its extractor's weights.

    Raises:
        StudyError: an extractor is unknown; its weights are not the right ones, or neither here nor within reach.
    """
    for name, experiment in experiments.items():
        evaluate = experiment.evaluate
        for features in evaluate.features:
            if layout.reference_path(experiment.dataset, features, evaluate).exists():
                continue
            weights = evaluate.weights.get(features)
            try:
                check_weights(features, *(weights.path, weights.sha256) if weights else ())
            except InputError as error:
                raise StudyError(f"experiments/{name}.yaml: evaluate.features: {error}") from None


def gpus(experiment: Experiment, elsewhere: bool) -> int:
    """GPUs that one of its jobs needs: with `device: auto`, one where this machine has any, or where jobs run elsewhere
    (the machine that submits them to a cluster seldom has one)."""
    return int(experiment.device == "cuda" or (experiment.device == "auto" and (elsewhere or _has_gpu())))


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def cancel_left_jobs(jobs: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Cancel what a killed Snakemake left in SLURM's queue, of those jobs (rule, wildcards) that are to be done now.

    They would spoil the outputs of the new ones. Training jobs save before they end, so that nothing is lost.
    Snakemake's lock sees to it that no living Snakemake waits for them.

    Raises:
        WorkflowError: they do not end within two minutes, or the queue cannot be seen.
    """
    # The plugin tells jobs apart by their comment, and has no name for it.
    comments = {f"rule_{rule}_wildcards_{'_'.join(wildcards)}" for rule, wildcards in jobs}

    def left_jobs() -> list[str]:
        command = ["squeue", "--me", "--noheader", "--format=%i|%Z|%k"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise WorkflowError(
                f"squeue fails ({error}): start this on a login node of the cluster, or without --workflow-profile"
            ) from None
        queue = [line.split("|", 2) for line in told.splitlines()]
        return [number for number, place, comment in queue if place == os.getcwd() and comment in comments]

    left = left_jobs()
    if not left:
        return
    print(f"SLURM jobs that a killed Snakemake left are cancelled first: {' '.join(left)}", file=sys.stderr)
    subprocess.run(["scancel", *left], check=True)
    deadline = time.monotonic() + LEFT_JOBS_SECONDS
    while left := left_jobs():
        if time.monotonic() > deadline:
            raise WorkflowError(
                f"SLURM jobs {' '.join(left)} of a killed Snakemake do not end within 2 minutes: cancel them with "
                "scancel, or ask the cluster's staff, then start again"
            )
        time.sleep(2)


def start_tracking(config: Mapping[str, Any], experiments: Mapping[str, Experiment]) -> None:
    """Start the process that forwards what the jobs write to MLflow; see `convergence.tracking`."""
    global _tracker
    root = Path(__file__).resolve().parents[1]
    files = [str(root / "experiments" / f"{name}.yaml") for name, e in experiments.items() if e.tracking]
    if not files or not TRACKING[config.get("tracking", "on")]:
        return
    layout.RESULTS.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "convergence.tracking.follow", "--parent-pid", str(os.getpid()), *files]
    with (layout.RESULTS / "tracking.log").open("a") as log:
        # A session of its own: Ctrl-C is for the jobs, and the tracker then reports how they ended.
        _tracker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True)


def stop_tracking() -> list[str]:
    """Let the tracking process forward what is left and close the runs; a line per study on where it is in MLflow.

    Never an error: it can be done later.
    """
    if _tracker is None:
        return []
    _tracker.send_signal(signal.SIGTERM)
    try:
        return _tracker.communicate(timeout=LAST_PASS_SECONDS)[0].split("\n")[:-1]
    except subprocess.TimeoutExpired:
        print("MLflow is slow to answer: `make track` forwards the rest later", file=sys.stderr)
        return []


def print_results(tracked: list[str]) -> None:
    """The last lines of a run: the answers, where the figure is, and what to open.

    Args:
        tracked: what `stop_tracking` gave.
    """
    if not FIGURE.exists():
        return
    told = sections(VERDICT.read_text(encoding="utf-8")) if VERDICT.exists() else {}
    lines = [f"{study}: {plain(answer(text))}\n" for study, text in told.items() if answer(text)]
    lines += [f"The figure: {FIGURE.resolve()}", f"The verdict: {VERDICT.resolve()}"]
    lines += ["All in one page: `make report`"]
    lines += ["In MLflow: `make ui`, then open", *(f"  {line}" for line in tracked)] if tracked else []
    print("\n" + "\n".join(lines) + "\n", file=sys.stderr)


def quiet_output() -> None:
    """Leave out what Snakemake says of its scheduling; say after each job how long the rest may take."""
    began = time.monotonic()

    def tidy(record: logging.LogRecord) -> bool:
        if getattr(record, "event", None) == LogEvent.PROGRESS and 0 < record.done < record.total:
            left = (time.monotonic() - began) / record.done * (record.total - record.done)
            print(f"about {left // 60:.0f} min {left % 60:.0f} s left of the whole", file=sys.stderr)
        return not str(record.msg).startswith(NOISE)

    snakemake_logger.addFilter(tidy)
