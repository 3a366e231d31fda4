"""Compare the arms of one study: metrics.csv, mechanism.csv, verdict.json, verdict.md and speedup.csv."""

import json
from pathlib import Path

import pandas as pd

from convergence.analysis.verdict import judge, write_verdict
from convergence.jobs import job
from convergence.provenance import changed_tables, stale_runs
from convergence.tables import PROBE_COLUMNS, collect, read_table, write_table
from diffusion.config import RunConfig
from diffusion.files import read_json

with job(snakemake):
    source, output, params = snakemake.input, snakemake.output, snakemake.params
    study = snakemake.wildcards.study
    write_table(collect([Path(path) for path in source.metrics], params.arms), Path(output.metrics))
    tables = [read_table(path) for path in source.probes]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=PROBE_COLUMNS)
    write_table(table, Path(output.mechanism), PROBE_COLUMNS)
    newest = [(arm, read_json(Path(path))) for arm, path in zip(params.trained, source.provenances, strict=True)]
    runs = {arm: RunConfig.model_validate_json(content) for arm, content in params.runs}
    warnings = [*stale_runs(study, newest), *changed_tables(study, newest, runs)]
    # From the tables as they are written, so that everybody can compute the verdict again.
    metrics, probes = read_table(output.metrics), read_table(output.mechanism)
    write_verdict(judge(metrics, probes, study, json.loads(params.compare), warnings), Path(output.verdict).parent)
