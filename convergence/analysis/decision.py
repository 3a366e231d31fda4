"""The decision table: what a verdict concludes from three quantities, A, E and S, compared over pairs of runs.

A is the level, averaged over training images. E is the level at the last checkpoint. S is the number of training images
until the primary threshold. A level is a value of the metric on a scale where lower is better.
"""

from typing import Literal

from convergence.analysis.effects import Shown

Outcome = Literal[
    "faster",
    "slower",
    "better on average",
    "worse on average",
    "curves cross",
    "the same",
    "the same on average",
    "identical",
    "undecided",
    "interim",
]


def decide(average: Shown, final: Shown, images: Shown, within_margin: bool) -> Outcome:
    """Returns the outcome from the decision table.

    | A | E | S | outcome |
    |---|---|---|---|
    | better | not worse | better | faster |
    | better | not worse | not shown | better on average |
    | better | worse | any | curves cross |
    | better | any | worse | curves cross |
    | not shown, within the margin | not shown | not shown | the same |
    | not shown, within the margin | better or worse | any | the same on average |
    | not shown, within the margin | any | better or worse | the same on average |
    | not shown, not within the margin | any | any | undecided |

    If A is worse, "better" and "worse" change places in every column, and "slower" replaces "faster".

    Args:
        average: what the 95% interval of A shows: "better", "worse" or "not shown".
        final: what the 95% interval of E shows.
        images: what the 95% interval of S shows; "not shown" if there is no threshold.
        within_margin: whether the 90% interval of A is within the margin of equivalence.
    """
    if average == "not shown":
        if not within_margin:
            return "undecided"
        return "the same" if final == images == "not shown" else "the same on average"
    opposite = "worse" if average == "better" else "better"
    if opposite in (final, images):
        return "curves cross"
    if images == average:
        return "faster" if average == "better" else "slower"
    return "better on average" if average == "better" else "worse on average"
