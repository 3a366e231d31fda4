"""Sample one checkpoint."""

from pathlib import Path

import numpy as np

from convergence.jobs import job, use_torch
from diffusion.checkpoints import load_checkpoint, preview, sample_checkpoint
from diffusion.config import Sample
from diffusion.files import atomic_write, read_json, sha256

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    about = read_json(Path(snakemake.input.provenance))
    samples = Path(snakemake.output.samples)
    checkpoint = load_checkpoint(Path(snakemake.input.weights), device, about.get("sha256"))
    images = sample_checkpoint(checkpoint, Sample.model_validate_json(snakemake.params.sample), device)
    with atomic_write(samples) as file:
        np.save(file, images)
    Path(snakemake.output.digest).write_text(sha256(samples))
    preview(images, Path(snakemake.output.preview))
