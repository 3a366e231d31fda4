"""Compare the arms of one study: verdict.json, verdict.md, speedup.csv and the forest plot."""

import json
from pathlib import Path

from convergence.analysis.verdict import write_verdict
from convergence.figures.forest import draw_forest
from convergence.jobs import job
from convergence.tables import read_table

with job(snakemake):
    verdict = write_verdict(
        read_table(snakemake.input.metrics),
        read_table(snakemake.input.mechanism),
        snakemake.wildcards.study,
        json.loads(snakemake.params.compare),
        Path(snakemake.output.verdict).parent,
        snakemake.params.warnings,
    )
    draw_forest(verdict.comparisons, [Path(snakemake.output.forest)])
