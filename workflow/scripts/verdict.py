"""Compares the arms of one study, and writes the verdict (JSON, Markdown) and its tables (CSV)."""

from pathlib import Path

from convergence.jobs import job  # isort: split

import pandas as pd

from convergence.analysis.cost import COLUMNS, cost_table, costs
from convergence.analysis.mechanism import update_rows
from convergence.analysis.verdict import judge, write_verdict
from convergence.failures import without_failed_runs
from convergence.provenance import changed_tables, stale_runs
from convergence.rows import PROBE_COLUMNS, ROUND_COLUMNS
from convergence.study_plan import StudyPlan, plan_changes
from convergence.tables import (
    collect,
    columns_of,
    of_average,
    read_checkpoint,
    read_influences,
    read_table,
    write_table,
)
from diffusion.build import constant_tables
from diffusion.config import RunConfig
from diffusion.evaluation.probe import diverged_rows
from diffusion.files import read_json

with job(snakemake):
    source, output, params = snakemake.input, snakemake.output, snakemake.params
    study = snakemake.wildcards.study
    metrics = collect([Path(path) for path in source.metrics], params.arms, params.rows)
    write_table(metrics, Path(output.metrics), columns_of(metrics))
    probes = pd.DataFrame(columns=PROBE_COLUMNS)
    if source.probes:
        rows = [(row["timesteps"], row["metric"]) for row in diverged_rows(*params.bins, step=0)]
        tables = [read_checkpoint(path, PROBE_COLUMNS, rows) for path in source.probes]
        norms = [update_rows(probe, read_json(Path(path))) for probe, path in zip(tables, source.probed, strict=True)]
        probes = without_failed_runs(pd.concat([*tables, *norms], ignore_index=True), of_average(metrics))
    write_table(probes, Path(output.mechanism), PROBE_COLUMNS)
    plan, current = (StudyPlan.model_validate_json(text) if text else None for text in (params.plan, params.current))
    cost = cost_table(read_table(source.cost, ROUND_COLUMNS), study, plan.baseline if plan else None)
    write_table(cost, Path(output.cost), COLUMNS)
    newest = [(arm, read_json(Path(path))) for arm, path in zip(params.trained, source.provenances, strict=True)]
    runs = {arm: RunConfig.model_validate_json(content) for arm, content in params.runs}
    warnings = [*stale_runs(study, newest), *changed_tables(study, newest, runs), *params.few_images]
    # From the tables as they are written, so that everybody can compute the verdict again.
    metrics, probes = read_table(output.metrics), read_table(output.mechanism, PROBE_COLUMNS)
    first = of_average(metrics)  # the average whose influences are known
    counts = first["n"].to_numpy().reshape(len(source.influences), -1)
    influences = [
        influences
        for path, n in zip(source.influences, counts, strict=True)
        for influences in read_influences(path, len(n), int(n[0]))
    ]
    metrics["influences"] = pd.Series(influences, first.index)
    changes = plan_changes(plan, current) if plan and current else ()
    # Gradients of nets that predict different things, or of which one predicts a variance, are not comparable.
    like = runs[plan.baseline] if plan else None
    comparable = {
        arm: run for arm, run in runs.items() if like and (run.diffusion, run.model) == (like.diffusion, like.model)
    }
    tables = constant_tables(comparable)
    verdict = judge(metrics, probes, study, plan, changes, costs(cost), tables=tables, warnings=warnings)
    write_verdict(verdict, Path(output.verdict).parent)
