"""Samples one checkpoint, and evaluates the samples with every feature extractor of the study."""

from pathlib import Path

from convergence.jobs import job, job_device  # isort: split

import numpy as np
import torch

from convergence.provenance import check_images
from convergence.rows import of_checkpoint, write_rows
from convergence.schema import Evaluate
from diffusion.checkpoints import load_checkpoint, preview, sample_checkpoint
from diffusion.config import Sample
from diffusion.data.arrays import load_images
from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.failure import failure
from diffusion.evaluation.reference import evaluate, load_reference, reference_key
from diffusion.files import check_free_space, read_json, save_npy

SOME_IMAGES = 1000  # enough to know how much the images of the dataset differ

with job(snakemake):
    device = job_device(snakemake, snakemake.resources.torch_threads)
    inputs, output = snakemake.input, snakemake.output
    sample = Sample.model_validate_json(snakemake.params.sample)
    settings = Evaluate.model_validate_json(snakemake.params.evaluate)
    provenance = read_json(Path(inputs.provenance))
    dataset = read_json(Path(inputs.manifest))
    check_images(Path(inputs.weights).parent, Path(inputs.manifest))

    checkpoint = load_checkpoint(Path(inputs.weights), device, provenance.get("sha256"))
    kept = Path(output.metrics).with_name("samples.npy")
    if output.samples:
        check_free_space(kept, sample.images * 3 * checkpoint.image_size**2)
    samples = sample_checkpoint(checkpoint, sample, device)
    untrained_mse = checkpoint.schedule.untrained_mse
    del checkpoint  # the extractors need its memory
    torch.cuda.empty_cache()
    preview(samples, Path(output.preview))
    if output.samples:
        save_npy(kept, samples)
    else:
        kept.unlink(missing_ok=True)  # of earlier settings

    rows = []
    for name, path in zip(settings.features, inputs.references, strict=True):
        weights = settings.weights.get(name)
        extractor = load_extractor(name, device, *(weights.path, weights.sha256) if weights else ())
        key = reference_key(
            extractor, dataset["sha256"], settings.reference, snakemake.params.held_out, settings.reference_images
        )
        estimates = evaluate(extract_features(samples, extractor), load_reference(path, key), settings.metrics, device)
        rows += [row._asdict() | {"features": name} for row in estimates]
    save_npy(Path(output.influences), np.stack([row.pop("influences") for row in rows]))
    images = load_images(Path(inputs.images).parent)[:SOME_IMAGES]
    if reason := failure(provenance, samples, images, untrained_mse):
        rows = [row | {"reason": reason} for row in rows]
    write_rows(of_checkpoint(rows, snakemake.wildcards, provenance), Path(output.metrics))
