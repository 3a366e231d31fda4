"""Take studies to a machine that reaches no network, and bring their results back as one small archive.

    python -m convergence.command.carry pack fashion_mnist --python 3.12 --out carry.tar

packs the project, the prepared datasets and the wheels of all it needs beside torch and torchvision, which are expected
there. There, `tar xf carry.tar && bash carry/run.sh` trains, samples, evaluates, draws, and leaves `results.tar.gz`.
Here, `tar xzf results.tar.gz` in the project: `make report` and `make track` go on from it.
"""

import argparse
import importlib.metadata
import logging
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from convergence import layout
from convergence.errors import StudyError, exit_on_user_error
from convergence.schema import Experiment
from convergence.snakefile import load_experiments
from diffusion.evaluation.weights import LITE0, SOURCES, hub_directory, weights_file
from diffusion.files import atomic_write

logger = logging.getLogger("convergence.command.carry")

ROOT = Path(__file__).resolve().parents[2]
# What is there, and what work without a network does not need.
LEFT_BEHIND = {"torch", "torchvision", "triton", "mlflow", "snakemake-executor-plugin-slurm"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
SMALL = {"metrics.csv", "probe.csv", "log.csv", "provenance.json", "manifest.json", "preview.png"}
RUN = """\
#!/usr/bin/env bash
# Made by `python -m convergence.command.carry`. Jobs share a GPU, so that one starts while another works: GPU_JOBS at once.
set -euo pipefail
cd "$(dirname "$0")"
test -x .venv/bin/python || "${{PYTHON:-python3}}" -m venv --system-site-packages .venv
.venv/bin/python -m pip install --quiet --no-index --no-deps wheels/*.whl
export PATH="$PWD/.venv/bin:$PATH"
if test -d torch; then export TORCH_HOME="$PWD/torch"; fi
status=0
python -m snakemake --cores all --keep-going --resources gpu="${{GPU_JOBS:-4}}" \\
  --config experiments={studies} tracking=off -- reports/fid_curves.png || status=$?
python -m convergence.command.carry collect {studies} --out results.tar.gz
exit $status
"""


def needed(names: Iterable[str], python: str) -> list[str]:
    """Packages, and all that they need in turn, as pins to the versions that are installed here.

    Args:
        python: version of the Python that will run them, such as "3.12".
    """
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    pins: dict[str, str] = {}
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in pins or name in LEFT_BEHIND:
            continue
        try:
            pins[name] = f"{name}=={importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:  # needed by that Python alone
            pins[name] = name
            continue
        requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        left += [r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    return sorted(pins.values())


def _weights(experiments: dict[str, Experiment]) -> dict[str, Path]:
    """Where torch looks for the weights of feature extractors that come in no wheel, and where they lie here.

    Raises:
        StudyError: they do not lie here.
    """
    found = {}
    for name in {name for experiment in experiments.values() for name in experiment.evaluate.features} - {LITE0}:
        path = weights_file(name)
        if path is None:
            raise StudyError(f"the weights of {name} are not in {hub_directory()}: fetch {SOURCES[name].url} to there")
        found[SOURCES[name].file] = path
    return found


def _is_pure(name: str) -> bool:
    """Whether a package that is installed here runs on any Python."""
    try:
        told = importlib.metadata.distribution(name).read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return "-none-any" in told


def pack(studies: str, python: str, also: list[str], out: Path) -> None:
    """Prepare the datasets of studies, fetch wheels, and write the archive.

    Args:
        studies: names of files in `experiments/`, parted by commas.
        also: more packages to carry, without what they need, such as torchvision==0.26.0.

    Raises:
        StudyError: a dataset cannot be prepared, or a wheel cannot be fetched.
    """
    experiments = load_experiments({"experiments": studies}, ROOT / "experiments")
    datasets = {layout.dataset_directory(experiment.dataset) for experiment in experiments.values()}
    files = [path / name for path in datasets for name in ("images.npy", "manifest.json")]
    _run(
        [sys.executable, "-m", "snakemake", "--cores", "all", "--config", f"experiments={studies}",
         "tracking=off", "--", *map(str, files)],
        "the datasets cannot be prepared: mend what Snakemake says above, then pack again",
    )  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = needed((Requirement(text).name for text in project["dependencies"]), python)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise StudyError(f"{ROOT} is no git checkout, whose files could be packed: clone the project")
    tracked = [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]
    weights = _weights(experiments)
    with (
        tempfile.TemporaryDirectory() as directory,
        atomic_write(out) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        wheels = Path(directory, "wheels")
        pip = [sys.executable, "-m", "pip"]
        otherwise = "pip cannot fetch a wheel (above): pack where there is a network, or name another --python"
        platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
        pure = [pin for pin in pins if _is_pure(pin.partition("==")[0])]
        compiled = [*(pin for pin in pins if pin not in pure), *also]
        # Some that are pure Python come as sources only: made into wheels here, they fit everywhere.
        _run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), *pure], otherwise)
        _run([*pip, "download", "--quiet", "--no-deps", *target, "--dest", str(wheels), *compiled], otherwise)
        script = Path(directory, "run.sh")
        script.write_text(RUN.format(studies=studies))
        for path in [*tracked, *map(str, files)]:
            archive.add(ROOT / path, f"carry/{path}")
        for place, path in weights.items():
            archive.add(path, f"carry/torch/hub/{place}")
        archive.add(wheels, "carry/wheels")
        archive.add(script, "carry/run.sh")
    logger.info("%s: %.0f MB; there: tar xf %s && bash carry/run.sh", out, out.stat().st_size / 1e6, out.name)


def collect(experiments: dict[str, Experiment], out: Path) -> None:
    """Write reports, and of the results what is small: all but images, weights and states."""
    kept = [path for path in layout.REPORTS.iterdir() if path.is_file()]
    for study, experiment in experiments.items():
        kept.append(layout.dataset_directory(experiment.dataset) / "manifest.json")
        kept += [path for path in sorted((layout.RESULTS / study).rglob("*")) if path.name in SMALL]
    kept = [path for path in kept if path.exists()]
    with atomic_write(out) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in kept:
            archive.add(path)
    logger.info("%s: %d files, %.1f MB", out, len(kept), out.stat().st_size / 1e6)


def _run(command: list[str], otherwise: str) -> None:
    if subprocess.run(command, cwd=ROOT).returncode:
        raise StudyError(otherwise)


def main() -> None:
    """What `python -m convergence.command.carry` does; a mistake ends in one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser("python -m convergence.command.carry", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="here: write what is to be carried")
    packing.add_argument("--python", default="3.12", metavar="VERSION", help="there (default: %(default)s)")
    packing.add_argument("--also", nargs="*", default=[], metavar="PIN", help="such as torchvision==0.26.0")
    collecting = verbs.add_parser("collect", help="there: write what is to be brought back")
    for verb, out in ((packing, "carry.tar"), (collecting, "results.tar.gz")):
        verb.add_argument("studies", help="names of files in experiments/, parted by commas")
        verb.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    with exit_on_user_error():
        if arguments.verb == "pack":
            pack(arguments.studies, arguments.python, arguments.also, arguments.out)
        else:
            collect(load_experiments({"experiments": arguments.studies}, Path("experiments")), arguments.out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
