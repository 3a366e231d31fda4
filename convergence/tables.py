"""The long table of metrics: one row per checkpoint, features and metric."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from convergence.errors import StudyError
from diffusion.evaluation.weights import INCEPTION, LITE0
from diffusion.files import atomic_write

COLUMNS = ["study", "arm", "seed", "step", "images", "seconds", "features", "metric", "value", "stderr", "n", "reason"]
PROBE_COLUMNS = [
    "study", "arm", "seed", "step", "images", "seconds", "timesteps", "metric", "value", "n", "held_out", "reason",
]  # fmt: skip
ALL = "all"  # timesteps of a probe that is of no bin
HIGHER_IS_BETTER = {"precision", "recall"}
SHARES = HIGHER_IS_BETTER | {"memorised"}  # all else is compared by ratios
FEATURE_NAMES = {
    INCEPTION: "Inception-v3",
    LITE0: "EfficientNet-Lite0",
    "dinov2-vit-b-14": "DINOv2 ViT-B/14",
    "clip-vit-b-32": "CLIP ViT-B/32",
}
METRIC_NAMES = {
    "fd": "FD",
    "fd_infinity": "FD∞",
    "kid": "KD",
    "precision": "Precision",
    "recall": "Recall",
    "memorised": "Memorised",
}
INCEPTION_NAMES = {"fd": "FID", "fd_infinity": "FID∞", "kid": "KID"}
TEXT = dict.fromkeys(("study", "arm", "baseline", "candidate"), str)
NEEDED = ["arm", "images", "value"]
# What a table from elsewhere that does not say so is taken to hold: one run per arm, FID.
DEFAULTS = {
    "seed": 0, "seconds": float("nan"), "features": INCEPTION, "metric": "fd", "stderr": float("nan"), "n": 0,
    "reason": "",
}  # fmt: skip


def metric_name(features: str, metric: str) -> str:
    """What was measured, such as "FD (EfficientNet-Lite0)".

    FID (Heusel et al. 2017, arXiv 1706.08500) and KID (Binkowski et al. 2018, arXiv 1801.01401) name numbers
    that compare with the literature: those of `inception-v3-compat` alone. Other features give FD and KD.
    """
    if features == INCEPTION and metric in INCEPTION_NAMES:
        return INCEPTION_NAMES[metric]
    return f"{METRIC_NAMES[metric]} ({FEATURE_NAMES.get(features, features)})"


def write_table(table: pd.DataFrame, path: Path, columns: list[str] = COLUMNS) -> None:
    """Write a table with exactly these columns."""
    with atomic_write(path) as file:
        table[columns].to_csv(file, index=False)


def read_table(path: Path | str) -> pd.DataFrame:
    """A table as `write_table` left it: names stay text, also `2024` and `nan`."""
    return pd.read_csv(path, dtype=TEXT, keep_default_na=False, na_values=[""])


def read_curves(path: Path, study: str = "curves") -> pd.DataFrame:
    """A table of curves from anywhere as the long table of metrics.

    It has a row per run and checkpoint, and at least the columns arm, images (seen in training) and value.

    Args:
        study: what a table without the column study is about.

    Raises:
        StudyError: it cannot be read, lacks a column, holds what no such column can, or two values of one checkpoint.
    """
    try:
        table = pd.read_csv(path, dtype=TEXT)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: not a table ({error}): name a CSV file of {', '.join(NEEDED)}") from None
    missing = [column for column in NEEDED if column not in table]
    if missing:
        raise StudyError(f"{path}: lacks the columns {', '.join(missing)}: add them")
    for column, value in ({"study": study} | DEFAULTS).items():
        if column not in table:
            table[column] = value
    if "step" not in table:
        table["step"] = table["images"]
    for column in ("images", "value", "seed", "step", "seconds", "n"):
        try:
            table[column] = pd.to_numeric(table[column])
        except (ValueError, TypeError) as error:
            raise StudyError(f"{path}: {column} holds more than numbers ({error}): mend it") from None
    table["n"] = table["n"].fillna(0).astype(int)
    key = ["study", "features", "metric", "arm", "seed", "images"]
    for column in key:
        if table[column].isna().any():
            raise StudyError(f"{path}: a row has no {column}, or a word for that such as NA: fill it in")
    if unknown := set(table["metric"]) - set(METRIC_NAMES):
        raise StudyError(f"{path}: metric {unknown.pop()} is unknown: write one of {', '.join(METRIC_NAMES)}")
    twice = table[table.duplicated(key)]
    if len(twice):
        arm, images = twice.iloc[0][["arm", "images"]]
        raise StudyError(
            f"{path}: {arm} has two values at {images:,.0f} images: number its runs in a column seed, or drop one"
        )
    return table[COLUMNS]


def of_checkpoint(rows: list[dict[str, Any]], wildcards: Any, about: Mapping[str, Any]) -> pd.DataFrame:
    """What was measured of one checkpoint as rows of a long table.

    Args:
        wildcards: of the job: study, arm (with its hash) and seed.
        about: the checkpoint's `provenance.json`.
    """
    return pd.DataFrame(rows).assign(
        study=wildcards.study,
        arm=wildcards.arm.rsplit("-", 1)[0],
        seed=int(wildcards.seed),
        **{key: about[key] for key in ("step", "images", "seconds")},
    )


def collect(paths: list[Path], arms: list[str]) -> pd.DataFrame:
    """The rows of all checkpoints of a study, each counted for its arm: the untrained net counts for every one.

    Raises:
        StudyError: values of one metric come from unequal numbers of samples, on which its bias depends.
    """
    tables = [read_table(path).assign(arm=arm) for path, arm in zip(paths, arms, strict=True)]
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
