"""Times the training steps of all arms of one study, in turns."""

import platform
from pathlib import Path

from convergence.jobs import job, job_device  # isort: split

import torch

from convergence.rows import ROUND_COLUMNS, of_rounds, write_rows
from diffusion.config import RunConfig
from diffusion.data.arrays import load_images
from diffusion.training.timing import time_steps

with job(snakemake):
    arms, settings = zip(*snakemake.params.runs, strict=True)
    runs = [RunConfig.model_validate_json(content) for content in settings]
    device = job_device(snakemake, None)
    images = load_images(Path(snakemake.input.images).parent, verify=True)
    seconds = time_steps(runs, images, device, snakemake.resources.processes)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    write_rows(of_rounds(seconds, arms, name), Path(snakemake.output[0]), ROUND_COLUMNS)
