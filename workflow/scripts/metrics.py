"""Put the metrics of all chosen studies into one table."""

from pathlib import Path

import pandas as pd

from convergence.jobs import job
from convergence.tables import read_table, write_table

with job(snakemake):
    table = pd.concat([read_table(path) for path in snakemake.input], ignore_index=True)
    write_table(table, Path(snakemake.output[0]))
