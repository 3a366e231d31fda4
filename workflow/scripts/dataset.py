"""Prepares one dataset."""

from pathlib import Path

from convergence.jobs import job  # isort: split

from pydantic import TypeAdapter

from convergence import layout
from diffusion.config import Dataset, Folder, OpenMoji, Torchvision
from diffusion.data.folder import prepare_folder
from diffusion.data.named import prepare_huggingface, prepare_torchvision
from diffusion.data.openmoji import prepare_openmoji

with job(snakemake):
    dataset = TypeAdapter(Dataset).validate_json(snakemake.params.dataset)
    directory = Path(snakemake.output.images).parent
    if isinstance(dataset, OpenMoji):
        prepare_openmoji(directory, dataset.image_size)
    elif isinstance(dataset, Folder):
        prepare_folder(directory, dataset.path, dataset.image_size, dataset.pad)
    elif isinstance(dataset, Torchvision):
        prepare_torchvision(directory, dataset.name, dataset.splits, layout.DOWNLOADS, dataset.image_size, dataset.pad)
    else:
        prepare_huggingface(
            directory, dataset.name, dataset.split, dataset.column, dataset.image_size, dataset.pad, dataset.revision
        )
