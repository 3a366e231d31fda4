"""`convergence orphans`: lists results that belong to no study any more."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from convergence import layout
from convergence.errors import StudyError
from convergence.schema import Experiment
from convergence.study_file import load_experiment

LOCKS = Path(".snakemake/locks")


def orphans(experiments: Iterable[Experiment]) -> list[Path]:
    """Returns the directories of runs, the datasets and the references in `results/` that none of the studies uses.

    If no run of an arm is used, the directory of the arm is returned instead of the directories of its runs. If a run
    is used, all its checkpoints count as used.
    """
    used = set()
    for experiment in experiments:
        used |= {directory.parent for *_, directory in layout.checkpoints(experiment)}
        used |= {trial.directory.parent for trial in layout.trials(experiment)}
        used.add(layout.dataset_directory(experiment.dataset))
        used |= {
            layout.reference_path(experiment.dataset, features, experiment.evaluate)
            for features in experiment.evaluate.features
        }
    used_arms = {run.parent for run in used}
    unused = []
    for directory in _directories(layout.RESULTS, "*/*-????????"):
        if directory.parent == layout.DATASETS:
            unused += [directory] if directory not in used else []
        elif directory not in used_arms:
            unused.append(directory)
        else:
            unused += [run for run in _directories(directory, "seed*") if run not in used]
    return unused + [path for path in sorted(layout.REFERENCES.glob("*.npz")) if path not in used]


def _directories(root: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(root.glob(pattern)) if path.is_dir() and not path.is_symlink()]


def size(path: Path) -> int:
    """Returns the size of a file in bytes, or the total size of all files below a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def remove(paths: Sequence[Path]) -> None:
    """Deletes files and directories.

    Raises:
        StudyError: if Snakemake has locked the working directory.
    """
    if any(LOCKS.glob("*")):
        raise StudyError(
            "Snakemake is running in this directory, or was killed: wait until it ends, or run "
            f"`{layout.snakemake_command('--unlock')}`, then try again"
        )
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@click.command("orphans")
@click.option("--remove", "delete", is_flag=True, help="Delete what is listed.")
def main(delete: bool) -> None:
    """List results that belong to no study any more.

    These are results of edited arms, removed seeds and deleted studies. All studies in experiments/ are read.
    \f

    Raises:
        StudyError: if there is no study, or a study cannot be read.
    """
    files = sorted(layout.EXPERIMENTS.glob("*.yaml"))
    if not files:
        raise StudyError(
            f"there are no studies in {layout.EXPERIMENTS.resolve()}: run this in the folder that contains it"
        )
    paths = orphans([load_experiment(file) for file in files])
    sizes = [size(path) for path in paths]
    for path, count in zip(paths, sizes, strict=True):
        click.echo(f"{count / 1e6:10,.1f} MB  {path}")
    if delete:
        remove(paths)
    note = "removed" if delete else "to remove with --remove" if paths else "in total"
    click.echo(f"{sum(sizes) / 1e6:10,.1f} MB {note}, {len(paths)} orphans of {len(files)} studies")
