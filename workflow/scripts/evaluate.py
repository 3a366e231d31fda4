"""Evaluate the samples of one checkpoint with every extractor of the study."""

from pathlib import Path

import pandas as pd

from diffusion.evaluation import evaluate, load_reference, reference_key
from diffusion.features import extract_features, load_extractor
from diffusion.files import check_unchanged, read_json
from diffusion.prepare import read_images
from workflow.jobs import job, use_torch
from workflow.tables import write_table

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    samples = read_images(Path(snakemake.input.samples))
    check_unchanged(Path(snakemake.input.samples), Path(snakemake.input.digest).read_text())
    about = read_json(Path(snakemake.input.provenance))
    dataset = read_json(Path(snakemake.input.manifest))
    tables = []
    params = snakemake.params
    for name, path in zip(params.features, snakemake.input.references, strict=True):
        extractor = load_extractor(name, device, **params.weights.get(name, {}))
        reference = load_reference(path, reference_key(extractor, dataset["sha256"], **params.reference))
        rows = evaluate(extract_features(samples, extractor), reference, params.metrics)
        tables.append(pd.DataFrame(rows).assign(features=name))
    table = pd.concat(tables).assign(
        study=snakemake.wildcards.study,
        arm=snakemake.wildcards.arm.rsplit("-", 1)[0],
        seed=int(snakemake.wildcards.seed),
        **{key: about[key] for key in ("step", "images", "seconds")},
    )
    if about["diverged"] is not None:
        table["reason"] = f"diverged at step {about['diverged']}"
    write_table(table, Path(snakemake.output[0]))
