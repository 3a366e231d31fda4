"""Estimates the time and memory that each job requests from a cluster.

The estimates are generous and assume slow hardware. A training job that reaches its time limit saves its state, and the
next attempt resumes from this state.

In all functions, `gpus` is the number of GPUs per process, 0 or 1. Without a GPU, a process computes in `threads` CPU
threads. Functions without the argument `threads` use the setting `train.threads` of the run.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from convergence.schema import Evaluate, Experiment, Probe
from diffusion.config import Dataset, RunConfig
from diffusion.errors import InputError
from diffusion.net_size import net_size
from diffusion.nets.size import Size

# Multiply-adds per second of one CPU thread and of one GPU (bf16; fp32): about a quarter of an A100.
CPU_SPEED, GPU_SPEED, GPU_SPEED_FP32 = 5e9, 2e13, 5e12
# Overhead of one call of the net.
CALL_SECONDS = 0.1
# Seconds per image: reading and resizing, features on one CPU thread, features on a GPU.
READ_SECONDS, CPU_FEATURE_SECONDS, GPU_FEATURE_SECONDS = 0.2, 0.25, 0.01
PAIR_SECONDS = 5e-7  # per pair of images, for all metrics
OPENMOJI_IMAGES = 5_000
NAMED_IMAGES = 100_000  # of a dataset that is not downloaded yet: more than most suitable ones have
FEATURES = 2048
COST_STEPS = 48  # of each run that is timed, at most (diffusion/training/timing.py)
START_MINUTES, LONGEST_MINUTES = 10, 24 * 60
BASE_MEGABYTES = 4_000
SAMPLE_BATCH = 64  # images at once on a CPU, if the study does not set sample.batch_size
FACTOR = 2  # safety margin of time and memory


class Request(NamedTuple):
    """Time in minutes, and host memory in megabytes, that one job requests."""

    minutes: int
    megabytes: int


def dataset(config: Dataset) -> Request:
    """Returns the time and memory of a job that prepares a dataset."""
    count = count_images(config)
    return _request(count * READ_SECONDS, _megabytes(_pixels(count, config)))


def count_images(config: Dataset) -> int:
    """Returns the number of images in the source of a dataset.

    The images of a folder or zip file are counted; the result is 0 if the folder or zip file cannot be read. For all
    other sources, the result is a fixed estimate that is larger than most datasets.
    """
    if config.source != "folder":
        return OPENMOJI_IMAGES if config.source == "openmoji" else NAMED_IMAGES
    from diffusion.data.files import is_image, open_source  # imports Pillow, which is slow

    try:
        with open_source(config.path) as files:
            return sum(map(is_image, files))
    except InputError:
        return 0


def train(run: RunConfig, steps: int, images: int, gpus: int, processes: int) -> Request:
    """Returns the time and memory of a job that trains `steps` steps on a dataset of `images` images.

    The memory covers all `processes`, which divide each batch among themselves.
    """
    size, settings = net_size(run.model, run.dataset.image_size), run.train
    per_process = math.ceil(settings.batch_size / processes)
    micro_batch = min(settings.micro_batch or per_process, per_process)
    seconds = 3 * _seconds(size, per_process, micro_batch, settings.threads, gpus, settings.precision == "fp32")
    # Weights, their averages and the two moments of AdamW, twice while the state is saved or loaded.
    copies = 2 * (3 + len(settings.averages))
    memory = copies * 4 * size.parameters + 3 * _pixels(images, run.dataset) + _activations(size, micro_batch, gpus)
    return _request(steps * seconds, processes * _megabytes(memory))


def cost(runs: Sequence[RunConfig], images: int, gpus: int, processes: int) -> Request:
    """Returns the time and memory of a job that times one process of each run, one run after another."""
    requests = [train(run, COST_STEPS, images, gpus, processes) for run in runs]
    minutes = START_MINUTES + sum(request.minutes - START_MINUTES for request in requests)
    return Request(min(minutes, LONGEST_MINUTES), max(request.megabytes for request in requests) // processes)


def reference(settings: Evaluate, images: int, threads: int, gpus: int) -> Request:
    """Returns the time and memory of a job that computes reference features of a dataset of `images` images."""
    count = min(settings.reference_images or images, images)
    return _request(_feature_seconds(count, threads, gpus) + PAIR_SECONDS * count**2, _megabytes(_features(count)))


def evaluate(experiment: Experiment, run: RunConfig, images: int, gpus: int) -> Request:
    """Returns the time and memory of a job that samples each average of one checkpoint and evaluates the samples.

    The samples stay in memory. They are compared with a dataset of `images` images, once per feature extractor.
    """
    settings, threads = experiment.sample, run.train.threads
    size, batch = net_size(run.model, run.dataset.image_size), settings.batch_size or SAMPLE_BATCH
    sampling = settings.calls * _seconds(size, settings.images, batch, threads, gpus, settings.precision == "fp32")
    total = settings.images + min(experiment.evaluate.reference_images or images, images)
    per_extractor = _feature_seconds(settings.images, threads, gpus) + PAIR_SECONDS * total**2
    memory = max(8 * size.parameters + _activations(size, batch, gpus), _features(total))
    averages = len(experiment.evaluate.ema or (None,))
    seconds = averages * (sampling + len(experiment.evaluate.features) * per_extractor)
    return _request(seconds, _megabytes(memory + averages * _pixels(settings.images, run.dataset)))


def probe(run: RunConfig, settings: Probe, gpus: int) -> Request:
    """Returns the time and memory of a job that probes one checkpoint."""
    size = net_size(run.model, run.dataset.image_size)
    seconds = 4 * _seconds(size, settings.images, settings.batch_size, run.train.threads, gpus, fp32=True)
    # Sums of gradients are float64.
    memory = 64 * size.parameters + _activations(size, settings.batch_size, gpus)
    return _request(settings.bins * seconds, _megabytes(memory))


def gradient_bytes(run: RunConfig, images: int, fp32: bool) -> int:
    """Returns the memory of a GPU that the gradient of `images` images and the state of training need, in bytes."""
    size = net_size(run.model, run.dataset.image_size)
    # fp32 weights, two moments and the gradient, a copy of the weights and of the gradient for the net; averages.
    copies = 5 + len(run.train.averages)
    return 4 * copies * size.parameters + (4 if fp32 else 2) * size.activations * images


def images_in(path: str, image_size: int) -> int:
    """Returns the number of images in a prepared dataset, computed from the size of its file images.npy.

    Args:
        path: path of images.npy.
        image_size: height and width of the images in pixels.

    Raises:
        FileNotFoundError: the dataset is not prepared yet. Snakemake then calls this function again later.
    """
    return os.path.getsize(path) // (3 * image_size**2)


def _seconds(size: Size, images: int, batch: int, threads: int, gpus: int, fp32: bool) -> float:
    """Returns the seconds of a forward pass over `images` images in batches."""
    speed = (GPU_SPEED_FP32 if fp32 else GPU_SPEED) if gpus else threads * CPU_SPEED
    return math.ceil(images / batch) * CALL_SECONDS + images * size.multiply_adds / speed


def _feature_seconds(images: int, threads: int, gpus: int) -> float:
    return images * (GPU_FEATURE_SECONDS if gpus else CPU_FEATURE_SECONDS / threads)


def _activations(size: Size, images: int, gpus: int) -> int:
    """Returns the bytes of activations in host memory; on a GPU they are in its own memory."""
    return 0 if gpus else 4 * size.activations * images


def _features(images: int) -> int:
    return 8 * FEATURES * images


def _pixels(images: int, config: Dataset) -> int:
    return 3 * images * config.image_size**2


def _megabytes(memory: int) -> int:
    return BASE_MEGABYTES + math.ceil(FACTOR * memory / 1e6)


def _request(seconds: float, megabytes: int) -> Request:
    return Request(min(START_MINUTES + math.ceil(FACTOR * seconds / 60), LONGEST_MINUTES), megabytes)
