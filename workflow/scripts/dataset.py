"""Prepare one dataset."""

from pathlib import Path

from pydantic import TypeAdapter

from diffusion.config import Dataset, OpenMoji
from diffusion.data import prepare_folder, prepare_openmoji
from workflow.jobs import job

with job(snakemake):
    dataset = TypeAdapter(Dataset).validate_json(snakemake.params.dataset)
    directory = Path(snakemake.output.images).parent
    if isinstance(dataset, OpenMoji):
        prepare_openmoji(directory, dataset.image_size)
    else:
        prepare_folder(directory, dataset.path, dataset.image_size)
