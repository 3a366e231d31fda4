"""The verdict on curves from anywhere: what our statistics say of a table of FIDs that others measured.

python -m workflow.judge curves.csv --baseline uni05 --candidate under05 --out directory
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from diffusion import StudyError
from diffusion.files import replacing
from diffusion.weights import INCEPTION
from workflow.figures import fid_curves
from workflow.forest import draw_forest
from workflow.mechanism import changes
from workflow.statistics import speedup_table
from workflow.tables import COLUMNS, PROBE_COLUMNS
from workflow.verdict import verdict_text

logger = logging.getLogger("workflow.judge")

NEEDED = ["arm", "images", "value"]
# What a table that does not say so is taken to hold: one run per arm, FID.
DEFAULTS = {
    "study": "curves", "seed": 0, "seconds": float("nan"), "features": INCEPTION, "metric": "fd",
    "stderr": float("nan"), "n": 0, "reason": "",
}  # fmt: skip


def read_curves(path: Path) -> pd.DataFrame:
    """A table of curves as the long table of metrics (`workflow.tables`).

    It has a row per run and checkpoint, and at least the columns arm, images (seen in training) and value.

    Raises:
        StudyError: it cannot be read, or lacks a column.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: not a table ({error}): name a CSV file of {', '.join(NEEDED)}") from None
    missing = [column for column in NEEDED if column not in table]
    if missing:
        raise StudyError(f"{path}: lacks the columns {', '.join(missing)}: add them")
    for column, value in DEFAULTS.items():
        if column not in table:
            table[column] = value
    table["arm"] = table["arm"].astype(str)
    for column in ("images", "value"):
        try:
            table[column] = pd.to_numeric(table[column])
        except (ValueError, TypeError) as error:
            raise StudyError(f"{path}: {column} holds more than numbers ({error}): mend it") from None
    if "step" not in table:
        table["step"] = table["images"]
    return table[COLUMNS]


def write_verdict(
    metrics: pd.DataFrame,
    probes: pd.DataFrame,
    comparisons: Mapping[str, Mapping[str, Any] | None],
    speedups: Path,
    verdict: Path,
    forest: Path,
) -> pd.DataFrame:
    """Write the table of speed-ups, which it returns, the verdict in words and the forest plot.

    Args:
        comparisons: as `workflow.verdict.verdict_text` takes them.
    """
    table = speedup_table(metrics, {study: compare for study, compare in comparisons.items() if compare})
    with replacing(speedups) as file:
        table.to_csv(file, index=False)
    with replacing(verdict) as file:
        file.write(verdict_text(metrics, table, changes(probes, comparisons), comparisons).encode())
    draw_forest(table, [forest])
    return table


def judge(metrics: pd.DataFrame, baseline: str, candidate: str, directory: Path) -> None:
    """Write verdict.md, speedup.csv, fid_curves.png and speedups.png of two arms of every study in the table.

    Raises:
        StudyError: an arm is not in the table.
    """
    for arm in (baseline, candidate):
        if arm not in set(metrics["arm"]):
            raise StudyError(f"no row has the arm {arm}: there are {', '.join(metrics['arm'].unique())}")
    comparisons = {
        study: {
            "baseline": baseline, "candidates": [candidate], "matched": [], "thresholds": None,
            "features": rows["features"].iloc[0],
            "primary": {"candidate": candidate, "metric": rows["metric"].iloc[0]},
        }
        for study, rows in metrics.groupby("study", sort=False)
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    paths = (directory / name for name in ("speedup.csv", "verdict.md", "speedups.png"))
    table = write_verdict(metrics, pd.DataFrame(columns=PROBE_COLUMNS), comparisons, *paths)
    fid_curves(metrics, [directory / "fid_curves.png"], metrics["metric"].iloc[0], table)


def main() -> None:
    parser = argparse.ArgumentParser("python -m workflow.judge", description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, help="CSV with the columns arm, images, value; perhaps seed and study")
    parser.add_argument("--baseline", required=True, metavar="ARM")
    parser.add_argument("--candidate", required=True, metavar="ARM")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives verdict and figures")
    arguments = parser.parse_args()
    try:
        judge(read_curves(arguments.curves), arguments.baseline, arguments.candidate, arguments.out)
    except (StudyError, OSError) as error:
        sys.exit(str(error))
    logger.info("the verdict is in %s", arguments.out / "verdict.md")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
