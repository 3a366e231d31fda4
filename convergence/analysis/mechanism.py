"""Comparison of the probes: loss per bin of timesteps, and gradient noise."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from convergence.analysis.comparison import compare_levels, speedup_table
from convergence.analysis.results import Comparison, ProbeEffect


def compare_probes(probes: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the advantage of each candidate in each quantity of the probes.

    The table is that of `speedup_table`, with the column `timesteps` ("0-99", "all") instead of `features`.

    Args:
        probes: the long table of probes.
        comparisons: study -> its `baseline` and `candidates`.
    """
    compared = [
        comparison
        for study, compare in comparisons.items()
        for comparison in _compare(probes[probes["study"] == study], compare)
    ]
    return speedup_table(compared).rename(columns={"features": "timesteps"})


def probe_effects(probes: pd.DataFrame, compare: Mapping[str, Any]) -> list[ProbeEffect]:
    """Returns the advantages over all seeds, averaged over training images, in the probes of one study."""
    return [
        ProbeEffect(
            timesteps=comparison.features,
            metric=comparison.metric,
            baseline=comparison.baseline,
            candidate=comparison.candidate,
            scale=comparison.scale,
            average=replace(comparison.average, per_seed=()),
        )
        for comparison in _compare(probes, compare)
    ]


def _compare(probes: pd.DataFrame, compare: Mapping[str, Any]) -> list[Comparison]:
    """Compares the probes of one study; the comparisons have the bin of timesteps as `features`."""
    tables = probes.rename(columns={"timesteps": "features"}).groupby(["features", "metric"], sort=False)
    compared = [
        compare_levels(rows, compare["baseline"], candidate)
        for _, rows in tables
        for candidate in compare["candidates"]
    ]
    return [comparison for comparison in compared if comparison is not None]
