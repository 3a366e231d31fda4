"""Results that no study asks for any more: of edited arms, dropped seeds, deleted studies.

python -m convergence.command.orphans [--remove]
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from convergence import layout
from convergence.errors import StudyError, exit_on_user_error
from convergence.schema import Experiment
from convergence.study_file import load_experiment

LOCKS = Path(".snakemake/locks")


def orphans(experiments: Iterable[Experiment]) -> list[Path]:
    """Directories of runs and datasets, and references, below `results/` that none of the experiments asks for.

    Whole arms where no seed of theirs is asked for. Checkpoints of a run that is asked for are never among them.
    """
    wanted = set()
    for e in experiments:
        wanted |= {directory.parent for *_, directory in layout.checkpoints(e)}
        wanted.add(layout.dataset_directory(e.dataset))
        wanted |= {layout.reference_path(e.dataset, features, e.evaluate) for features in e.evaluate.features}
    arms_wanted = {seed.parent for seed in wanted}
    found = []
    for arm in _directories(layout.RESULTS, "*/*-????????"):
        if arm.parent.name == layout.DATASETS.name:
            found += [arm] if arm not in wanted else []
        elif arm not in arms_wanted:
            found.append(arm)
        else:
            found += [seed for seed in _directories(arm, "seed*") if seed not in wanted]
    return found + [path for path in sorted(layout.REFERENCES.glob("*.npz")) if path not in wanted]


def _directories(root: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(root.glob(pattern)) if path.is_dir() and not path.is_symlink()]


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def remove(paths: Sequence[Path]) -> None:
    """Delete files and directories.

    Raises:
        StudyError: Snakemake works in this directory.
    """
    if any(LOCKS.glob("*")):
        raise StudyError(
            "Snakemake works here, or was killed: wait for it, or run `snakemake --unlock`, then try again"
        )
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _studies() -> list[Experiment]:
    """All studies of the project.

    Raises:
        StudyError: there is none here, or one cannot be read.
    """
    files = sorted(Path("experiments").glob("*.yaml"))
    if not files:
        raise StudyError("experiments/ holds no study here: start this where the Snakefile lies")
    return [load_experiment(file) for file in files]


def main(arguments: list[str] | None = None) -> None:
    """What `python -m convergence.command.orphans` does; a mistake ends in one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m convergence.command.orphans", description=__doc__.splitlines()[0])
    parser.add_argument("--remove", action="store_true", help="delete what is listed")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        studies = _studies()
        found = orphans(studies)
        sizes = [size(path) for path in found]
        for path, count in zip(found, sizes, strict=True):
            sys.stdout.write(f"{count / 1e6:10,.1f} MB  {path}\n")
        if options.remove:
            remove(found)
        done = "removed" if options.remove else "would be removed by --remove" if found else "in all"
        sys.stdout.write(f"{sum(sizes) / 1e6:10,.1f} MB {done}, {len(found)} orphans of {len(studies)} studies\n")


if __name__ == "__main__":
    main()
