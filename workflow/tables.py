"""The long table of metrics: one row per checkpoint, features and metric."""

from pathlib import Path

import pandas as pd

from diffusion.files import replacing

COLUMNS = ["study", "arm", "seed", "step", "images", "seconds", "features", "metric", "value", "stderr", "n", "reason"]
DISTANCES = {"fd", "kid"}  # lower is better, compared by ratios


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table with exactly the columns of the long table."""
    with replacing(path) as file:
        table[COLUMNS].to_csv(file, index=False)


def collect(paths: list[Path], arms: list[str]) -> pd.DataFrame:
    """The rows of all checkpoints of a study, each counted for its arm: the untrained net counts for every one."""
    tables = [pd.read_csv(path).assign(arm=arm) for path, arm in zip(paths, arms, strict=True)]
    return pd.concat(tables, ignore_index=True)


def diverged(rows: pd.DataFrame) -> pd.Series:
    """Which rows of the long table lack a value because their run diverged. Boolean, one per row."""
    return rows["value"].isna() & rows["reason"].astype(str).str.startswith("diverged")
