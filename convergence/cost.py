"""The cost of training an arm: seconds that its training steps take alone on the machine that trains."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from convergence.analysis.intervals import Interval, t_interval

# A row per arm and round; the arms of a round were timed directly after one another.
ROUND_COLUMNS = ["arm", "round", "seconds_per_1000_images", "device"]
COLUMNS = [
    "study", "arm", "seconds_per_1000_images", "low", "high", "ratio", "ratio_low", "ratio_high", "rounds", "device",
]  # fmt: skip


def round_table(seconds: np.ndarray, arms: Sequence[str], device: str) -> pd.DataFrame:
    """Returns the measured times as a table with the columns `ROUND_COLUMNS`.

    Args:
        seconds: seconds per image, [rounds, arms].
        arms: names of the arms.
        device: name of the device.
    """
    table = pd.DataFrame(1000 * seconds, columns=list(arms)).rename_axis("round").reset_index()
    return table.melt("round", var_name="arm", value_name="seconds_per_1000_images").assign(device=device)


def cost_table(rounds: pd.DataFrame, study: str, baseline: str | None) -> pd.DataFrame:
    """Returns the cost of each arm and its ratio to that of the baseline, with 95% intervals over rounds.

    Costs are geometric means, so the ratio of two costs is exactly the mean ratio of the rounds.

    Args:
        rounds: what `round_table` returns.
        study: its name.
        baseline: the arm to compare with. Without it, or if it was not timed, the ratios are missing.
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
    """Returns arm -> seconds per 1000 training images, from what `cost_table` returns."""
    return dict(zip(table["arm"], table["seconds_per_1000_images"], strict=True))
