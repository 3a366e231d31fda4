"""What studies will cost: images, hours, disk and jobs, before anything is spent.

python -m convergence.command.budget ffhq128 --train-rate 240 --sample-rate 24
"""

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from convergence import layout
from convergence.errors import StudyError, exit_on_user_error
from convergence.resources import FEATURES, images_in, pictures, unet_size
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from convergence.tables import markdown_table

logger = logging.getLogger("convergence.command.budget")

FLOAT = 4
MEASURE_SECONDS = 10
GIGA = 1e9


class Rates(NamedTuple):
    """Images per second of one job: trained, and sampled with all the steps of the study."""

    train: float
    sample: float


class Budget(NamedTuple):
    """What a study takes from nothing to its report, whatever is there already."""

    runs: int
    checkpoints: int
    """Trained ones."""
    images: int
    """Trained on, over all runs."""
    samples: int
    train_hours: float
    sample_hours: float
    jobs: int
    kept: int
    """Bytes that stay."""
    peak: int
    """Bytes at the worst moment: a state being written and samples waiting in each job that may run at once."""


def budget(experiment: Experiment, rates: Rates, at_once: int) -> Budget:
    """The budget of a study, of which `at_once` jobs run side by side."""
    steps = {directory: step for _, _, step, directory in layout.checkpoints(experiment)}
    checkpoints, trained = len(steps), sum(step > 0 for step in steps.values())
    runs = len(experiment.arms) * len(experiment.seeds)
    batches = sum(experiment.run(arm).train.batch_size for arm in experiment.arms)
    images = experiment.steps[-1] * batches * len(experiment.seeds)
    samples = experiment.sample.images * checkpoints
    jobs = 3 * checkpoints + trained * (experiment.probe is not None)
    jobs += 1 + len(experiment.evaluate.features) + 1  # dataset, references, collect

    size = experiment.dataset.image_size
    parameters = unet_size(experiment.model, size).parameters
    weights, state = FLOAT * parameters, 4 * FLOAT * parameters
    pixels = 3 * size**2
    array = pixels * experiment.sample.images
    count = _images(experiment)
    reference = FLOAT * FEATURES * min(experiment.evaluate.reference_images or count, count)
    kept = checkpoints * weights + min(2, len(experiment.steps)) * runs * state
    kept += pixels * count + len(experiment.evaluate.features) * reference
    kept += checkpoints * array if experiment.sample.keep else 0
    peak = kept + at_once * (state + (0 if experiment.sample.keep else array))
    return Budget(
        runs,
        trained,
        images,
        samples,
        images / rates.train / 3600,
        samples / rates.sample / 3600,
        jobs,
        kept,
        peak,
    )


def _images(experiment: Experiment) -> int:
    """Images of a dataset: as prepared, otherwise as many as its source may hold."""
    prepared = layout.dataset_directory(experiment.dataset) / "images.npy"
    if prepared.exists():
        return images_in(str(prepared), experiment.dataset.image_size)
    return pictures(experiment.dataset)


def measure(experiment: Experiment) -> Rates:
    """The rates of a study's own net on this machine, in half a minute: of as many images at once as that allows.

    Raises:
        StudyError: so many do not fit the GPU, or there is none where one is asked for.
    """
    import numpy as np
    import torch

    from convergence.jobs import use_torch
    from convergence.snakefile import gpus
    from diffusion.devices import autocast
    from diffusion.training.state import TrainState, train_step

    run = experiment.run(next(iter(experiment.arms)))
    device = use_torch(run.train.threads, gpus(experiment, elsewhere=False))
    size = run.dataset.image_size

    def seconds(work) -> float:
        for _ in range(2):  # the first call of a shape prepares what later ones use
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def of_batch(count: int) -> tuple[float, float]:
        """Seconds of a training step and of a forward pass over some images."""
        settings = run.train.model_copy(update={"batch_size": count, "micro_batch": None})
        state = TrainState(run.model_copy(update={"train": settings}), 0, device)
        x, t = torch.zeros(count, 3, size, size, device=device), torch.zeros(count, dtype=torch.int64, device=device)
        with torch.no_grad(), autocast(device, experiment.sample.precision):
            forward = seconds(lambda: state.model(x, t))
        batches = state.batches(np.zeros((count, size, size, 3), np.uint8))
        return seconds(lambda: train_step(state, batches)), forward

    count = 1
    try:
        step, _ = of_batch(count)
        count = max(1, min(run.train.micro_batch or run.train.batch_size, int(MEASURE_SECONDS / step)))
        step, forward = of_batch(count)
    except torch.OutOfMemoryError:
        raise StudyError(
            f"{experiment.name}: a batch of {count} does not fit the memory of the GPU: lower train.micro_batch, or "
            "give --train-rate and --sample-rate"
        ) from None
    rates = Rates(count / step, count / forward / experiment.sample.steps)
    logger.info(
        "%s: measured here (%s, %d at once): %.3g images/s trained, %.3g sampled",
        experiment.name, device, count, *rates,
    )  # fmt: skip
    return rates


def table(budgets: dict[str, Budget]) -> str:
    """Budgets by study, and their sum where there are several, in Markdown."""
    if len(budgets) > 1:
        budgets = budgets | {"all": Budget(*map(sum, zip(*budgets.values(), strict=True)))}
    rows = [
        [
            study, of.runs, f"{of.checkpoints:,}", f"{of.images:,}", f"{of.samples:,}", f"{of.train_hours:,.1f}",
            f"{of.sample_hours:,.1f}", f"{of.jobs:,}", f"{of.kept / GIGA:,.1f}", f"{of.peak / GIGA:,.1f}",
        ]
        for study, of in budgets.items()
    ]  # fmt: skip
    head = ["study", "runs", "checkpoints", "images trained", "samples", "hours of training", "of sampling", "jobs"]
    return markdown_table([*head, "GB kept", "GB at most"], rows)


def _check(options: argparse.Namespace) -> None:
    """Make sure that all that is given is above 0.

    Raises:
        StudyError: it is not.
    """
    for name in ("train_rate", "sample_rate", "jobs"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise StudyError(f"--{name.replace('_', '-')} is {value:g}: give a number above 0")


def main(arguments: list[str] | None = None) -> None:
    """What `python -m convergence.command.budget` does; a mistake ends in one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m convergence.command.budget", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", help="names of files in experiments/")
    parser.add_argument(
        "--train-rate", type=float, help="images per second of a training job (measured here if not given)"
    )
    parser.add_argument(
        "--sample-rate", type=float, help="images per second of a sampling job (default: measured here)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="jobs side by side, for the disk they need (default: 1)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_user_error():
        _check(options)
        budgets = {}
        for study in [name.removesuffix(".yaml") for names in options.studies for name in names.split(",") if name]:
            experiment = load_experiment(Path("experiments") / f"{study}.yaml")
            known = options.train_rate and options.sample_rate
            rates = Rates(options.train_rate, options.sample_rate) if known else measure(experiment)
            rates = Rates(options.train_rate or rates.train, options.sample_rate or rates.sample)
            budgets[study] = budget(experiment, rates, options.jobs)
        sys.stdout.write(table(budgets) + "\n\n")
        free = shutil.disk_usage(".").free
        sys.stdout.write(f"Free here: {free / GIGA:,.1f} GB. Evaluation and probes come on top of the hours.\n")
        if free < sum(of.peak for of in budgets.values()):
            sys.stdout.write("That is too little: drop checkpoints, seeds or samples, or work on a larger disk.\n")


if __name__ == "__main__":
    main()
