"""Records where a result comes from (code, versions, machine), and finds results of other code."""

import datetime
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convergence import layout
from convergence.schema import Experiment
from diffusion.config import RunConfig
from diffusion.errors import InputError
from diffusion.files import atomic_write, read_json
from diffusion.sources import source_hash

PACKAGES = ["torch", "torchvision", "torch-fidelity", "snakemake", "numpy", "scipy"]


def write_provenance(path: Path, device: str, **facts: Any) -> None:
    """Writes facts of a result as JSON, with the git commit (null outside git), host, device and versions."""
    root = Path(__file__).resolve().parents[1]
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    content = facts | {
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "host": platform.node(),
        "device": device,
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
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


def stale_runs(experiment: Experiment) -> list[str]:
    """Returns a sentence for each arm with results on disk that other code than the present one has trained.

    It reads the provenance of the newest checkpoint of each run. A sentence names the directory of the arm, the commit
    that trained it, and the command that trains it again. Torch is not imported.
    """
    return _sentences(experiment, lambda run, provenance: _changed_code(provenance))


def changed_tables(experiment: Experiment) -> list[str]:
    """Returns a sentence for each arm of `stale_runs` whose density or loss weights have changed since its training.

    Torch is imported if there is an arm in `stale_runs`.
    """

    def changed(run: RunConfig, provenance: Mapping[str, Any]) -> str | None:
        if not _changed_code(provenance) or provenance.get("tables_hash") == tables_hash(run):
            return None
        return f"its density or loss weights have changed since {_origin(provenance)}"

    return _sentences(experiment, changed)


def _changed_code(provenance: Mapping[str, Any]) -> str | None:
    if provenance.get("source_hash") != source_hash():
        return f"the code that training uses has changed since {_origin(provenance)}"
    if provenance.get("earlier_source_hashes"):
        return f"the code that training uses changed during training, which ended with {_origin(provenance)}"
    return None


def _origin(provenance: Mapping[str, Any]) -> str:
    finished, commit = provenance.get("finished"), provenance.get("git_commit")
    changes = " with uncommitted changes" if provenance.get("git_dirty") else ""
    return f"commit {commit[:12]}{changes} ({finished})" if commit else str(finished)


def _sentences(experiment: Experiment, problem: Callable[[RunConfig, Mapping[str, Any]], str | None]) -> list[str]:
    """Returns a sentence for each arm with a problem, with the command that trains the study again."""
    command = layout.snakemake_command(
        "--cores", "all", "reports/fid_curves.png", "--config", f"experiments={experiment.name}",
        "--forcerun", "initialise", "train",
    )  # fmt: skip
    sentences = []
    for arm in experiment.arms:
        run = experiment.run(arm)
        newest = (_newest_provenance(experiment, arm, run, seed) for seed in experiment.seeds)
        problems = [text for provenance in newest if provenance and (text := problem(run, provenance))]
        if problems:
            directory = layout.run_directory(experiment.name, arm, run, experiment.seeds[0]).parent
            sentences.append(f"{directory}: {problems[0]}: to train it again, run {command}")
    return sentences


def _newest_provenance(experiment: Experiment, arm: str, run: RunConfig, seed: int) -> dict[str, Any] | None:
    """Returns the provenance of a run's newest checkpoint after step 0, if it is readable.

    The job that uses a damaged file reports the damage.
    """
    directories = (
        layout.step_directory(experiment.name, arm, run, seed, step) for step in reversed(experiment.steps) if step
    )
    path = next((path for directory in directories if (path := directory / "provenance.json").exists()), None)
    with suppress(InputError):
        return read_json(path) if path else None
    return None
