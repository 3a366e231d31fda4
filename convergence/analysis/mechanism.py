"""Comparison of the probes: loss per bin of timesteps, and gradient noise."""

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from convergence.analysis.comparison import compare_levels
from convergence.analysis.results import ProbeEffect


def probe_effects(probes: pd.DataFrame, baseline: str, candidates: Iterable[str]) -> list[ProbeEffect]:
    """Returns the effect of each candidate in each quantity of the probes of one study, over all seeds.

    Args:
        probes: the long table of probes (`convergence.tables.PROBE_COLUMNS`), which may be empty.
        baseline: an arm.
        candidates: the arms that are compared with it.
    """
    tables = probes.rename(columns={"timesteps": "features"}).groupby(["features", "metric"], sort=False)
    return [
        ProbeEffect(
            timesteps=comparison.features,
            metric=comparison.metric,
            baseline=comparison.baseline,
            candidate=comparison.candidate,
            scale=comparison.scale,
            average=replace(comparison.average, per_seed=()),
        )
        for _, rows in tables
        for candidate in candidates
        if (comparison := compare_levels(rows, baseline, candidate))
    ]
