"""Features of the real images, once per dataset and extractor."""

from pathlib import Path

from diffusion.data import load_images
from diffusion.evaluation import make_reference, reference_key
from diffusion.features import load_extractor
from diffusion.files import read_json
from workflow.jobs import job, use_torch

with job(snakemake):
    params = snakemake.params
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    images = load_images(Path(snakemake.input.images).parent, verify=True)
    sha256 = read_json(Path(snakemake.input.manifest))["sha256"]
    extractor = load_extractor(params.features, device, **params.weights.get(params.features, {}))
    key = reference_key(extractor, sha256, **params.reference)
    make_reference(images, extractor, key).save(snakemake.output[0])
