"""All measurements on a GPU, in at most eight minutes and without a network, written to one small archive.

    python -m benchmarks.gpu --out gpu.tar.gz [--reference CLONE] [--reduced]

Each part is a command with its own time limit. If a part fails or exceeds its limit, the next part starts. The archive
contains the output of each part, and summary.txt. `--reduced` runs every part at a tiny size on a CPU.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.throughput import ROOT, device_name
from convergence.provenance import environment

SECONDS = 450  # of all parts together; a part may take seconds to be killed
REDUCED_LIMIT = 600  # seconds of a part; a CPU may be busy
LARGE, SMALL = "ffhq128", "fashion_mnist"


class Part(NamedTuple):
    """A command, its time limit in seconds, and the directory of the kernels that Triton has compiled for it."""

    name: str
    limit: float
    command: list[str]
    cache: str = "ffhq128"


def parts(study: Path, reduced: bool, reference: Path | None) -> list[Part]:
    """Returns the parts in the order of their importance.

    Args:
        study: directory for the files of the study.
        reduced: whether to use tiny sizes.
        reference: a clone of the reference, to be measured too.
    """

    seconds = "--seconds", 0.1 if reduced else 5

    def module(name: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", name, *map(str, arguments)]

    def speed(name: str, limit: float, net: str, work: str, size: int, large: bool = True, cache: str = "") -> Part:
        option = "--batch" if work == "train" else "--sample-batch"
        chosen = ("fashion_mnist16", option, 4) if reduced else (LARGE if large else SMALL, option, size)
        arguments = *chosen, *seconds, "--one", net, work
        return Part(name, limit, module("benchmarks.throughput", *arguments), cache or chosen[0])

    others = []
    if importlib.util.find_spec("diffusers"):
        others.append(speed("diffusers 64", 45, "diffusers", "train", 64))
    if reference:
        sizes = ("--study", "fashion_mnist16", "--batch", 8, "--micro-batch", 4) if reduced else ()
        others.append(Part("reference 4 x 64", 60, module("benchmarks.reference", reference, *sizes, *seconds)))
    batch = ("fashion_mnist16", "--batch", 2) if reduced else (LARGE, "--batch", 64)
    flag = ["--reduced"] * reduced
    sizes_of_features = ("--real", 500, "--generated", 100, "--dimensions", 64) if reduced else ("--device", "cuda")
    # On a CPU, the operations take minutes in Triton's interpreter. To compile for other GPUs needs no GPU.
    operations = [] if reduced else ["tests/test_operations.py", "-k", "not kernels_compile"]
    return [
        speed("train 64, cold cache", 60, "ours", "train", 64),
        speed("train 256", 45, "ours", "train", 256),
        *others,
        speed("train 64 again, warm cache", 30, "ours", "train", 64),
        speed("train 256 again", 40, "ours", "train", 256),
        speed("sample 256", 50, "ours", "sample", 256),
        speed("small net: train 256, cold cache", 40, "ours", "train", 256, large=False),
        speed("small net: train 256, warm cache", 25, "ours", "train", 256, large=False),
        speed("small net: sample 1024", 30, "ours", "sample", 1024, large=False),
        Part("study", 120, module("benchmarks.gpu_study", study, *flag), SMALL),
        Part("tests", 90, module("pytest", "-q", "-n", 8, "tests/test_gpu.py", *operations)),
        Part("statistics of features", 40, module("benchmarks.evaluation", "--part", "statistics", *sizes_of_features)),
        Part("profile", 45, module("benchmarks.throughput", *batch, "--profile")),
        Part("kernels", 60, module("benchmarks.kernel_speed", *batch, *flag)),
    ]


def run(part: Part, log: Path, caches: Path, limit: float) -> str:
    """Runs a part, writes its output to a file, and returns "done", "failed" or "too long"."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(caches / part.cache)}
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    with log.open("w") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=output, stderr=output, env=variables, start_new_session=True
        )
        try:
            return "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            return "too long"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def result(log: Path) -> str:
    """Returns the numbers in the last line of a log, which is JSON, or the line itself."""
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    try:
        return ", ".join(f"{key} {value:.4g}" for key, value in json.loads(last).items())
    except (ValueError, AttributeError):
        return last[-160:]


def machine() -> str:
    """Returns the machine, the versions and the commit in one line."""
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "triton", "diffusers")
        if importlib.util.find_spec(name)
    )
    commit = environment()["git_commit"] or "no git clone"
    return f"{device_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}, {commit[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="gpu.tar.gz", help="archive to write, default: %(default)s")
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="a clone of the reference to measure too")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, for a CPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place, logs = Path(directory), Path(directory, "gpu")
        logs.mkdir()
        lines, started = [machine()], time.monotonic()
        for part in parts(place / "study", options.reduced, options.reference and options.reference.resolve()):
            left = SECONDS - (time.monotonic() - started)
            limit = REDUCED_LIMIT if options.reduced else min(part.limit, left)
            log, began = logs / f"{part.name.replace(' ', '_')}.txt", time.monotonic()
            outcome = run(part, log, place / "triton", limit) if limit > 0 else "no time left"
            seconds = time.monotonic() - began
            lines.append(f"{part.name:<34} {outcome:<12} {seconds:>5.0f} s  {result(log) if log.exists() else ''}")
            print(lines[-1], flush=True)
            # After each part, so that a stop from outside loses nothing that was measured.
            (logs / "summary.txt").write_text("\n".join(lines) + "\n")
            with tarfile.open(options.out, "w:gz") as archive:
                archive.add(logs, "gpu")
    print("", *lines, f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB", sep="\n")


if __name__ == "__main__":
    main()
