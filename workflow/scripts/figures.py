"""Draw the curves, the samples and the schedules."""

from collections import defaultdict
from pathlib import Path

import pandas as pd

from diffusion.checkpoint import noise_schedule
from diffusion.config import RunConfig
from diffusion.gaussian import NoiseSchedule
from diffusion.training import Tables, scheme_tables
from workflow.figures import fid_curves, samples_grid
from workflow.jobs import job
from workflow.judge import read_curves
from workflow.schedules import draw_schedules
from workflow.tables import diverged

with job(snakemake):
    output = snakemake.output
    metrics = pd.read_csv(snakemake.input.metrics)
    speedups = pd.read_csv(snakemake.input.speedups)
    tables = [read_curves(Path(path)).query("study == @study") for study, path in snakemake.params.published.items()]
    published = pd.concat(tables) if tables else None
    fid_curves(metrics, [Path(output.curves), Path(output.curves_svg)], speedups=speedups, published=published)

    keys = ["study", "arm", "seed", "step"]
    without_samples = set(metrics.loc[diverged(metrics), keys].itertuples(index=False, name=None))
    several = len({study for study, *_ in snakemake.params.cells}) > 1
    grids: dict[str, dict[int, Path | None]] = defaultdict(dict)
    steps = {}
    for study, arm, seed, step, images, preview in snakemake.params.cells:
        shown = (study, arm, seed, step) not in without_samples
        grids[f"{study} {arm}" if several else arm][images] = Path(preview) if shown else None
        steps[images] = step
    samples_grid(grids, Path(output.samples), steps)

    studies: dict[str, tuple[NoiseSchedule, dict[str, Tables]]] = {}
    adaptive = []
    for study, arm, content in snakemake.params.runs:
        run = RunConfig.model_validate_json(content)
        schedule = noise_schedule(run.diffusion)
        studies.setdefault(study, (schedule, {}))[1][arm] = scheme_tables(schedule, run.scheme, run.match)
        if run.scheme.timesteps.learnt:
            adaptive.append((study, arm))
    draw_schedules(studies, [Path(output.schedules), Path(output.schedules_svg)], adaptive)
