"""Samples one checkpoint, and evaluates the samples with every feature extractor of the study."""

from pathlib import Path

from convergence.jobs import job, job_device  # isort: split

import numpy as np
import torch

from convergence.provenance import check_images
from convergence.rows import COLUMNS, COLUMNS_WITH_AVERAGE, of_checkpoint, write_rows
from convergence.schema import Evaluate
from diffusion.averages import average_name, weights_files
from diffusion.checkpoints import load_checkpoint, preview, sample_checkpoint
from diffusion.config import Sample
from diffusion.data.arrays import load_images
from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.failure import failure
from diffusion.evaluation.reference import evaluate, load_reference, reference_key
from diffusion.files import check_free_space, read_json, save_npy

WEIGHTS = "weights.safetensors"
SOME_IMAGES = 1000  # enough to know how much the images of the dataset differ

with job(snakemake):
    device = job_device(snakemake, snakemake.resources.torch_threads)
    inputs, output = snakemake.input, snakemake.output
    sample = Sample.model_validate_json(snakemake.params.sample)
    settings = Evaluate.model_validate_json(snakemake.params.evaluate)
    provenance = read_json(Path(inputs.provenance))
    dataset = read_json(Path(inputs.manifest))
    check_images(Path(inputs.weights).parent, Path(inputs.manifest))

    images = load_images(Path(inputs.images).parent)[:SOME_IMAGES]
    kept = Path(output.metrics).with_name("samples.npy")
    names = [average_name(average) for average in settings.ema or ()]
    digests = provenance.get("averages", {})  # of the untrained net: none, all its averages are equal
    files = {name: weights_files(digests).get(name, WEIGHTS) for name in names or [""]}
    samples, reasons = {}, {}
    for file, digest in {file: digests.get(name, provenance.get("sha256")) for name, file in files.items()}.items():
        checkpoint = load_checkpoint(Path(inputs.weights).with_name(file), device, digest)
        if output.samples:
            check_free_space(kept, sample.images * 3 * checkpoint.image_size**2)
        samples[file] = sample_checkpoint(checkpoint, sample, device)
        reasons[file] = failure(provenance, samples[file], images, checkpoint.schedule.untrained_mse)
        del checkpoint  # the extractors need its memory
        torch.cuda.empty_cache()
    first = next(iter(samples.values()))
    preview(first, Path(output.preview))
    if output.samples:
        save_npy(kept, first)
    else:
        kept.unlink(missing_ok=True)  # of earlier settings

    rows = []
    for features, path in zip(settings.features, inputs.references, strict=True):
        weights = settings.weights.get(features)
        extractor = load_extractor(features, device, *(weights.path, weights.sha256) if weights else ())
        key = reference_key(
            extractor, dataset["sha256"], settings.reference, snakemake.params.held_out, settings.reference_images
        )
        reference = load_reference(path, key)
        estimates = {
            file: evaluate(extract_features(array, extractor), reference, settings.metrics, device)
            for file, array in samples.items()
        }
        for name, file in files.items():
            about = {"features": features, "ema": name}
            rows += [row._asdict() | about | {"reason": reasons[file] or row.reason} for row in estimates[file]]
    influences = [row["influences"] for row in rows if row["ema"] == next(iter(files))]  # of the first average
    save_npy(Path(output.influences), np.stack(influences))
    columns = COLUMNS_WITH_AVERAGE if names else COLUMNS
    write_rows(of_checkpoint(rows, snakemake.wildcards, provenance), Path(output.metrics), columns)
