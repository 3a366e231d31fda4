"""Compare the arms of one study: metrics.csv, mechanism.csv, verdict.json, verdict.md and speedup.csv."""

import json
from pathlib import Path

from convergence.jobs import job  # isort: split

import pandas as pd

from convergence import layout
from convergence.analysis.verdict import write_verdict
from convergence.provenance import changed_tables
from convergence.study_file import load_experiment
from convergence.tables import PROBE_COLUMNS, collect, read_table, write_table

with job(snakemake):
    source, output, params = snakemake.input, snakemake.output, snakemake.params
    study = snakemake.wildcards.study
    write_table(collect([Path(path) for path in source.metrics], params.arms), Path(output.metrics))
    probes = [read_table(path) for path in source.probes]
    table = pd.concat(probes, ignore_index=True) if probes else pd.DataFrame(columns=PROBE_COLUMNS)
    write_table(table, Path(output.mechanism), PROBE_COLUMNS)
    warnings = [*params.warnings, *changed_tables(load_experiment(layout.study_file(study)))]
    # From the tables as they are written, so that everybody can compute the verdict again.
    write_verdict(
        read_table(output.metrics),
        read_table(output.mechanism),
        study,
        json.loads(params.compare),
        Path(output.verdict).parent,
        warnings,
    )
