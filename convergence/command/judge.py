"""`convergence judge`: computes the verdict on curves from a CSV file."""

from pathlib import Path

import click

from convergence.command.options import PATH
from convergence.judge import judge_curves
from convergence.tables import read_curves


@click.command("judge")
@click.argument("curves", type=PATH)
@click.option("--baseline", required=True, metavar="ARM", help="Arm to compare with.")
@click.option("--candidate", required=True, metavar="ARM", help="Arm that may be faster.")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Directory for the verdict and its figures.")
def main(curves: Path, baseline: str, candidate: str, out: Path) -> None:
    """Compare two arms of a CSV file of curves, and write the verdict and its figures.

    CURVES has the columns arm, images (seen in training) and value (FID), and optionally seed, study, step, n (samples
    per FID), metric and features. Prints the verdict of each study.
    """
    for verdict in judge_curves(read_curves(curves), baseline, candidate, out):
        click.echo(f"{verdict.study}: {verdict.answer}")
    click.echo(f"The verdict and its figures are in {out}.")
