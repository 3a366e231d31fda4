"""Removes the values of failed runs from tables, so that a failed run wins no comparison."""

import pandas as pd

from diffusion.evaluation.failure import FAILURES


def failed(rows: pd.DataFrame) -> pd.Series:
    """Returns for each row of a table of metrics whether the value is missing because the run failed.

    A run failed if it diverged or collapsed (`diffusion.evaluation.failure`).
    """
    return rows["value"].isna() & rows["reason"].astype(str).str.startswith(FAILURES)


def without_failures(metrics: pd.DataFrame) -> pd.DataFrame:
    """Returns a table of metrics without the values of failed runs.

    A run failed if its last checkpoint diverged or collapsed (`diffusion.evaluation.failure`). The values of this
    checkpoint, and of failed checkpoints directly before it, become NaN, and the column `reason` has the reason of the
    last checkpoint. If a checkpoint failed but a later checkpoint of the same run did not, its value remains.

    Args:
        metrics: table of metrics (`convergence.tables`) with all checkpoints of the runs. In the rows of a failed
            checkpoint, `reason` is the result of `diffusion.evaluation.failure.failure`.
    """
    metrics = metrics.assign(reason=metrics["reason"].astype(object).fillna(""))
    runs, marked = [metrics["arm"], metrics["seed"]], metrics["reason"].str.startswith(FAILURES)
    last_sound = metrics["step"].where(~marked).groupby(runs).transform("max").fillna(-1)
    is_failed = metrics["step"] > last_sound
    reason = metrics.sort_values("step").groupby(["arm", "seed"])["reason"].transform("last")
    recovered = "recovered after it " + metrics["reason"]
    return metrics.assign(
        value=metrics["value"].mask(is_failed),
        stderr=metrics["stderr"].mask(is_failed),
        reason=metrics["reason"].mask(is_failed, reason).mask(marked & ~is_failed, recovered),
    )


def without_failed_runs(probes: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Returns a table of probes without the values of the checkpoints whose metrics `without_failures` removed.

    Args:
        probes: table of the probes of the same runs.
        metrics: table that `without_failures` returned.
    """
    checkpoint = ["arm", "seed", "step"]
    reasons = metrics[failed(metrics)].drop_duplicates(checkpoint).set_index(checkpoint)["reason"]
    reason = reasons.reindex(pd.MultiIndex.from_frame(probes[checkpoint])).set_axis(probes.index)
    is_failed = reason.notna()
    return probes.assign(value=probes["value"].mask(is_failed), reason=reason.where(is_failed, probes["reason"]))
