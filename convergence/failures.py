"""Failed runs in tables: their values are removed, so that they win no comparison."""

import pandas as pd

from diffusion.evaluation.failure import FAILURES


def failed(rows: pd.DataFrame) -> pd.Series:
    """Returns for each row of a long table whether it has no value because its run diverged or collapsed."""
    return rows["value"].isna() & rows["reason"].astype(str).str.startswith(FAILURES)


def without_failures(metrics: pd.DataFrame) -> pd.DataFrame:
    """Returns a long table of metrics without the values of failed runs.

    A run failed if its last checkpoint did (`diffusion.evaluation.failure`). Its values are removed from the checkpoint
    on from which all have failed, and the reason is that of the last one. A checkpoint before is ordinary data.

    Args:
        metrics: the values of complete runs; `reason` is what `failure` returned for each checkpoint that failed.
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
    """Returns a long table of probes without the values of failed runs, as their metrics were removed.

    Args:
        probes: the probes of the same runs.
        metrics: what `without_failures` returned.
    """
    checkpoint = ["arm", "seed", "step"]
    reasons = metrics[failed(metrics)].drop_duplicates(checkpoint).set_index(checkpoint)["reason"]
    reason = reasons.reindex(pd.MultiIndex.from_frame(probes[checkpoint])).set_axis(probes.index)
    is_failed = reason.notna()
    return probes.assign(value=probes["value"].mask(is_failed), reason=reason.where(is_failed, probes["reason"]))
