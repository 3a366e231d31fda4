"""Draw the curves, the samples and the schedules."""

from pathlib import Path

import pandas as pd

from convergence.figures.curves import fid_curves
from convergence.figures.samples import preview_grid, samples_grid
from convergence.figures.schedules import draw_schedules
from convergence.jobs import job
from convergence.tables import read_curves, read_table
from diffusion.config import RunConfig

with job(snakemake):
    output, params = snakemake.output, snakemake.params
    metrics, speedups = read_table(snakemake.input.metrics), read_table(snakemake.input.speedups)
    tables = [read_curves(Path(path), study).query("study == @study") for study, path in params.published.items()]
    published = pd.concat(tables) if tables else None
    fid_curves(metrics, [Path(output.curves), Path(output.curves_svg)], speedups=speedups, published=published)
    grids, steps = preview_grid(params.cells, metrics)
    samples_grid(grids, Path(output.samples), steps)
    runs = [(study, arm, RunConfig.model_validate_json(content)) for study, arm, content in params.runs]
    draw_schedules(runs, [Path(output.schedules), Path(output.schedules_svg)])
