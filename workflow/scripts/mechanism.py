"""Collect the probes of one study into one table, and draw it."""

from pathlib import Path

import pandas as pd

from convergence.figures.mechanism import draw_mechanism
from convergence.jobs import job
from convergence.tables import PROBE_COLUMNS, read_table, write_table

with job(snakemake):
    probes = [read_table(path) for path in snakemake.input]
    table = pd.concat(probes, ignore_index=True) if probes else pd.DataFrame(columns=PROBE_COLUMNS)
    write_table(table, Path(snakemake.output.table), PROBE_COLUMNS)
    draw_mechanism(table, snakemake.params.compare, [Path(snakemake.output.figure)])
