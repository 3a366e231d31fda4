"""How many seeds would settle a question, and how long they train: planned from the metrics of a pilot.

python -m workflow.plan reports/metrics.csv --baseline uni05 --candidate under05 --effect 2%
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from diffusion import StudyError, one_sentence
from workflow.statistics import POWER, cautious_sd, compare_pair, noise_floor, over_seeds, seeds_needed
from workflow.tables import metric_name, read_curves
from workflow.verdict import effect_size


def plan(metrics: pd.DataFrame, baseline: str, candidate: str, effect: float) -> str:
    """Seeds and hours that show an effect, in words.

    Args:
        metrics: the long table of one study, extractor and metric: the pilot.
        effect: relative change of the metric for distances, such as 0.02; a difference for precision and recall.

    Raises:
        StudyError: the pilot holds fewer than two pairs, or no number of seeds in reach is enough.
    """
    table = compare_pair(metrics, baseline, candidate)
    pairs = int(over_seeds(table, "average")["pairs"]) if len(table) else 0
    if pairs < 2:
        raise StudyError(
            f"Pairs of {baseline} and {candidate} in the pilot that did not diverge: {pairs}. A spread takes two: "
            "train more seeds."
        )
    average, noise = over_seeds(table, "average"), noise_floor(table)
    scale = average["scale"]
    wanted = np.log1p(effect) if scale == "log" else effect
    trained = metrics[metrics["arm"].isin([baseline, candidate])].groupby(["arm", "seed"])["seconds"].max()
    hours = trained.groupby("arm").mean().sum() / 3600  # of one pair
    lines = [
        f"Pilot: {pairs} pairs, {metric_name(average['features'], average['metric'])}, "
        f"{average['first_images']:,.0f} to {average['last_images']:,.0f} images; the paired difference of the average "
        f"has a standard deviation of {effect_size(noise.paired, scale)} over seeds.",
        f"To show a difference of {effect_size(wanted, scale)} with {100 * POWER:.0f}% power (two-sided, 5%):",
    ]
    cases = (("if that is the true spread", noise.paired), ("to be safe", cautious_sd(noise.paired, pairs)))
    for case, sd in cases:
        seeds = seeds_needed(wanted, sd)
        cost = f"{seeds * hours:,.1f} hours of training in both arms, " if hours > 0 else ""
        lines.append(f"  {seeds} seeds, {cost}{case} ({effect_size(sd, scale)})")
    if hours > 0:  # a table from elsewhere may not know seconds
        lines.append("Hours are training seconds of the pilot, one run at a time; sampling and evaluation come on top.")
    return "\n".join(lines)


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
    """What `python -m workflow.plan` does; a mistake ends in one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m workflow.plan", description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="metrics.csv of a pilot")
    parser.add_argument("--baseline", required=True, help="arm")
    parser.add_argument("--candidate", required=True, help="arm")
    parser.add_argument("--effect", required=True, type=_effect, help="difference to show, such as 2%%")
    parser.add_argument("--study", help="needed where the table holds several")
    parser.add_argument("--features", help="needed where the table holds several")
    parser.add_argument("--metric", default="fd", help="default: fd")
    options = parser.parse_args(arguments)
    with one_sentence():
        arms, wanted = [options.baseline, options.candidate], {"study": options.study, "features": options.features}
        pilot = _pilot(options.metrics, arms, metric=options.metric, **wanted)
        sys.stdout.write(plan(pilot, *arms, options.effect) + "\n")


if __name__ == "__main__":
    main()
