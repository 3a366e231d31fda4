"""Draws the metric of one study against the width of the averages of the weights."""

from pathlib import Path

from convergence.jobs import job  # isort: split

from convergence.figures.averages import draw_averages
from convergence.tables import read_table
from diffusion.averages import average_name, relative_width
from diffusion.config import RunConfig

with job(snakemake):
    metrics = read_table(snakemake.input.metrics)
    last = int(metrics["step"].max())
    trains = {arm: RunConfig.model_validate_json(content).train for arm, content in snakemake.params.runs}
    widths = {
        (arm, average_name(average)): relative_width(average, last, train.ema_warmup)
        for arm, train in trains.items()
        for average in train.averages
    }
    draw_averages(metrics, widths, [Path(snakemake.output[0])])
