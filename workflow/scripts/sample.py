"""Sample one checkpoint."""

from pathlib import Path

from convergence.jobs import job, use_torch
from diffusion.checkpoints import load_checkpoint, preview, sample_checkpoint
from diffusion.config import Sample
from diffusion.files import read_json, save_npy, sha256

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    about = read_json(Path(snakemake.input.provenance))
    samples = Path(snakemake.output.samples)
    checkpoint = load_checkpoint(Path(snakemake.input.weights), device, about.get("sha256"))
    images = sample_checkpoint(checkpoint, Sample.model_validate_json(snakemake.params.sample), device)
    save_npy(samples, images)
    Path(snakemake.output.digest).write_text(sha256(samples))
    preview(images, Path(snakemake.output.preview))
