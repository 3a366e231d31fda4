"""The long table of metrics: one row per checkpoint, features and metric."""

from pathlib import Path
from typing import Any

import pandas as pd

from diffusion import StudyError
from diffusion.files import replacing

COLUMNS = ["study", "arm", "seed", "step", "images", "seconds", "features", "metric", "value", "stderr", "n", "reason"]
PROBE_COLUMNS = [
    "study", "arm", "seed", "step", "images", "seconds", "timesteps", "metric", "value", "n", "held_out", "reason",
]  # fmt: skip
HIGHER_IS_BETTER = {"precision", "recall"}
SHARES = HIGHER_IS_BETTER | {"memorised"}  # all else is compared by ratios


def write_table(table: pd.DataFrame, path: Path, columns: list[str] = COLUMNS) -> None:
    """Write a table with exactly these columns."""
    with replacing(path) as file:
        table[columns].to_csv(file, index=False)


def collect(paths: list[Path], arms: list[str]) -> pd.DataFrame:
    """The rows of all checkpoints of a study, each counted for its arm: the untrained net counts for every one.

    Raises:
        StudyError: values of one metric come from unequal numbers of samples, on which its bias depends.
    """
    tables = [pd.read_csv(path).assign(arm=arm) for path, arm in zip(paths, arms, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    for (features, metric), rows in table[table["value"].notna()].groupby(["features", "metric"]):
        if rows["n"].nunique() > 1:
            raise StudyError(
                f"{metric} ({features}) was measured with {rows['n'].min():,} samples at one checkpoint and "
                f"{rows['n'].max():,} at another: delete the metrics.csv of the former and run the same command again"
            )
    return table


def diverged(rows: pd.DataFrame) -> pd.Series:
    """Which rows of the long table lack a value because their run diverged. Boolean, one per row."""
    return rows["value"].isna() & rows["reason"].astype(str).str.startswith("diverged")


def markdown_table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, of anything that can be written."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows])
