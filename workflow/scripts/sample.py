"""Sample one checkpoint."""

from pathlib import Path

import numpy as np

from convergence.jobs import job, use_torch
from diffusion.checkpoints import load_checkpoint, preview, sample_checkpoint
from diffusion.config import Sample
from diffusion.files import read_json, sha256

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    about = read_json(Path(snakemake.input.provenance))
    samples = Path(snakemake.output.samples)
    checkpoint = load_checkpoint(Path(snakemake.input.weights), device, about.get("sha256"))
    sample_checkpoint(checkpoint, Sample.model_validate_json(snakemake.params.sample), samples, device)
    Path(snakemake.output.digest).write_text(sha256(samples))
    preview(np.load(samples, mmap_mode="r"), Path(snakemake.output.preview))
