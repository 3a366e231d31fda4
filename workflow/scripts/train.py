"""Train one segment of one run."""

from pathlib import Path

from diffusion.config import RunConfig
from diffusion.data import load_images
from diffusion.training import train_segment
from workflow.jobs import alone_in, job, use_torch
from workflow.layout import drop_older_states
from workflow.provenance import write_provenance

with job(snakemake):
    run = RunConfig.model_validate_json(snakemake.params.run)
    device = use_torch(run.train.threads, snakemake.resources.gpu)
    directory = Path(snakemake.output.state).parent
    previous = Path(snakemake.input.previous) if snakemake.input.previous else None
    images = load_images(Path(snakemake.input.images).parent)
    with alone_in(directory.parent):
        if previous:
            drop_older_states(previous)
        seed, step = int(snakemake.wildcards.seed), int(snakemake.wildcards.step)
        state = train_segment(run, seed, images, previous, directory, step, device)
    write_provenance(
        Path(snakemake.output.provenance),
        device,
        step=state.step,
        images=state.step * run.train.batch_size,
        seconds=round(state.seconds, 3),
        diverged=state.diverged,
        config_hash=run.hash8,
    )
