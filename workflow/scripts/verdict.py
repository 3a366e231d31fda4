"""Compare the arms of each study: the table of speed-ups, the verdict in words, the forest plot."""

from pathlib import Path

from convergence.analysis.verdict import write_verdict
from convergence.jobs import job
from convergence.tables import read_table

with job(snakemake):
    output = snakemake.output
    write_verdict(
        read_table(snakemake.input.metrics),
        read_table(snakemake.input.mechanism),
        snakemake.params.comparisons,
        *map(Path, (output.speedups, output.verdict, output.forest)),
    )
