"""Records where a result comes from (code, versions, machine), and finds results of other code."""

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
    """Writes facts of a result as JSON, with the time."""
    content = facts | {"finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def environment() -> dict[str, Any]:
    """Returns the commit of this code, whether tracked files differ from it, the host, and the versions of packages.

    A job calls this before it computes, because all of them may change later. There is no commit (None) if the commit
    of the repository does not contain this file: then the project was only unpacked in that repository.
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
    """Returns 16 hexadecimal digits of a SHA-256 digest of an arm's tables: p_t and the weights of mse and vb.

    The numbers are rounded to 10 significant digits, because their last digits depend on the type of CPU.

    Raises:
        InputError: If the tables are not finite (`diffusion.schemes.scheme_tables`).
    """
    from diffusion.build import noise_schedule
    from diffusion.schemes import scheme_tables

    tables = scheme_tables(noise_schedule(run.diffusion), run.scheme, run.match)
    columns = (tables.probabilities, tables.mse_weight, tables.vb_weight)
    numbers = ",".join(f"{value:.9e}" for column in columns for value in column.tolist())
    return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def newest_provenances(experiment: Experiment) -> list[tuple[str, dict[str, Any]]]:
    """Returns the arm and the provenance of the newest checkpoint of each run of a study that has one after step 0.

    Damaged files are left out: the jobs that use them report the damage.
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
        provenance: provenance.json of the checkpoint.
        manifest: manifest.json of the dataset.
    """
    with suppress(InputError, KeyError):
        return bool(read_json(provenance)["dataset_sha256"] == read_json(manifest)["sha256"])
    return None


def check_images(checkpoint: Path, manifest: Path) -> None:
    """Checks that a checkpoint is used together with the images that it was trained on.

    Raises:
        FileError: If its provenance records other images. The error names the directory of the run.
    """
    if trained_on(checkpoint / "provenance.json", manifest) is False:
        raise FileError(
            checkpoint.parent, f"has checkpoints that were trained on other images than those in {manifest.parent}"
        )


def stale_runs(study: str, newest: NewestProvenances) -> list[str]:
    """Returns one warning if results of a study were trained with code that differs from the present code, or none.

    The sentence names each such arm with the commit that trained it, and the command that trains the study again. Torch
    is not imported.

    Args:
        study: its name.
        newest: the arm and the provenance of the newest checkpoint of each run.
    """
    problems = []
    for arm, provenance in newest:
        if provenance.get("source_hash") != source_hash():
            problems.append(("the code that training uses has changed since the training of", arm, provenance))
        elif provenance.get("earlier_source_hashes"):
            problems.append(("the code that training uses changed during the training of", arm, provenance))
    return _warnings(study, problems)


def changed_tables(study: str, newest: NewestProvenances, runs: Mapping[str, RunConfig]) -> list[str]:
    """Returns a sentence if the density or the loss weights of arms have changed since their training, as `stale_runs`.

    The tables are always compared, so that a cause that `source_hash` misses is reported, too. Torch is imported.

    Args:
        study: its name.
        newest: as for `stale_runs`.
        runs: the settings of each arm.

    Raises:
        InputError: If the tables of an arm are not finite (`tables_hash`).
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
