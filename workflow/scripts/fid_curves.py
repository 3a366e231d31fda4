"""Draw the curves of all selected studies in one figure."""

from pathlib import Path

import pandas as pd

from convergence.figures.curves import fid_curves
from convergence.jobs import job
from convergence.tables import read_curves, read_table

with job(snakemake):
    metrics = pd.concat([read_table(path) for path in snakemake.input.metrics])
    speedups = [read_table(path) for path in snakemake.input.speedups]
    # A table without rows, of a study that compares nothing, has columns without types.
    speedups = [table for table in speedups if len(table)] or speedups
    # A file of external curves may hold several studies; a panel shows only the file that its study names.
    external = [
        read_curves(Path(path), study).query("study == @study") for study, path in snakemake.params.external.items()
    ]
    external_curves = pd.concat(external) if external else None
    paths = [Path(path) for path in snakemake.output]
    fid_curves(metrics, paths, speedups=pd.concat(speedups), external_curves=external_curves)
