"""Probes one checkpoint: measures its loss and gradient noise in bins of timesteps."""

from pathlib import Path

from convergence.jobs import job, job_device
from convergence.provenance import check_images
from convergence.rows import PROBE_COLUMNS, of_checkpoint, write_rows
from convergence.schema import Probe
from diffusion.build import run_tables
from diffusion.checkpoints import load_checkpoint
from diffusion.config import RunConfig
from diffusion.evaluation.probe import diverged_rows, probe, probe_images
from diffusion.files import read_json

with job(snakemake):
    run = RunConfig.model_validate_json(snakemake.params.run)
    device = job_device(snakemake, run.train.threads)
    settings = Probe.model_validate_json(snakemake.params.probe)
    seed, held_out = int(snakemake.wildcards.seed), run.dataset.held_out
    directory = Path(snakemake.input.images).parent
    images = probe_images(directory, held_out, settings.images, settings.batch_size, seed)
    check_images(Path(snakemake.input.weights).parent, Path(snakemake.input.manifest))
    provenance = read_json(Path(snakemake.input.provenance))
    if provenance["diverged"] is None:
        net = load_checkpoint(Path(snakemake.input.weights), device, provenance.get("sha256"))
        tables = None if run.scheme.timesteps.learned else run_tables(run)
        sizes = settings.bins, settings.batch_size
        rows = probe(net.model, net.schedule, tables, images, *sizes, seed, device, run.train.precision)
    else:
        rows = diverged_rows(run.diffusion.timesteps, settings.bins, provenance["diverged"])
    probed = {"n": len(images), "held_out": held_out > 0}
    table = of_checkpoint([row | probed for row in rows], snakemake.wildcards, provenance)
    write_rows(table, Path(snakemake.output[0]), PROBE_COLUMNS)
