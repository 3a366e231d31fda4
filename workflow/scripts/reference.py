"""Features of the real images, once per dataset and extractor."""

from pathlib import Path

from convergence.jobs import job, use_torch
from diffusion.data.arrays import load_images
from diffusion.evaluation.extractors import load_extractor
from diffusion.evaluation.reference import make_reference, reference_key
from diffusion.files import read_json

with job(snakemake):
    params = snakemake.params
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    images = load_images(Path(snakemake.input.images).parent, verify=True)
    sha256 = read_json(Path(snakemake.input.manifest))["sha256"]
    extractor = load_extractor(params.features, device, **params.weights.get(params.features, {}))
    key = reference_key(extractor, sha256, **params.reference)
    make_reference(images, extractor, key).save(snakemake.output[0])
