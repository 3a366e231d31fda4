"""Compare the arms of one study: verdict.json, verdict.md, speedup.csv and the forest plot."""

import json
from pathlib import Path

from convergence import layout
from convergence.analysis.verdict import write_verdict
from convergence.figures.forest import draw_forest
from convergence.jobs import job
from convergence.provenance import changed_tables
from convergence.study_file import load_experiment
from convergence.tables import read_table

with job(snakemake):
    study = snakemake.wildcards.study
    warnings = [*snakemake.params.warnings, *changed_tables(load_experiment(layout.study_file(study)))]
    verdict = write_verdict(
        read_table(snakemake.input.metrics),
        read_table(snakemake.input.mechanism),
        study,
        json.loads(snakemake.params.compare),
        Path(snakemake.output.verdict).parent,
        warnings,
    )
    draw_forest(verdict.comparisons, [Path(snakemake.output.forest)])
