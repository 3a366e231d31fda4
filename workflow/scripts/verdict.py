"""Compare the arms of each study: the table of speed-ups, the verdict in words, the forest plot."""

from pathlib import Path

import pandas as pd

from workflow.jobs import job
from workflow.judge import write_verdict

with job(snakemake):
    output = snakemake.output
    write_verdict(
        pd.read_csv(snakemake.input.metrics),
        pd.read_csv(snakemake.input.mechanism),
        snakemake.params.comparisons,
        *map(Path, (output.speedups, output.verdict, output.forest)),
    )
