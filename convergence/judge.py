"""The verdict on curves that other people measured."""

from pathlib import Path

import pandas as pd

from convergence.analysis.results import StudyVerdict
from convergence.analysis.verdict import judge, write_verdict
from convergence.errors import StudyError
from convergence.figures.curves import fid_curves
from convergence.figures.forest import draw_forest
from convergence.study_plan import StudyPlan
from convergence.tables import PROBE_COLUMNS, check_sample_counts


def judge_curves(metrics: pd.DataFrame, baseline: str, candidate: str, directory: Path) -> list[StudyVerdict]:
    """Compares two arms in every study of a table, and writes the verdicts and figures.

    The files of one study (verdict.json, verdict.md, effects.csv, speedups.png, fid_curves.png) are written to the
    directory itself; those of several studies to a directory per study, next to a fid_curves.png of all of them.

    Args:
        metrics: the long table of metrics, such as `convergence.tables.read_curves` returns. The first metric and the
            first feature extractor of each study are primary.
        baseline: an arm.
        candidate: another arm.
        directory: is created if it does not exist.

    Raises:
        StudyError: an arm is not in the table, or the curves cannot be compared or drawn; both arms are the same; or
            one of several studies has a name that is not that of a directory.
    """
    if baseline == candidate:
        raise StudyError(f"the baseline and the candidate are both {baseline}: name two arms")
    for arm in (baseline, candidate):
        if arm not in set(metrics["arm"]):
            raise StudyError(f"no row has the arm {arm}: choose from {', '.join(metrics['arm'].unique())}")
    check_sample_counts(metrics)
    studies = list(metrics["study"].unique())
    if len(studies) > 1 and (wrong := [study for study in studies if "/" in study or study in {".", ".."}]):
        raise StudyError(f"the study {wrong[0]} cannot be the name of a directory: use a name without /")
    verdicts = []
    for study in studies:
        rows = metrics[metrics["study"] == study]
        target = directory / study if len(studies) > 1 else directory
        target.mkdir(parents=True, exist_ok=True)
        metric = rows["metric"].iloc[0]
        plan = StudyPlan(
            baseline=baseline,
            candidates=(candidate,),
            candidate=candidate,
            features=rows["features"].iloc[0],
            metric=metric,
            thresholds=None,
            margin=None,
            seeds=None,
            last_step=None,
        )
        verdict = judge(rows, pd.DataFrame(columns=PROBE_COLUMNS), study, plan)
        write_verdict(verdict, target)
        draw_forest(verdict.primary, [target / "speedups.png"])
        fid_curves(rows, [target / "fid_curves.png"], metric, verdict.comparisons)
        verdicts.append(verdict)
    if len(studies) > 1:
        comparisons = [comparison for verdict in verdicts for comparison in verdict.comparisons]
        fid_curves(metrics, [directory / "fid_curves.png"], metrics["metric"].iloc[0], comparisons)
    return verdicts
