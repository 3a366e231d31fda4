"""Writes the CSV files of single jobs: the rows of a checkpoint, and the rows of a timing. Imports no pandas."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

COLUMNS = [
    "study", "arm", "seed", "step", "images", "contended_seconds", "features", "metric", "value", "stderr", "n",
    "reason",
]  # fmt: skip
# A study with `evaluate.ema` also names the average of the weights (`diffusion.averages`) of each row.
COLUMNS_WITH_AVERAGE = [*COLUMNS, "ema"]
PROBE_COLUMNS = [
    "study", "arm", "seed", "step", "images", "contended_seconds", "timesteps", "metric", "value", "n", "held_out",
    "reason",
]  # fmt: skip
# A row per arm and round; the arms of a round were timed directly after one another.
ROUND_COLUMNS = ["arm", "round", "seconds_per_1000_images", "device"]


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path, columns: list[str] = COLUMNS) -> None:
    """Writes rows to a CSV file that has exactly the given columns, in the format of `convergence.tables.write_table`.

    Args:
        rows: a dict (column -> value) per row. NaN becomes an empty cell.
        path: file to write.
        columns: columns of the file.
    """
    with atomic_write(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            cells = [row[column] for column in columns]
            writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells)


def of_checkpoint(
    rows: Iterable[dict[str, Any]], wildcards: Any, provenance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns the measurements of one checkpoint as rows for the table of metrics or the table of probes.

    Args:
        rows: a dict (column -> value) per measurement.
        wildcards: wildcards of the Snakemake job: study, arm (with its hash) and seed.
        provenance: content of `provenance.json` of the checkpoint.
    """
    checkpoint = {
        "study": wildcards.study,
        "arm": wildcards.arm.rsplit("-", 1)[0],
        "seed": int(wildcards.seed),
        "step": provenance["step"],
        "images": provenance["images"],
        "contended_seconds": provenance["seconds"],
    }
    return [row | checkpoint for row in rows]


def of_rounds(seconds: "np.ndarray", arms: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Returns measured times as rows with the columns `ROUND_COLUMNS`.

    Args:
        seconds: seconds per training image, [rounds, arms].
        arms: names of the arms.
        device: name of the device.
    """
    return [
        {"arm": arm, "round": number, "seconds_per_1000_images": 1000 * of_arm, "device": device}
        for arm, column in zip(arms, seconds.T.tolist(), strict=True)
        for number, of_arm in enumerate(column)
    ]
