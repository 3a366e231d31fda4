"""The independent recomputation of reports agrees with the analysis, and finds a wrong number."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from metric_tables import PLAN, curves, study, verdict_on
from projects import ROOT

from benchmarks import independent, recompute
from convergence.analysis.cost import COLUMNS, cost_table, costs
from convergence.analysis.verdict import write_verdict
from convergence.rows import COLUMNS_WITH_AVERAGE, of_rounds
from convergence.schema import Pair
from convergence.tables import write_table

PUBLISHED = ROOT / "reports/published"
REPORTS = sorted(path.parent for path in PUBLISHED.glob("**/effects.csv"))


def wrong(directory, metrics=None):
    """The numbers of a report that differ; there must be some that do not."""
    found = list(recompute.check(directory, metrics or directory / "metrics.csv"))
    assert len(found) > 100
    return [(name, *values) for name, *values, difference in found if difference > recompute.TOLERANCE]


def write_report(directory, planned_seeds=4):
    """A report on 6 seeds with failed and censored runs, two candidates, four metrics and costs."""
    base, cand, third = curves(6, 1.0), curves(6, 0.8, seed=1), curves(6, 1.05, seed=5)
    cand[3, 2:] = np.nan
    cand[2] *= 0.2  # reaches every threshold before the first trained checkpoint
    tables = [
        study(base, cand),
        study(base / 1000 - 0.1, cand / 1000 - 0.1, "kid"),
        study(base / 400, cand / 400, "recall"),
        study(base / 300, cand / 300, "density"),
    ]
    other = study(base, third).query("arm == 'cand'").assign(arm="third")
    metrics = pd.concat([*tables, other])
    also = (Pair(baseline="cand", candidate="third"),)
    changes = {"candidates": ("cand", "third"), "also": also, "seeds": tuple(range(planned_seeds)), "last_step": 400}
    plan = PLAN.model_copy(update=changes)
    seconds = np.random.default_rng(0).lognormal(0, 0.1, (5, 3)) * [0.01, 0.0125, 0.02]
    rounds = pd.DataFrame(of_rounds(seconds, ["base", "cand", "third"], "a CPU"))
    cost = cost_table(rounds, "small", "base")
    write_table(metrics, directory / "metrics.csv")
    (directory / "plan.json").write_text(plan.model_dump_json())
    write_table(cost, directory / "cost.csv", COLUMNS)
    write_verdict(verdict_on(metrics, plan, costs=costs(cost)), directory)


def test_a_report_with_several_averages_of_the_weights_is_recomputed(tmp_path):
    base = curves(4, 1.0)
    tables = [study(base, curves(4, factor, 1)).assign(ema=name) for name, factor in (("raw", 0.8), ("ema0.9", 1.1))]
    metrics, plan = pd.concat(tables, ignore_index=True), PLAN.model_copy(update={"ema": "raw"})
    write_table(metrics, tmp_path / "metrics.csv", COLUMNS_WITH_AVERAGE)
    write_verdict(verdict_on(metrics, plan), tmp_path)
    assert not wrong(tmp_path)
    metrics.loc[metrics["ema"] == "ema0.9", "value"] **= 1.01
    write_table(metrics, tmp_path / "metrics.csv", COLUMNS_WITH_AVERAGE)
    names = [name for name, *_ in wrong(tmp_path)]
    assert names and all(", ema0.9]" in name for name in names)


@pytest.mark.parametrize("planned_seeds", [4, 8], ids=["replication", "interim"])
def test_a_report_with_every_kind_of_run_is_recomputed(tmp_path, planned_seeds):
    write_report(tmp_path, planned_seeds)
    assert wrong(tmp_path) == []


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_published_reports_are_recomputed(report):
    own, shared = report / "metrics.csv", report.parent / "curves.csv"
    assert wrong(report, own if own.exists() else shared) == []


def test_a_wrong_number_is_found(tmp_path):
    write_report(tmp_path)
    for name, old, new in (
        ("verdict.json", '"outcome": "undecided"', '"outcome": "faster"'),
        ("effects.csv", "worse", "better"),
    ):
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new, 1))
    command = [sys.executable, "-m", "benchmarks.recompute", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.endswith(" 2 differ\n"), done.stdout[-500:]


@pytest.mark.parametrize("module", [independent, recompute])
def test_the_recomputation_imports_nothing_from_the_analysis(module):
    imports = re.findall(r"^ *(?:from|import) (\w+)", Path(module.__file__).read_text(), re.M)
    assert "numpy" in imports and not {"convergence", "diffusion"} & {*imports}
