"""Draw the curves and the samples."""

from collections import defaultdict
from pathlib import Path

import pandas as pd

from workflow.figures import fid_curves, samples_grid
from workflow.jobs import job

with job(snakemake):
    output = snakemake.output
    fid_curves(pd.read_csv(snakemake.input.metrics), [Path(output.curves), Path(output.curves_svg)])
    grids: dict[str, dict[int, Path | None]] = defaultdict(dict)
    steps = {}
    for label, step, images, preview in snakemake.params.cells:
        grids[label][images] = Path(preview)
        steps[images] = step
    samples_grid(grids, Path(output.samples), steps)
