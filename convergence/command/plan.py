"""`convergence plan`: estimates how many seeds a difference needs."""

import math
from pathlib import Path
from typing import Any

import click
import pandas as pd

from convergence.analysis.cost import COLUMNS, costs
from convergence.analysis.plan import plan
from convergence.command.options import PATH
from convergence.errors import StudyError
from convergence.tables import read_curves, read_table


class _Effect(click.ParamType):
    """Click type of a difference above 0 and below 1, written as 2% or 0.02."""

    name = "effect"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the difference as a fraction."""
        try:
            fraction = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction < 1:
            self.fail(f"{value} is not a difference between 0% and 100%: write it as 2% or 0.02.", param, ctx)
        return fraction


def _pilot(path: Path, arms: list[str], **choices: str | None) -> pd.DataFrame:
    """Returns the rows of a table of curves that belong to one study, feature extractor and metric.

    Args:
        path: CSV file.
        arms: names of arms that must be in these rows.
        **choices: a value for each of the columns `study`, `features` and `metric`; None if the column has one value.

    Raises:
        StudyError: if a value or an arm is not in the table, a choice is missing, or an arm is named twice.
    """
    if len(set(arms)) < len(arms):
        raise StudyError(f"--baseline and --candidate are both {arms[0]}: name two arms")
    metrics = read_curves(path)
    for column, value in choices.items():
        known = list(metrics[column].unique())
        if value is None and len(known) == 1:
            value = known[0]
        if value not in known:
            problem = (
                "is required, because the table has several" if value is None else f"{value!r} is not in the table"
            )
            raise StudyError(f"--{column} {problem}: choose one of {', '.join(known)}")
        metrics = metrics[metrics[column] == value]
    for arm in arms:
        if arm not in (known := list(metrics["arm"].unique())):
            raise StudyError(f"{path}: there is no arm {arm}: choose one of {', '.join(known)}")
    return metrics


def _costs(path: Path, arms: list[str]) -> dict[str, float] | None:
    """Returns arm -> seconds per 1000 images from cost.csv; None if the file is missing or lacks one of the arms."""
    table = costs(read_table(path, COLUMNS)) if path.exists() else {}
    known = {arm: cost.seconds_per_1000_images for arm, cost in table.items()}
    return known if known.keys() >= set(arms) else None


@click.command("plan")
@click.argument("metrics", type=PATH)
@click.option("--baseline", required=True, metavar="ARM", help="Arm to compare with.")
@click.option("--candidate", required=True, metavar="ARM", help="Arm that may be faster.")
@click.option("--effect", required=True, type=_Effect(), metavar="SIZE", help="Difference to detect, such as 2%.")
@click.option("--study", metavar="NAME", help="Required if the table has several studies.")
@click.option("--features", metavar="NAME", help="Required if the table has several feature extractors.")
@click.option("--metric", default="fd", metavar="NAME", help="Metric to compare.")
def main(
    metrics: Path,
    baseline: str,
    candidate: str,
    effect: float,
    study: str | None,
    features: str | None,
    metric: str,
) -> None:
    """Estimate how many seeds a difference needs, from the metrics of a finished study.

    METRICS is reports/STUDY/metrics.csv of a study with at least two seeds: the pilot. Prints the number of seeds and
    the hours of training. The hours require a cost.csv in the directory of METRICS.
    """
    pilot = _pilot(metrics, [baseline, candidate], metric=metric, study=study, features=features)
    known = _costs(metrics.with_name("cost.csv"), [baseline, candidate])
    click.echo(plan(pilot, baseline, candidate, effect, known))
