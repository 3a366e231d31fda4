"""Features of the real images, once per dataset and extractor."""

import json
from pathlib import Path

from diffusion.data import load_images
from diffusion.evaluation import make_reference
from workflow.jobs import job, use_torch

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    images = load_images(Path(snakemake.input.images).parent)
    sha256 = json.loads(Path(snakemake.input.manifest).read_text())["sha256"]
    count = snakemake.params.reference_images or len(images)
    make_reference(images, snakemake.params.features, count, sha256, device).save(snakemake.output[0])
