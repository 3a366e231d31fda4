"""The number of seeds that a study needs to detect an effect, computed from the noise of a pilot (an earlier study)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from convergence.analysis.comparison import NO_DIFFERENCE, compare_pairs
from convergence.analysis.pairs import pair_runs
from convergence.analysis.power import POWER, cautious_sd, seeds_needed
from convergence.analysis.wording import size_text
from convergence.errors import StudyError


def plan(
    metrics: pd.DataFrame, baseline: str, candidate: str, effect: float, costs: Mapping[str, float] | None = None
) -> str:
    """Returns a text with the number of seeds and the hours of training that are needed to detect an effect.

    Args:
        metrics: the long table of metrics (`convergence.tables`) of the pilot, of one study, extractor and metric.
        baseline: name of an arm of the pilot.
        candidate: name of another arm of the pilot.
        effect: the effect to detect. For FD, it is a relative change such as 0.02. For KID, precision, recall,
            density and coverage, it is a change of the metric itself.
        costs: arm -> training seconds per 1000 images; None: the text contains no hours.

    Raises:
        StudyError: the pilot has fewer than two pairs of runs, the arms share no range of training images, the paired
            differences have no noise, or more than 10,000 seeds are needed.
    """
    runs = pair_runs(metrics, baseline, candidate)
    comparison = compare_pairs(runs) if runs else None
    pairs = comparison.average.pairs if comparison else 0
    if comparison is None or pairs < 2:
        raise StudyError(
            f"The pilot has {pairs} pairs of {baseline} and {candidate} that did not diverge or collapse, and a "
            "standard deviation needs at least two: train more seeds."
        )
    scale, sd = comparison.scale, comparison.noise.paired
    if comparison.outcome == "identical":
        raise StudyError(f"{baseline} and {candidate} are identical in the pilot: every value of every seed is equal.")
    if sd < NO_DIFFERENCE:
        raise StudyError(
            f"All pairs of {baseline} and {candidate} have the same difference, so the pilot shows no noise: use runs "
            "that were trained with different seeds."
        )
    target = float(np.log1p(effect)) if scale == "ratio" else effect
    images = metrics.groupby("arm")["images"].max()
    hours = sum(images[arm] / 1000 * costs[arm] / 3600 for arm in (baseline, candidate)) if costs else 0  # of one pair
    lines = [
        f"Pilot: {pairs} pairs, {comparison.metric_name}, {comparison.first_images:,.0f} to "
        f"{comparison.last_images:,.0f} images. The paired difference of the average has a standard deviation of "
        f"{size_text(sd, scale)} over seeds.",
        f"To detect a difference of {size_text(target, scale)} with {100 * POWER:.0f}% power (two-sided, 5%):",
    ]
    cases = (("if this is the true standard deviation", sd), ("to be safe", cautious_sd(sd, pairs)))
    for case, assumed_sd in cases:
        seeds = seeds_needed(target, assumed_sd)
        cost = f"{seeds * hours:,.1f} hours of training in both arms, " if hours > 0 else ""
        lines.append(f"  {seeds} seeds, {cost}{case} ({size_text(assumed_sd, scale)})")
    if hours > 0:
        lines.append("Hours are those of training steps that run alone (cost.csv), without sampling and evaluation.")
    return "\n".join(lines)
