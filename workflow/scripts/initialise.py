"""Writes the untrained net of one seed."""

from pathlib import Path

from convergence.jobs import job
from convergence.provenance import environment, source_hash, write_provenance
from diffusion.config import Initial
from diffusion.files import sha256
from diffusion.training.state import initial_weights

with job(snakemake):
    weights, provenance = (Path(path) for path in snakemake.output)
    origin, source = environment(), source_hash()
    initial = Initial.model_validate_json(snakemake.params.initial)
    initial_weights(initial, int(snakemake.wildcards.seed), weights)
    facts = {"step": 0, "images": 0, "seconds": 0.0, "startup_seconds": 0.0, "diverged": None, "device": "cpu"}
    write_provenance(provenance, **facts, **origin, sha256=sha256(weights), source_hash=source)
