"""The training cost of each arm: seconds per 1000 training images, timed while no other job runs."""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from convergence.analysis.effects import JSON_CONFIG
from convergence.analysis.intervals import Interval, t_interval


@dataclass(frozen=True)
class Cost:
    """The training cost of one arm, with 95% intervals over rounds. An unknown ratio is NaN."""

    __pydantic_config__ = JSON_CONFIG

    arm: str
    seconds_per_1000_images: float
    low: float
    high: float
    ratio: float
    """The cost divided by the cost of the baseline of the study."""
    ratio_low: float
    ratio_high: float
    rounds: int
    """Number of rounds in which all arms were timed directly after one another."""
    device: str

    @property
    def log_ratio(self) -> Interval:
        """The log of the ratio, with its bounds."""
        with np.errstate(divide="ignore"):
            return Interval(*np.log([self.ratio, self.ratio_low, self.ratio_high]).tolist())

    @property
    def cells(self) -> list[str]:
        """The cost and the ratio as cells of a table, such as "4.77 (4.21 to 5.41)" and "0.933 (0.859 to 1.014)"."""
        ratio = "–" if np.isnan(self.ratio) else f"{self.ratio:.3f} ({self.ratio_low:.3f} to {self.ratio_high:.3f})"
        return [f"{self.seconds_per_1000_images:.3g} ({self.low:.3g} to {self.high:.3g})", ratio]


COLUMNS = ["study", *(field.name for field in fields(Cost))]


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


def costs(table: pd.DataFrame) -> dict[str, Cost]:
    """Returns arm -> cost, from a table that `cost_table` returned."""
    return {row["arm"]: Cost(**row) for row in table.drop(columns="study").to_dict("records")}
