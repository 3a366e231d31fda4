"""Prepare one dataset."""

from pathlib import Path

from pydantic import TypeAdapter

from convergence.jobs import job
from diffusion.config import Dataset, Folder, OpenMoji, Torchvision
from diffusion.data.folder import prepare_folder
from diffusion.data.named import prepare_huggingface, prepare_torchvision
from diffusion.data.openmoji import prepare_openmoji

DATA = Path("data")  # where torchvision finds its datasets, or puts them

with job(snakemake):
    of = TypeAdapter(Dataset).validate_json(snakemake.params.dataset)
    directory = Path(snakemake.output.images).parent
    if isinstance(of, OpenMoji):
        prepare_openmoji(directory, of.image_size)
    elif isinstance(of, Folder):
        prepare_folder(directory, of.path, of.image_size, of.pad)
    elif isinstance(of, Torchvision):
        prepare_torchvision(directory, of.name, of.splits, DATA, of.image_size, of.pad)
    else:
        prepare_huggingface(directory, of.name, of.split, of.column, of.image_size, of.pad, of.revision)
