"""The verdict on a study: question, answer and numbers, as data and as files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from convergence.analysis.comparison import EFFECT_COLUMNS, compare_pairs, effects_table
from convergence.analysis.cost import Cost
from convergence.analysis.markdown import to_markdown
from convergence.analysis.mechanism import mechanisms
from convergence.analysis.notes import bias_notes, power_notes
from convergence.analysis.pairs import Pairs, pair_runs
from convergence.analysis.results import (
    Comparison,
    FailedRun,
    Role,
    Sensitivity,
    StudyVerdict,
    read_verdict,
    save_verdict,
)
from convergence.analysis.sensitivity import changed_signs, sensitivity
from convergence.analysis.tuning import tuning_notes
from convergence.analysis.wording import count_text
from convergence.errors import StudyError
from convergence.failures import failed
from convergence.study_plan import StudyPlan
from convergence.tables import averages_in, metric_name, of_average, write_table
from diffusion.files import atomic_write

if TYPE_CHECKING:  # importing torch takes seconds
    from diffusion.schemes import Tables

__all__ = ["StudyVerdict", "judge", "read_verdict", "to_markdown", "write_verdict"]


def write_verdict(verdict: StudyVerdict, directory: Path) -> None:
    """Writes verdict.json, verdict.md and effects.csv of one study into an existing directory."""
    write_table(effects_table(verdict.comparisons), directory / "effects.csv", EFFECT_COLUMNS)
    save_verdict(verdict, directory / "verdict.json")
    with atomic_write(directory / "verdict.md") as file:
        file.write(to_markdown(verdict).encode())


def judge(
    metrics: pd.DataFrame,
    probes: pd.DataFrame,
    study: str,
    plan: StudyPlan | None,
    plan_changes: Sequence[str] = (),
    costs: Mapping[str, Cost] | None = None,
    tables: Mapping[str, "Tables"] | None = None,
    warnings: Sequence[str] = (),
) -> StudyVerdict:
    """Returns the verdict on one study.

    Args:
        metrics: the long table of metrics (`convergence.tables`); rows of other studies are ignored.
        probes: the long table of probes (`convergence.rows.PROBE_COLUMNS`); may be empty.
        study: name of the study.
        plan: what the verdict judges by: arms, metric, thresholds, margin and seeds. None if the study compares
            nothing.
        plan_changes: sentences about what the study file changed after the plan was fixed.
        costs: arm -> its training cost; None if unknown.
        tables: arm -> its density and loss weights. Arms with a learned density have no entry. None if unknown.
        warnings: sentences that restrict the verdict.

    Raises:
        StudyError: the runs of the primary comparison share no range of training images.
    """
    every_average = metrics[metrics["study"] == study]
    metrics = of_average(every_average, plan.ema if plan else None)
    runs = metrics[failed(metrics)][["arm", "seed", "reason"]].drop_duplicates()
    failed_runs = tuple(FailedRun(run.arm, int(run.seed), run.reason) for run in runs.itertuples())
    warnings = (*warnings, *_missing_values(metrics))
    if plan and plan.ema and metrics.empty and not every_average.empty:
        warnings = (
            *warnings,
            f"The planned average of the weights, {plan.ema}, is not measured: add it to evaluate.ema.",
        )
    of_arms = tuple((costs or {}).values())
    if plan is None:
        return StudyVerdict(study, costs=of_arms, failed=failed_runs, warnings=warnings)
    planned = _planned(metrics, plan)
    pairs, problems = _pairs(planned, plan)
    comparisons = _comparisons(pairs, plan, costs)
    if missing := missing_runs(planned, plan):
        comparisons = [as_interim(c, missing) if c.role == "primary" else c for c in comparisons]
    primary = next((comparison for comparison in comparisons if comparison.role == "primary"), None)
    later = metrics[~metrics["seed"].isin(planned["seed"])]
    comparisons += _replication(later, plan, costs)
    pairs_of = {
        average: _pairs(_planned(of_average(every_average, average), plan), plan)[0]
        for average in averages_in(every_average)
        if average != (plan.ema or averages_in(every_average)[0])
    }
    rows = sensitivity(_of_candidate(pairs, plan), {name: _of_candidate(p, plan) for name, p in pairs_of.items()})
    # Also of pairs in `also` with the same baseline, such as the arms at equal learning rates.
    compared = [candidate for baseline, candidate in plan.pairs if baseline == plan.baseline]
    planned_probes = _planned(probes[probes["study"] == study], plan)
    return StudyVerdict(
        study,
        question=f"Does {plan.candidate} converge in fewer training images than {plan.baseline}, "
        f"by {metric_name(plan.features, plan.metric)}?",
        answer=_answer(primary, comparisons, rows, plan),
        outcome=primary.outcome if primary else None,
        plan=plan,
        plan_changes=tuple(plan_changes),
        comparisons=tuple(comparisons),
        costs=of_arms,
        sensitivity=rows,
        mechanism=mechanisms(planned_probes, plan.baseline, compared, tables or {}),
        failed=failed_runs,
        warnings=(*warnings, *problems),
    )


def _missing_values(metrics: pd.DataFrame) -> list[str]:
    """Returns sentences about missing values of runs that did not fail. Only the missing values are left out."""
    missing = metrics[metrics["value"].isna() & ~failed(metrics)]
    reasons = missing["reason"].fillna("").replace("", "no reason is given")
    groups = missing.groupby([missing["arm"], missing["seed"], missing["metric"], reasons], sort=False)
    return [
        f"{arm} seed {seed} has no {metric} at {count_text(len(rows), 'checkpoint')} ({reason}): they are left out."
        for (arm, seed, metric, reason), rows in groups
    ]


def _pairs(planned: pd.DataFrame, plan: StudyPlan) -> tuple[list[Pairs], list[str]]:
    """Pairs the runs of every two arms that are compared, in every metric and with every feature extractor.

    Returns:
        the pairs, and a sentence for each secondary comparison whose runs share no range of training images.

    Raises:
        StudyError: the runs of the primary comparison share no range of training images.
    """
    found, problems = [], []
    for (features, metric), rows in planned.groupby(["features", "metric"], sort=False):
        for pair in plan.pairs:
            try:
                found.append(pair_runs(rows, *pair))
            except StudyError as error:
                if (features, metric, pair) == (plan.features, plan.metric, plan.pair):
                    raise
                problems.append(str(error))
    return [pairs for pairs in found if pairs], problems


def _of_candidate(pairs: Sequence[Pairs], plan: StudyPlan) -> list[Pairs]:
    """Returns the pairs of the baseline with the candidate of the primary comparison."""
    return [runs for runs in pairs if (runs.baseline, runs.candidate) == plan.pair]


def _comparisons(pairs: Sequence[Pairs], plan: StudyPlan, costs: Mapping[str, Cost] | None) -> list[Comparison]:
    """Compares the arms of every pair, in every metric and with every feature extractor."""
    comparisons = []
    for runs in pairs:
        is_main = (runs.features, runs.metric) == (plan.features, plan.metric)
        thresholds, margin = (plan.thresholds, plan.margin) if is_main else (None, None)
        role: Role = "primary" if is_main and (runs.baseline, runs.candidate) == plan.pair else "secondary"
        comparisons.append(compare_pairs(runs, thresholds, margin, role, costs))
    return adjust(comparisons)


def _replication(later: pd.DataFrame, plan: StudyPlan, costs: Mapping[str, Cost] | None) -> list[Comparison]:
    """Returns the primary comparison of the seeds that were added to the plan later, if they have a pair of runs."""
    rows = later[(later["features"] == plan.features) & (later["metric"] == plan.metric)]
    pairs = pair_runs(rows, plan.baseline, plan.candidate)
    return [compare_pairs(pairs, plan.thresholds, plan.margin, "replication", costs)] if pairs else []


def _planned(metrics: pd.DataFrame, plan: StudyPlan) -> pd.DataFrame:
    """Returns the rows of the planned seeds up to the last planned checkpoint."""
    seeds = metrics["seed"] if plan.seeds is None else plan.seeds
    rows = metrics[metrics["seed"].isin(seeds)]
    return rows if plan.last_step is None else rows[rows["step"] <= plan.last_step]


def missing_runs(metrics: pd.DataFrame, plan: StudyPlan) -> list[tuple[str, int]]:
    """Returns (arm, seed) of planned runs of the primary comparison whose last checkpoint is not evaluated yet."""
    if plan.seeds is None or plan.last_step is None:
        return []
    last = metrics[metrics["step"] == plan.last_step]
    evaluated = set(zip(last["arm"], last["seed"], strict=True))
    planned = [(arm, seed) for seed in plan.seeds for arm in (plan.baseline, plan.candidate)]
    return [run for run in planned if run not in evaluated]


def as_interim(comparison: Comparison, missing: Sequence[tuple[str, int]]) -> Comparison:
    """Returns the comparison with the outcome "interim", which concludes nothing because planned runs are missing."""
    runs = ", ".join(f"{arm} seed {seed}" for arm, seed in missing)
    note = f"Planned runs are not evaluated yet ({runs}), so nothing is concluded."
    return replace(comparison, outcome="interim", notes=(note, *comparison.notes))


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Returns the comparisons, with p-values of the secondary ones adjusted by the method of Holm (1979)."""
    secondary = [c for c in comparisons if c.role == "secondary" and not math.isnan(c.average.p_value)]
    ordered = sorted(secondary, key=lambda comparison: comparison.average.p_value)
    adjusted, largest = {}, 0.0
    for place, comparison in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * comparison.average.p_value))
        adjusted[id(comparison)] = largest
    return [replace(c, p_holm=adjusted.get(id(c), math.nan)) for c in comparisons]


def _answer(
    primary: Comparison | None, comparisons: Sequence[Comparison], rows: Sequence[Sensitivity], plan: StudyPlan
) -> str:
    if primary is None:
        where = "of the primary metric " if comparisons else ""
        return f"No answer: no seed has a value {where}in both arms."
    notes = [*changed_signs(primary, rows), *bias_notes(primary, comparisons), *power_notes(primary)]
    notes += tuning_notes(plan, comparisons)
    return " ".join([str(primary), *notes])
