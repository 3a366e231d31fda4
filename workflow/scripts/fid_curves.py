"""Draw the curves of all selected studies in one figure."""

from pathlib import Path

import pandas as pd

from convergence.analysis.verdict import read_verdict
from convergence.figures.curves import fid_curves
from convergence.jobs import job
from convergence.tables import read_curves, read_table

with job(snakemake):
    metrics = pd.concat([read_table(path) for path in snakemake.input.metrics])
    comparisons = [c for path in snakemake.input.verdicts for c in read_verdict(path).comparisons]
    # A file of external curves may hold several studies; a panel shows only the file that its study names.
    external = [
        read_curves(Path(path), study).query("study == @study") for study, path in snakemake.params.external.items()
    ]
    external_curves = pd.concat(external) if external else None
    paths = [Path(path) for path in snakemake.output]
    fid_curves(metrics, paths, comparisons=comparisons, external_curves=external_curves)
