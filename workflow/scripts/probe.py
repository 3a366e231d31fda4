"""Probe one checkpoint."""

from pathlib import Path

from convergence.jobs import job, use_torch
from convergence.tables import PROBE_COLUMNS, of_checkpoint, write_table
from diffusion.checkpoints import load_checkpoint
from diffusion.config import RunConfig
from diffusion.evaluation.probe import diverged_rows, probe, probe_images
from diffusion.files import read_json
from diffusion.schemes import scheme_tables

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    run, settings = RunConfig.model_validate_json(snakemake.params.run), snakemake.params.probe
    seed, batch_size, bins = int(snakemake.wildcards.seed), settings["batch_size"], settings["bins"]
    directory = Path(snakemake.input.images).parent
    images = probe_images(directory, run.dataset.held_out, settings["images"], batch_size, seed)
    about = read_json(Path(snakemake.input.provenance))
    if about["diverged"] is None:
        net = load_checkpoint(Path(snakemake.input.weights), device, about.get("sha256"))
        tables = None if run.scheme.timesteps.learned else scheme_tables(net.schedule, run.scheme, run.match)
        rows = probe(net.model, net.schedule, tables, images, bins, batch_size, seed, device)
    else:
        rows = diverged_rows(run.diffusion.timesteps, bins, about["diverged"])
    table = of_checkpoint(rows, snakemake.wildcards, about)
    table = table.assign(n=len(images), held_out=run.dataset.held_out > 0)
    write_table(table, Path(snakemake.output[0]), PROBE_COLUMNS)
