"""Evaluate the samples of one checkpoint with every extractor of the study."""

from pathlib import Path

from convergence.jobs import job, use_torch
from convergence.tables import of_checkpoint, write_table
from diffusion.data.folder import read_images
from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.reference import evaluate, load_reference, reference_key
from diffusion.files import check_unchanged, read_json

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    samples = read_images(Path(snakemake.input.samples))
    check_unchanged(Path(snakemake.input.samples), Path(snakemake.input.digest).read_text())
    about = read_json(Path(snakemake.input.provenance))
    dataset = read_json(Path(snakemake.input.manifest))
    rows = []
    params = snakemake.params
    for name, path in zip(params.features, snakemake.input.references, strict=True):
        extractor = load_extractor(name, device, **params.weights.get(name, {}))
        reference = load_reference(path, reference_key(extractor, dataset["sha256"], **params.reference))
        found = evaluate(extract_features(samples, extractor), reference, params.metrics)
        rows += [row._asdict() | {"features": name} for row in found]
    table = of_checkpoint(rows, snakemake.wildcards, about)
    if about["diverged"] is not None:
        table["reason"] = f"diverged at step {about['diverged']}"
    write_table(table, Path(snakemake.output[0]))
