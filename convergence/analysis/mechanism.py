"""Comparison of the probes: loss per bin of timesteps, and gradient noise."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from convergence.analysis.comparison import _joined, compare_levels


def compare_probes(probes: pd.DataFrame, comparisons: Mapping[str, Mapping[str, Any] | None]) -> pd.DataFrame:
    """What each candidate changes in each metric of the probes: as `speedup_table`, with the column `timesteps`
    ("0-99", "all") for its `features`.

    Args:
        probes: `reports/mechanism.csv`.
        comparisons: study -> its `baseline` and `candidates`; None where nothing is compared.
    """
    tables = [
        compare_levels(rows.rename(columns={"timesteps": "features"}), compare["baseline"], candidate)
        for study, compare in comparisons.items()
        if compare
        for _, rows in probes[probes["study"] == study].groupby(["timesteps", "metric"], sort=False)
        for candidate in compare["candidates"]
    ]
    return _joined(tables).rename(columns={"features": "timesteps"})
