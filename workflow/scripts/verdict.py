"""Compare the arms of each study: the table of speed-ups, the verdict in words, the forest plot."""

from pathlib import Path

import pandas as pd

from diffusion.files import replacing
from workflow.forest import draw_forest
from workflow.jobs import job
from workflow.mechanism import changes
from workflow.statistics import speedup_table
from workflow.verdict import verdict_text

with job(snakemake):
    metrics = pd.read_csv(snakemake.input.metrics)
    probes = pd.read_csv(snakemake.input.mechanism)
    comparisons = snakemake.params.comparisons
    table = speedup_table(metrics, {study: compare for study, compare in comparisons.items() if compare})
    with replacing(Path(snakemake.output.speedups)) as file:
        table.to_csv(file, index=False)
    with replacing(Path(snakemake.output.verdict)) as file:
        file.write(verdict_text(metrics, table, changes(probes, comparisons), comparisons).encode())
    draw_forest(table, [Path(snakemake.output.forest)])
