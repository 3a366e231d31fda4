"""Records which code and machine produced a result, and finds results that other code produced."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convergence import layout
from convergence.schema import Experiment
from diffusion.config import RunConfig
from diffusion.errors import FileError, InputError
from diffusion.files import atomic_write, read_json
from diffusion.sources import source_hash

PACKAGES = ["torch", "torchvision", "torch-fidelity", "snakemake", "numpy", "scipy"]
NewestProvenances = Iterable[tuple[str, Mapping[str, Any]]]  # arm and provenance of the newest checkpoint of each run


def write_provenance(path: Path, **facts: Any) -> None:
    """Writes facts about a result, and the present time, to a JSON file."""
    content = facts | {"finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def environment() -> dict[str, Any]:
    """Returns the commit of this code, whether tracked files differ from the commit, the host, and package versions.

    A job calls this function before it computes, because the code and the packages may change while the job runs. The
    commit is None if no git repository contains this code. The commit is also None if the repository's commit does not
    contain this file, because the project was only unpacked inside another repository.
    """
    hashes = _git("rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", str(layout.ROOT)) if hashes else None
    return {
        "git_commit": hashes and hashes.split()[0],
        "git_dirty": None if changes is None else bool(changes),
        "host": platform.node(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _git(*arguments: str) -> str | None:
    # A lock of the index would make the user's own git commands fail.
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    # A git hook names its own repository in these.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tables_hash(run: RunConfig) -> str:
    """Returns a hash of an arm's tables: the timestep density p_t, and the loss weights of mse and vb.

    The hash is the first 16 hexadecimal digits of a SHA-256. The numbers are rounded to 10 significant digits first,
    because their last digits depend on the type of CPU.

    Raises:
        InputError: if the tables are not finite (`diffusion.build.run_tables`).
    """
    from diffusion.build import run_tables

    tables = run_tables(run)
    columns = (tables.probabilities, tables.mse_weight, tables.vb_weight)
    numbers = ",".join(f"{value:.9e}" for column in columns for value in column.tolist())
    return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def newest_provenances(experiment: Experiment) -> list[tuple[str, dict[str, Any]]]:
    """Returns (arm, provenance) of each run of a study, from the newest checkpoint of the run.

    The provenance is the content of provenance.json. A run is left out if it has no checkpoint after step 0, or if its
    provenance.json is damaged. Jobs that use a damaged file report the damage.
    """
    found = []
    for arm in experiment.arms:
        run = experiment.run(arm)
        for seed in experiment.seeds:
            directories = (
                layout.step_directory(experiment.name, arm, run, seed, step)
                for step in reversed(experiment.steps)
                if step
            )
            paths = (path for directory in directories if (path := directory / "provenance.json").exists())
            with suppress(InputError, StopIteration):
                found.append((arm, read_json(next(paths))))
    return found


def trained_on(provenance: Path, manifest: Path) -> bool | None:
    """Returns whether a checkpoint was trained on the images of a dataset; None if this is not known.

    Args:
        provenance: path of provenance.json of the checkpoint.
        manifest: path of manifest.json of the dataset.
    """
    with suppress(InputError, KeyError):
        return bool(read_json(provenance)["dataset_sha256"] == read_json(manifest)["sha256"])
    return None


def check_images(checkpoint: Path, manifest: Path) -> None:
    """Checks that a checkpoint was trained on the images of a dataset.

    The check passes if it is not known whether the images are the same, which is when `trained_on` returns None.

    Args:
        checkpoint: directory of the checkpoint.
        manifest: path of manifest.json of the dataset.

    Raises:
        FileError: if provenance.json of the checkpoint records other images. The error names the directory of the run.
    """
    if trained_on(checkpoint / "provenance.json", manifest) is False:
        raise FileError(
            checkpoint.parent, f"has checkpoints that were trained on other images than those in {manifest.parent}"
        )


def stale_runs(study: str, newest: NewestProvenances) -> list[str]:
    """Returns a warning if runs of a study were trained with code that differs from the present code.

    The list has one sentence or none. The sentence names each such arm with the commit that trained the arm, and
    contains the command that trains the study again. This function does not import torch.

    Args:
        study: name of the study.
        newest: (arm, provenance) of each run, as `newest_provenances` returns them.
    """
    problems = []
    for arm, provenance in newest:
        if provenance.get("source_hash") != source_hash():
            problems.append(("the code that training uses has changed since the training of", arm, provenance))
        elif provenance.get("earlier_source_hashes"):
            problems.append(("the code that training uses changed during the training of", arm, provenance))
    return _warnings(study, problems)


def changed_tables(study: str, newest: NewestProvenances, runs: Mapping[str, RunConfig]) -> list[str]:
    """Returns a warning if the density or the loss weights of arms have changed since the arms were trained.

    As in `stale_runs`, the list has one sentence or none. The tables are always computed and compared, so this function
    also finds changes that `source_hash` misses. This function imports torch.

    Args:
        study: name of the study.
        newest: (arm, provenance) of each run, as `newest_provenances` returns them.
        runs: arm -> settings of the arm.

    Raises:
        InputError: if the tables of an arm are not finite (`tables_hash`).
    """
    hashes = {arm: tables_hash(run) for arm, run in runs.items()}
    problem = "the density or the loss weights have changed since the training of"
    return _warnings(study, [(problem, arm, facts) for arm, facts in newest if facts.get("tables_hash") != hashes[arm]])


def _warnings(study: str, problems: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """Returns at most one sentence: each problem with its arms, and the command that trains the study again."""
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for problem, arm, provenance in problems:
        first.setdefault(arm, (problem, provenance))
    if not first:
        return []
    arms: dict[str, list[str]] = {}
    for arm, (problem, provenance) in first.items():
        arms.setdefault(problem, []).append(f"{arm} ({_origin(provenance)})")
    command = layout.snakemake_command(
        "--cores", "all", "reports/fid_curves.png", "--config", f"experiments={study}",
        "--forcerun", "initialise", "train",
    )  # fmt: skip
    text = "; ".join(f"{problem} {', '.join(named)}" for problem, named in arms.items())
    return [f"{layout.RESULTS / study}: {text}: to train the study again, run {command}"]


def _origin(provenance: Mapping[str, Any]) -> str:
    """Returns when a checkpoint was trained and, in a git repository, the commit that trained it."""
    finished, commit = provenance.get("finished"), provenance.get("git_commit")
    changes = " with uncommitted changes" if provenance.get("git_dirty") else ""
    return f"commit {commit[:12]}{changes}, {finished}" if commit else str(finished)
