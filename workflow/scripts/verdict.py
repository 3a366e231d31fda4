"""Compare the arms of one study: metrics.csv, mechanism.csv, verdict.json, verdict.md and speedup.csv."""

import json
from pathlib import Path

import pandas as pd

from convergence import layout
from convergence.analysis.verdict import write_verdict
from convergence.failures import without_failed_runs
from convergence.jobs import job
from convergence.provenance import changed_tables
from convergence.sizes import few_images
from convergence.study_file import load_experiment
from convergence.tables import PROBE_COLUMNS, collect, read_checkpoint, read_table, write_table
from diffusion.evaluation.probe import diverged_rows

with job(snakemake):
    source, output, params = snakemake.input, snakemake.output, snakemake.params
    study = snakemake.wildcards.study
    metrics = collect([Path(path) for path in source.metrics], params.arms, params.rows)
    write_table(metrics, Path(output.metrics))
    probes = pd.DataFrame(columns=PROBE_COLUMNS)
    if source.probes:
        rows = [(row["timesteps"], row["metric"]) for row in diverged_rows(*params.bins, step=0)]
        tables = [read_checkpoint(path, PROBE_COLUMNS, rows) for path in source.probes]
        probes = without_failed_runs(pd.concat(tables, ignore_index=True), metrics)
    write_table(probes, Path(output.mechanism), PROBE_COLUMNS)
    experiment = load_experiment(layout.study_file(study))
    warnings = [*params.warnings, *changed_tables(experiment), *few_images(experiment)]
    # From the tables as they are written, so that everybody can compute the verdict again.
    write_verdict(
        read_table(output.metrics),
        read_table(output.mechanism, PROBE_COLUMNS),
        study,
        json.loads(params.compare),
        Path(output.verdict).parent,
        warnings,
    )
