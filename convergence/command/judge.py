"""The verdict on curves from anywhere: what our statistics say of a table of FIDs that others measured.

python -m convergence.command.judge curves.csv --baseline uni05 --candidate under05 --out directory
"""

import argparse
import logging
from pathlib import Path

import pandas as pd

from convergence.analysis.verdict import write_verdict
from convergence.errors import StudyError, exit_on_user_error
from convergence.figures.curves import fid_curves
from convergence.tables import PROBE_COLUMNS, read_curves

logger = logging.getLogger("convergence.command.judge")


def judge(metrics: pd.DataFrame, baseline: str, candidate: str, directory: Path) -> None:
    """Write verdict.md, speedup.csv, fid_curves.png and speedups.png of two arms of every study in the table.

    Raises:
        StudyError: an arm is not in the table.
    """
    for arm in (baseline, candidate):
        if arm not in set(metrics["arm"]):
            raise StudyError(f"no row has the arm {arm}: name one of {', '.join(metrics['arm'].unique())}")
    comparisons = {
        study: {
            "baseline": baseline, "candidates": [candidate],
            "primary": {"candidate": candidate, "metric": rows["metric"].iloc[0]},
            "thresholds": None, "features": rows["features"].iloc[0], "matched": [],
        }
        for study, rows in metrics.groupby("study", sort=False)
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    paths = (directory / name for name in ("speedup.csv", "verdict.md", "speedups.png"))
    table = write_verdict(metrics, pd.DataFrame(columns=PROBE_COLUMNS), comparisons, *paths)
    fid_curves(metrics, [directory / "fid_curves.png"], metrics["metric"].iloc[0], table)


def main() -> None:
    """What `python -m convergence.command.judge` does; a mistake ends in one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser("python -m convergence.command.judge", description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, help="CSV with the columns arm, images, value; perhaps seed and study")
    parser.add_argument("--baseline", required=True, metavar="ARM")
    parser.add_argument("--candidate", required=True, metavar="ARM")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives verdict and figures")
    arguments = parser.parse_args()
    with exit_on_user_error():
        judge(read_curves(arguments.curves), arguments.baseline, arguments.candidate, arguments.out)
    logger.info("the verdict is in %s", arguments.out / "verdict.md")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
