"""How many seeds an effect takes, from the noise of a pilot."""

import numpy as np
import pandas as pd

from convergence.analysis.comparison import compare_pair, over_seeds
from convergence.analysis.power import POWER, cautious_sd, noise_floor, seeds_needed
from convergence.analysis.verdict import effect_size
from convergence.errors import StudyError
from convergence.tables import metric_name


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
