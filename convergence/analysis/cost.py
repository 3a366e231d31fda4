"""Computes the training cost of each arm: seconds per 1000 training images, timed while no other job runs."""

import numpy as np
import pandas as pd

from convergence.analysis.intervals import Interval, t_interval

COLUMNS = [
    "study", "arm", "seconds_per_1000_images", "low", "high", "ratio", "ratio_low", "ratio_high", "rounds", "device",
]  # fmt: skip


def cost_table(rounds: pd.DataFrame, study: str, baseline: str | None) -> pd.DataFrame:
    """Returns a table with the cost of each arm, and the ratio of this cost to the cost of the baseline.

    Costs and ratios have 95% intervals over rounds. A cost is the geometric mean over rounds, so the ratio of two costs
    equals the geometric mean of the ratios of the rounds.

    Args:
        rounds: table of the rows that `convergence.rows.of_rounds` returned.
        study: name of the study.
        baseline: arm to compare with. If the baseline is None or was not timed, the ratios are NaN.
    """
    devices = rounds.groupby("arm")["device"].first()
    logs = np.log(rounds.pivot(index="round", columns="arm", values="seconds_per_1000_images"))
    rows = []
    for arm in rounds["arm"].unique():
        ratio = _exp(logs[arm] - logs[baseline]) if baseline in logs else (np.nan,) * 3
        rows.append([study, arm, *_exp(logs[arm]), *ratio, len(logs), devices[arm]])
    return pd.DataFrame(rows, columns=COLUMNS)


def _exp(logs: pd.Series) -> Interval:
    return Interval(*map(float, np.exp(t_interval(logs.to_numpy()))))


def costs(table: pd.DataFrame) -> dict[str, float]:
    """Returns arm -> seconds per 1000 training images, from a table that `cost_table` returned."""
    return dict(zip(table["arm"], table["seconds_per_1000_images"], strict=True))
