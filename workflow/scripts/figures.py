"""Draws the curves, sample previews, schedules, comparisons and probes of one study."""

from pathlib import Path

from convergence.jobs import job  # isort: split

import pandas as pd

from convergence.analysis.verdict import read_verdict
from convergence.figures.curves import fid_curves, hour_curves
from convergence.figures.forest import draw_forest
from convergence.figures.mechanism import draw_mechanism
from convergence.figures.samples import preview_grid, samples_grid
from convergence.figures.schedules import draw_schedules
from convergence.tables import of_average, read_curves, read_table
from diffusion.config import RunConfig
from diffusion.data.arrays import load_images

with job(snakemake):
    study, output, params = snakemake.wildcards.study, snakemake.output, snakemake.params
    verdict = read_verdict(snakemake.input.verdict)
    metrics = of_average(read_table(snakemake.input.metrics), verdict.plan.ema if verdict.plan else None)
    external = [read_curves(Path(path), study) for path in snakemake.input.external]
    runs = {arm: RunConfig.model_validate_json(content) for arm, content in params.runs}
    fid_curves(
        metrics,
        [Path(output.curves), Path(output.curves_svg)],
        comparisons=verdict.comparisons,
        external_curves=pd.concat(external) if external else None,
        arms={study: runs},
    )
    hour_curves(metrics, [Path(output.hours)], verdict.costs, verdict.comparisons, {study: runs})
    grids, steps = preview_grid(params.cells, metrics)
    real = load_images(Path(snakemake.input.manifest).parent)
    samples_grid(grids, steps, params.seed, real, Path(output.samples))
    draw_forest(verdict.primary, [Path(output.forest)])
    draw_mechanism(study, verdict.mechanism, list(runs), [Path(output.mechanism)])
    draw_schedules(study, runs, [Path(output.schedules), Path(output.schedules_svg)])
