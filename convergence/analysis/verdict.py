"""The verdict on a study: question, answer and numbers, as data and as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from convergence.analysis.comparison import SPEEDUP_COLUMNS, compare_study, speedup_table
from convergence.analysis.markdown import to_markdown
from convergence.analysis.mechanism import probe_effects
from convergence.analysis.power import POWER, detectable
from convergence.analysis.results import Comparison, FailedRun, StudyVerdict, read_verdict, save_verdict
from convergence.analysis.wording import count_text, size_text
from convergence.failures import failed
from convergence.tables import write_table
from diffusion.files import atomic_write

__all__ = ["StudyVerdict", "judge", "read_verdict", "to_markdown", "write_verdict"]


def write_verdict(verdict: StudyVerdict, directory: Path) -> None:
    """Writes verdict.json, verdict.md and speedup.csv of one study into an existing directory."""
    write_table(speedup_table(verdict.comparisons), directory / "speedup.csv", SPEEDUP_COLUMNS)
    save_verdict(verdict, directory / "verdict.json")
    with atomic_write(directory / "verdict.md") as file:
        file.write(to_markdown(verdict).encode())


def judge(
    metrics: pd.DataFrame,
    probes: pd.DataFrame,
    study: str,
    compare: Mapping[str, Any] | None,
    warnings: Sequence[str] = (),
) -> StudyVerdict:
    """Returns the verdict on one study.

    Args:
        metrics: the long table of metrics (`convergence.tables`); rows of other studies are ignored.
        probes: the long table of probes, which may be empty.
        study: the name of the study.
        compare: `convergence.schema.Experiment.comparison`; None if the study compares nothing.
        warnings: sentences that restrict the verdict.
    """
    metrics = metrics[metrics["study"] == study]
    runs = metrics[failed(metrics)][["arm", "seed", "reason"]].drop_duplicates()
    failed_runs = tuple(FailedRun(run.arm, int(run.seed), run.reason) for run in runs.itertuples())
    if compare is None:
        return StudyVerdict(study, failed=failed_runs, warnings=tuple(warnings))
    comparisons = compare_study(metrics, compare)
    primary = next((comparison for comparison in comparisons if comparison.primary), None)
    candidate = compare["primary"]["candidate"]
    return StudyVerdict(
        study,
        question=f"Does {candidate} converge in fewer training images than {compare['baseline']}?",
        answer=f"{primary} {_detectable(primary)}".rstrip() if primary else _no_answer(comparisons),
        outcome=primary.outcome if primary else None,
        comparisons=tuple(comparisons),
        mechanism=tuple(probe_effects(probes[probes["study"] == study], compare)),
        matched=tuple(compare["matched"]),
        failed=failed_runs,
        warnings=tuple(warnings),
    )


def _no_answer(comparisons: Sequence[Comparison]) -> str:
    if comparisons:
        return "No answer: no seed has a value of the primary metric in both arms."
    return "No answer: no seed has a value in both arms."


def _detectable(comparison: Comparison) -> str:
    """What this number of seeds can detect; "" below three pairs, from which the spread is hardly known."""
    pairs = comparison.average.pairs
    if pairs < 3:
        return ""
    smallest = size_text(detectable(comparison.noise.paired, pairs), comparison.scale)
    return (
        f"At this noise, {count_text(pairs, 'seed')} detect a difference of {smallest} with {100 * POWER:.0f}% power."
    )
