"""Computes the features and the statistics of the real images of one dataset, with one feature extractor."""

from pathlib import Path

from convergence.jobs import job, job_device
from convergence.schema import Evaluate
from diffusion.data.arrays import load_images
from diffusion.evaluation.extractors import load_extractor
from diffusion.evaluation.reference import make_reference, reference_key
from diffusion.files import read_json

with job(snakemake):
    device = job_device(snakemake, snakemake.resources.torch_threads)
    settings = Evaluate.model_validate_json(snakemake.params.evaluate)
    features, held_out = snakemake.params.features, snakemake.params.held_out
    images = load_images(Path(snakemake.input.images).parent, verify=True)
    sha256 = read_json(Path(snakemake.input.manifest))["sha256"]
    weights = settings.weights.get(features)
    extractor = load_extractor(features, device, *(weights.path, weights.sha256) if weights else ())
    key = reference_key(extractor, sha256, settings.reference, held_out, settings.reference_images)
    make_reference(images, extractor, key).save(snakemake.output[0])
