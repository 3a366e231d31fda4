"""Evaluate the samples of one checkpoint with every extractor of the study."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from diffusion.evaluation import evaluate, load_reference, reference_key
from diffusion.features import extract_features, load_extractor
from workflow.jobs import job, use_torch
from workflow.tables import write_table

with job(snakemake):
    device = use_torch(snakemake.threads, snakemake.resources.gpu)
    samples = np.load(snakemake.input.samples, mmap_mode="r")
    about = json.loads(Path(snakemake.input.provenance).read_text())
    dataset = json.loads(Path(snakemake.input.manifest).read_text())
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
