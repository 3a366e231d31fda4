"""Comparison of the probes: loss per bin of timesteps, and gradient noise."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from convergence.analysis.comparison import compare_levels
from convergence.analysis.results import ProbeEffect


def probe_effects(probes: pd.DataFrame, compare: Mapping[str, Any]) -> list[ProbeEffect]:
    """Returns the advantage of each candidate in each quantity of the probes of one study, over all seeds.

    Args:
        probes: the long table of probes (`convergence.tables.PROBE_COLUMNS`), which may be empty.
        compare: `baseline` and `candidates`.
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
        for candidate in compare["candidates"]
        if (comparison := compare_levels(rows, compare["baseline"], candidate))
    ]
