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
from diffusion.errors import FileError, InputError
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
        raise FileError(checkpoint.parent, f"was trained on other images than {manifest.parent} contains")


def stale_runs(experiment: Experiment) -> list[str]:
    """Returns a sentence if other code than the present one has trained results of a study, or else an empty list.

    It reads the provenance of the newest checkpoint of each run. The sentence names each such arm with the commit that
    trained it, and the command that trains the study again. Torch is not imported.
    """

    def problem(run: RunConfig, provenance: Mapping[str, Any]) -> str | None:
        if provenance.get("source_hash") != source_hash():
            return "the code that training uses has changed since the training of"
        if provenance.get("earlier_source_hashes"):
            return "the code that training uses changed during the training of"
        return None

    return _warnings(experiment, problem)


def changed_tables(experiment: Experiment) -> list[str]:
    """Returns a sentence if the density or the loss weights of arms have changed since their training, as `stale_runs`.

    The tables are always compared, so that a cause that `source_hash` misses is reported, too. Torch is imported.

    Raises:
        InputError: If the tables of an arm are not finite (`tables_hash`).
    """

    def problem(run: RunConfig, provenance: Mapping[str, Any]) -> str | None:
        unchanged = provenance.get("tables_hash") == tables_hash(run)
        return None if unchanged else "the density or the loss weights have changed since the training of"

    return _warnings(experiment, problem)


def _warnings(experiment: Experiment, problem: Callable[[RunConfig, Mapping[str, Any]], str | None]) -> list[str]:
    """Returns at most one sentence: each problem with its arms, and the command that trains the study again."""
    arms: dict[str, list[str]] = {}
    for arm in experiment.arms:
        run = experiment.run(arm)
        newest = (_newest_provenance(experiment, arm, run, seed) for seed in experiment.seeds)
        problems = ((text, facts) for facts in newest if facts and (text := problem(run, facts)))
        text, facts = next(problems, (None, {}))
        if text:
            arms.setdefault(text, []).append(f"{arm} ({_origin(facts)})")
    if not arms:
        return []
    command = layout.snakemake_command(
        "--cores", "all", "reports/fid_curves.png", "--config", f"experiments={experiment.name}",
        "--forcerun", "initialise", "train",
    )  # fmt: skip
    text = "; ".join(f"{problem} {', '.join(named)}" for problem, named in arms.items())
    return [f"{layout.RESULTS / experiment.name}: {text}: to train the study again, run {command}"]


def _origin(provenance: Mapping[str, Any]) -> str:
    """Returns when a checkpoint was trained and, in a git repository, the commit that trained it."""
    finished, commit = provenance.get("finished"), provenance.get("git_commit")
    changes = " with uncommitted changes" if provenance.get("git_dirty") else ""
    return f"commit {commit[:12]}{changes}, {finished}" if commit else str(finished)


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
