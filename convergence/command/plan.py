"""How many seeds would settle a question, and how long they train: planned from the metrics of a pilot.

python -m convergence.command.plan reports/metrics.csv --baseline uni05 --candidate under05 --effect 2%
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from convergence.analysis.plan import plan
from convergence.errors import StudyError, exit_on_user_error
from convergence.tables import read_curves


def _effect(text: str) -> float:
    """A size: 2% or 0.02.

    Raises:
        ArgumentTypeError: it is no such number above 0.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size above 0: write it as 2% or 0.02")
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is {100 * value:g}%: write {text.removesuffix('%')}% if that is less")
    return value


def _pilot(path: Path, arms: list[str], **wanted: str | None) -> pd.DataFrame:
    """The rows of one study, extractor and metric in a file; what is not wanted by name must be the only one.

    Raises:
        StudyError: it is no table of curves, lacks what is wanted or an arm, or one of several must be chosen.
    """
    metrics = read_curves(path)
    for column, value in wanted.items():
        there = list(metrics[column].unique())
        if value is None and len(there) == 1:
            value = there[0]
        if value not in there:
            told = f"{value} is not in the table" if value else "must be chosen"
            raise StudyError(f"--{column} {told}: take one of {', '.join(there)}")
        metrics = metrics[metrics[column] == value]
    for arm in arms:
        if arm not in (there := list(metrics["arm"].unique())):
            raise StudyError(f"{path}: no arm {arm}: name one of {', '.join(there)}")
    return metrics


def main(arguments: list[str] | None = None) -> None:
    """What `python -m convergence.command.plan` does; a mistake ends in one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m convergence.command.plan", description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="metrics.csv of a pilot")
    parser.add_argument("--baseline", required=True, help="arm")
    parser.add_argument("--candidate", required=True, help="arm")
    parser.add_argument("--effect", required=True, type=_effect, help="difference to show, such as 2%%")
    parser.add_argument("--study", help="needed where the table holds several")
    parser.add_argument("--features", help="needed where the table holds several")
    parser.add_argument("--metric", default="fd", help="default: fd")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        arms, wanted = [options.baseline, options.candidate], {"study": options.study, "features": options.features}
        pilot = _pilot(options.metrics, arms, metric=options.metric, **wanted)
        sys.stdout.write(plan(pilot, *arms, options.effect) + "\n")


if __name__ == "__main__":
    main()
