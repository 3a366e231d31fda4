"""Computes the verdict on curves that were measured outside of this project."""

from pathlib import Path

import pandas as pd

from convergence.analysis.results import StudyVerdict
from convergence.analysis.verdict import judge, write_verdict
from convergence.errors import StudyError
from convergence.figures.curves import fid_curves
from convergence.figures.forest import draw_forest
from convergence.rows import PROBE_COLUMNS
from convergence.study_plan import StudyPlan
from convergence.tables import check_sample_counts


def judge_curves(metrics: pd.DataFrame, baseline: str, candidate: str, directory: Path) -> list[StudyVerdict]:
    """Compares two arms in every study of a table of curves, and writes a verdict and figures for each study.

    The files are verdict.json, verdict.md, effects.csv, speedups.png and fid_curves.png. If the table has one study,
    they are in `directory`. If the table has several studies, each study has a subdirectory, and `directory` has a
    fid_curves.png of all studies.

    Args:
        metrics: table of metrics, as `convergence.tables.read_curves` returns it. The metric and the feature extractor
            in the first row of each study are primary.
        baseline: name of the arm to compare with.
        candidate: name of the arm that is compared with the baseline.
        directory: directory for the files; created if it does not exist.

    Returns:
        the verdict of each study.

    Raises:
        StudyError: an arm is not in the table, both arms are the same, the curves cannot be compared or drawn, or the
            name of one of several studies cannot be the name of a directory.
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
    rows_of = {study: metrics[metrics["study"] == study] for study in studies}
    # All studies are judged before anything is written.
    verdicts = [_judge(rows, study, baseline, candidate) for study, rows in rows_of.items()]
    for verdict, (study, rows) in zip(verdicts, rows_of.items(), strict=True):
        target = directory / study if len(studies) > 1 else directory
        target.mkdir(parents=True, exist_ok=True)
        write_verdict(verdict, target)
        draw_forest(verdict.primary, [target / "speedups.png"])
        fid_curves(rows, [target / "fid_curves.png"], rows["metric"].iloc[0], verdict.comparisons)
    if len(studies) > 1:
        comparisons = [comparison for verdict in verdicts for comparison in verdict.comparisons]
        fid_curves(metrics, [directory / "fid_curves.png"], metrics["metric"].iloc[0], comparisons)
    return verdicts


def _judge(rows: pd.DataFrame, study: str, baseline: str, candidate: str) -> StudyVerdict:
    plan = StudyPlan(
        baseline=baseline,
        candidates=(candidate,),
        candidate=candidate,
        features=rows["features"].iloc[0],
        metric=rows["metric"].iloc[0],
        thresholds=None,
        margin=None,
        seeds=None,
        last_step=None,
    )
    return judge(rows, pd.DataFrame(columns=PROBE_COLUMNS), study, plan)
