"""The decision table: what a verdict concludes from three paired quantities.

A is the level averaged over training, E the level at the last checkpoint, S the training images until the primary
threshold.
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
    """Returns the row of the decision table.

    | A | E | S | outcome |
    |---|---|---|---|
    | better | not worse | better | faster |
    | better | not worse | not shown | better on average |
    | better | worse | any | curves cross |
    | better | not worse | worse | curves cross |
    | not shown, within the margin | not shown | not shown | the same |
    | not shown, within the margin | one of them is shown | | the same on average |
    | not shown, otherwise | any | any | undecided |

    The rows for "worse" mirror those for "better".

    Args:
        average: what the 95% interval of A shows.
        final: the same for E.
        images: the same for S; "not shown" without a threshold.
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
