"""What jobs ask a cluster for: time and memory, from the size of what they work on.

Estimates for slow hardware, with room to spare: a job that asks for more is refused or waits longer, and one that
meets its limit is not lost (a training job saves, ends, and goes on when it is tried again).

Everywhere `gpus` is 0 or 1, that of one process, which computes in `threads` (of a run: `train.threads`) where it is 0.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from convergence.schema import Evaluate, Experiment, Probe
from diffusion.config import IMAGE_SUFFIXES, Dataset, Model, RunConfig, Sample

# Multiply-adds per second of one CPU thread and of one GPU (bf16; fp32): about a quarter of an A100.
CPU_SPEED, GPU_SPEED, GPU_SPEED_FP32 = 5e9, 2e13, 5e12
# What a call of the net costs however small it is.
CALL_SECONDS = 0.1
# Seconds per image: to read and reduce a picture, features on a CPU thread, on a GPU; per pair of images: all metrics.
PICTURE_SECONDS, CPU_FEATURE_SECONDS, GPU_FEATURE_SECONDS, PAIR_SECONDS = 0.2, 0.25, 0.01, 5e-7
OPENMOJI_PICTURES = 5_000
NAMED_PICTURES = 100_000  # of a dataset that is not fetched yet; few that fit these studies have more
FEATURES = 2048
START_MINUTES, LONGEST_MINUTES = 10, 24 * 60
BASE_MEGABYTES = 4_000
SAMPLE_BATCH = 64  # where the study leaves it to the device: that of a CPU
FACTOR = 2


class Request(NamedTuple):
    """Time and host memory of one job."""

    minutes: int
    megabytes: int


class Size(NamedTuple):
    """Size of a U-Net: its parameters; multiply-adds and numbers kept for the backward pass, per image."""

    parameters: int
    products: int
    activations: int


def unet_size(model: Model, image_size: int) -> Size:
    """The size of `diffusion.nets.unet.UNet`, layer by layer as it is built there."""
    return Size(*map(sum, zip(*_layers(model, image_size), strict=True)))


def _layers(model: Model, image_size: int) -> Iterator[Size]:
    embedding = 4 * model.channels
    widths = [model.channels * multiplier for multiplier in model.channel_mult]
    last = len(widths) - 1

    def dense(c_in: int, c_out: int, pixels: int = 1, kernel: int = 1) -> Size:
        return Size(c_out * (kernel * c_in + 1), kernel * c_in * c_out * pixels, c_out * pixels)

    def norm(width: int, pixels: int) -> Size:
        # What goes in is what comes out of the layer before.
        return Size(2 * width, 0, width * pixels)

    def residual(c_in: int, c_out: int, pixels: int) -> Iterator[Size]:
        yield norm(c_in, pixels)
        yield dense(c_in, c_out, pixels, 9)
        yield dense(embedding, (1 + model.scale_shift_norm) * c_out)
        yield norm(c_out, pixels)
        yield dense(c_out, c_out, pixels, 9)
        if c_in != c_out:
            yield dense(c_in, c_out, pixels)

    def attention(width: int, pixels: int) -> Iterator[Size]:
        yield norm(width, pixels)
        yield dense(width, 3 * width, pixels)
        yield Size(0, 2 * width * pixels**2, width * pixels)
        yield dense(width, width, pixels)

    def blocks(c_in: int, c_out: int, size: int) -> Iterator[Size]:
        yield from residual(c_in, c_out, size**2)
        if size in model.attention_resolutions:
            yield from attention(c_out, size**2)

    def resample(width: int, size: int) -> Iterator[Size]:
        if model.resblock_updown:
            yield from residual(width, width, size**2)
        else:
            yield dense(width, width, size**2, 9)

    yield dense(model.channels, embedding)
    yield dense(embedding, embedding)
    yield dense(3, widths[0], image_size**2, 9)
    width, size, skips = widths[0], image_size, [widths[0]]
    for level, target in enumerate(widths):
        for _ in range(model.res_blocks):
            yield from blocks(width, target, size)
            width = target
            skips.append(width)
        if level < last:
            size //= 2
            yield from resample(width, size)
            skips.append(width)
    yield from residual(width, width, size**2)
    yield from attention(width, size**2)
    yield from residual(width, width, size**2)
    for level, target in reversed(list(enumerate(widths))):
        for block in range(model.res_blocks + 1):
            yield from blocks(width + skips.pop(), target, size)
            width = target
            if level and block == model.res_blocks:
                size *= 2
                yield from resample(width, size)
    yield norm(width, image_size**2)
    yield dense(width, 6 if model.learn_sigma else 3, image_size**2, 9)


def dataset(config: Dataset) -> Request:
    """Prepare a dataset: its pictures are counted where they lie."""
    count = pictures(config)
    return _request(count * PICTURE_SECONDS, _megabytes(_pixels(count, config)))


def pictures(config: Dataset) -> int:
    """How many images the source of a dataset may hold: of a folder or zip the files named like pictures."""
    if config.source != "folder":
        return OPENMOJI_PICTURES if config.source == "openmoji" else NAMED_PICTURES
    if zipfile.is_zipfile(config.path):
        with zipfile.ZipFile(config.path) as archive:
            names = archive.namelist()
    else:
        names = [name for *_, files in os.walk(config.path) for name in files]
    return sum(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in names)


def train(run: RunConfig, steps: int, images: int, gpus: int, processes: int) -> Request:
    """Train for a number of steps on a dataset of a number of images, in processes that share the batch."""
    size, settings = unet_size(run.model, run.dataset.image_size), run.train
    share = math.ceil(settings.batch_size / processes)
    piece = min(settings.micro_batch or share, share)
    seconds = 3 * _seconds(size, share, piece, settings.threads, gpus, settings.precision == "fp32")
    # Weights, their average and AdamW's two moments, and all of these once more while they are saved or loaded.
    memory = 8 * 4 * size.parameters + 3 * _pixels(images, run.dataset) + _activations(size, piece, gpus)
    return _request(steps * seconds, processes * _megabytes(memory))


def sample(run: RunConfig, settings: Sample, gpus: int) -> Request:
    """Sample one checkpoint."""
    size, batch = unet_size(run.model, run.dataset.image_size), settings.batch_size or SAMPLE_BATCH
    seconds = _seconds(size, settings.images, batch, run.train.threads, gpus, settings.precision == "fp32")
    memory = 8 * size.parameters + _activations(size, batch, gpus)
    return _request(settings.steps * seconds, _megabytes(memory))


def reference(settings: Evaluate, images: int, threads: int, gpus: int) -> Request:
    """Features of the reference, and what its metrics need once."""
    count = min(settings.reference_images or images, images)
    return _request(_feature_seconds(count, threads, gpus) + PAIR_SECONDS * count**2, _megabytes(_features(count)))


def evaluate(experiment: Experiment, images: int, threads: int, gpus: int) -> Request:
    """Evaluate the samples of one checkpoint with every extractor, on a dataset of a number of images."""
    settings, count = experiment.evaluate, experiment.sample.images
    everything = count + min(settings.reference_images or images, images)
    seconds = _feature_seconds(count, threads, gpus) + PAIR_SECONDS * everything**2
    return _request(len(settings.features) * seconds, _megabytes(_features(everything)))


def sample_and_evaluate(experiment: Experiment, run: RunConfig, images: int, gpus: int) -> Request:
    """Sample one checkpoint and evaluate the samples, which stay in memory, in one job."""
    sampling = sample(run, experiment.sample, gpus)
    evaluation = evaluate(experiment, images, run.train.threads, gpus)
    minutes = min(sampling.minutes + evaluation.minutes - START_MINUTES, LONGEST_MINUTES)
    samples = _pixels(experiment.sample.images, run.dataset)
    return Request(minutes, max(sampling.megabytes, evaluation.megabytes) + math.ceil(FACTOR * samples / 1e6))


def probe(run: RunConfig, settings: Probe, gpus: int) -> Request:
    """Probe one checkpoint: the losses of every bin, then the gradients of its batches."""
    size = unet_size(run.model, run.dataset.image_size)
    seconds = 4 * _seconds(size, settings.images, settings.batch_size, run.train.threads, gpus, fp32=True)
    # The sums of gradients are float64.
    memory = 64 * size.parameters + _activations(size, settings.batch_size, gpus)
    return _request(settings.bins * seconds, _megabytes(memory))


def images_in(path: str, image_size: int) -> int:
    """How many images a prepared dataset holds, by the size of its images.npy.

    Raises:
        FileNotFoundError: it is not prepared yet; Snakemake asks again when it is.
    """
    return os.path.getsize(path) // (3 * image_size**2)


def _seconds(size: Size, images: int, batch: int, threads: int, gpus: int, fp32: bool) -> float:
    """Seconds of a forward pass over some images, batch by batch."""
    speed = (GPU_SPEED_FP32 if fp32 else GPU_SPEED) if gpus else threads * CPU_SPEED
    return math.ceil(images / batch) * CALL_SECONDS + images * size.products / speed


def _feature_seconds(images: int, threads: int, gpus: int) -> float:
    return images * (GPU_FEATURE_SECONDS if gpus else CPU_FEATURE_SECONDS / threads)


def _activations(size: Size, images: int, gpus: int) -> int:
    """Bytes in the memory of the host; on a GPU they are in its own."""
    return 0 if gpus else 4 * size.activations * images


def _features(images: int) -> int:
    return 8 * FEATURES * images


def _pixels(images: int, config: Dataset) -> int:
    return 3 * images * config.image_size**2


def _megabytes(memory: int) -> int:
    return BASE_MEGABYTES + math.ceil(FACTOR * memory / 1e6)


def _request(seconds: float, megabytes: int) -> Request:
    return Request(min(START_MINUTES + math.ceil(FACTOR * seconds / 60), LONGEST_MINUTES), megabytes)
