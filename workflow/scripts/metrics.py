"""Collect the metrics of the checkpoints of one study into one table."""

from pathlib import Path

from convergence.jobs import job
from convergence.tables import collect, write_table

with job(snakemake):
    paths = [Path(path) for path in snakemake.input]
    write_table(collect(paths, snakemake.params.arms), Path(snakemake.output[0]))
