"""Cost of training and of complete studies as their size grows; the result is a figure.

    python -m benchmarks.growth [--seconds 3] [--out benchmarks/growth.png]

The upper row shows the time per image of a training step in one process, as a function of batch size, image size and
channels. The lower row shows the wall time of complete studies through Snakemake on two cores, as a function of the
number of seeds, checkpoints and samples. The studies are reduced to batches of 8 and 4 steps per checkpoint, and
dataset and reference exist already. Each size is varied alone; all others are those of the default study. The cost
should grow linearly.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch

from benchmarks.throughput import ROOT, ours_train, rate, settings
from diffusion.config import RunConfig

sys.path.insert(0, str(ROOT / "tests"))
from projects import copy_project, edit, reduce, snakemake  # noqa: E402

STUDY = "openmoji"
NETS: dict[str, tuple[list[int], Callable[[RunConfig, int], RunConfig]]] = {
    "batch size": ([8, 16, 32, 64, 128], lambda run, n: with_section(run, "train", batch_size=n)),
    "image size": ([8, 16, 24, 32, 48], lambda run, n: with_section(run, "dataset", image_size=n)),
    "channels": ([32, 64, 96, 128], lambda run, n: with_section(run, "model", channels=n)),
}
STUDIES: dict[str, tuple[list[int], Callable[[dict[str, Any], int], None]]] = {
    "seeds (of two arms)": ([1, 2, 4], lambda study, n: study.update(seeds=list(range(n)))),
    "checkpoints": ([1, 2, 4], lambda study, n: study.update(checkpoints={"every": 4, "until": 4 * n})),
    "samples per checkpoint": ([32, 128, 512], lambda study, n: study["sample"].update(images=n)),
}
COLUMNS = ["axis", "value", "quantity", "cost"]


def with_section(run: RunConfig, section: str, **changes: int) -> RunConfig:
    return run.model_copy(update={section: getattr(run, section).model_copy(update=changes)})


def measure_training(seconds: float) -> list[tuple[str, int, str, float]]:
    """Rows of COLUMNS: milliseconds per image of a training step."""
    options = argparse.Namespace(study=STUDY, batch=None)
    run, rows = settings(STUDY, None), []
    torch.set_num_threads(run.train.threads)
    for axis, (values, change) in NETS.items():
        for value in values:
            step = ours_train(change(run, value), options)
            step()
            rows.append((axis, value, "ms per image", 1000 / rate(step, seconds)))
            print(*rows[-1], flush=True)
    return rows


def measure_studies(directory: Path) -> list[tuple[str, int, str, float]]:
    """Rows of COLUMNS: seconds of complete studies."""
    prepared = copy_project(directory / "start")
    edit(prepared, reduced)
    run(prepared)
    rows = []
    for axis, (values, change) in STUDIES.items():
        for value in values:
            project = copy_project(directory / f"{axis}{value}")
            edit(project, reduced)
            edit(project, lambda study, change=change, value=value: change(study, value))
            for part in ("datasets", "references"):
                (project / "results").mkdir(exist_ok=True)
                (prepared / "results" / part).rename(project / "results" / part)
            start_time = time.perf_counter()
            run(project)
            rows.append((axis, value, "s of the study", time.perf_counter() - start_time))
            print(*rows[-1], flush=True)
            prepared = project
    return rows


def reduced(study: dict[str, Any]) -> None:
    reduce(study)
    study["checkpoints"] = {"every": 4, "until": 4}
    study["sample"]["images"] = 32
    study["seeds"] = [0]


def run(project: Path) -> None:
    done = snakemake(project, "--config", "tracking=off")
    assert done.returncode == 0, done.stderr


def draw(table: pd.DataFrame, path: Path) -> None:
    figure, panels = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for panel, (axis, rows) in zip(panels.flat, table.groupby("axis", sort=False), strict=True):
        # The cost is expected to be proportional to the pixels and to the weights.
        power = 2 if axis in ("image size", "channels") else 1
        panel.plot(rows["value"] ** power, rows["cost"], "o-", color="#0072b2")
        panel.set_xticks(rows["value"] ** power, [f"{value}" + "²" * (power == 2) for value in rows["value"]])
        panel.set_xlabel(axis)
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
    for row, label in zip(panels, ("ms per training image", "s per study"), strict=True):
        row[0].set_ylabel(label)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=3, help="duration of each measurement of training, default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "growth.png", help="figure to write, default: %(default)s"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure_training(options.seconds) + measure_studies(Path(directory))
    table = pd.DataFrame(rows, columns=COLUMNS)
    draw(table, options.out)
    print(table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
