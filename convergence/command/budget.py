"""`convergence budget`: estimates the hours, disk space and jobs of studies."""

import logging
import math
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from convergence import layout
from convergence.command.options import studies_argument
from convergence.errors import StudyError
from convergence.resources import FEATURES, count_images, images_in
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from convergence.tables import markdown_table
from diffusion.net_size import net_size

logger = logging.getLogger(__name__)

FLOAT = 4  # bytes
MEASURE_SECONDS = 10
GIGA = 1e9


class Rates(NamedTuple):
    """Images per second in training and in sampling, where sampling has the study's number of sampling steps."""

    train: float
    sample: float


class Budget(NamedTuple):
    """The estimated cost of a whole study."""

    runs: int
    checkpoints: int
    """Number of checkpoints without untrained nets (step 0)."""
    images: int
    """Number of training images of all runs together."""
    samples: int
    train_hours: float
    sample_hours: float
    jobs: int
    kept: int
    """Disk space at the end, in bytes."""
    peak: int
    """Largest disk space during the study, in bytes: `kept`, and one training state per job that runs at the same \
time."""


def budget(experiment: Experiment, rates: Rates, at_once: int) -> Budget:
    """Returns the estimated cost of a study, without its trials.

    Args:
        experiment: the study.
        rates: images per second in training and in sampling.
        at_once: number of jobs that run at the same time.
    """
    steps = {directory: step for _, _, step, directory in layout.checkpoints(experiment)}
    checkpoints, trained = len(steps), sum(step > 0 for step in steps.values())
    runs = len(experiment.arms) * len(experiment.seeds)
    batches = sum(experiment.run(arm).train.batch_size for arm in experiment.arms)
    images = experiment.steps[-1] * batches * len(experiment.seeds)
    measured = len(experiment.evaluate.ema or (None,))  # averages of the weights per checkpoint
    samples = experiment.sample.images * checkpoints * measured
    jobs = 2 * checkpoints + trained * (experiment.probe is not None)
    jobs += 1 + len(experiment.evaluate.features)  # dataset, references
    jobs += len(("cost", "verdict", "figures", "pages")) + (measured > 1)  # and the figure of the averages

    parameters = net_size(experiment.model, experiment.dataset.image_size).parameters
    averages = max(len(experiment.run(arm).train.averages) for arm in experiment.arms)
    weights, state = averages * FLOAT * parameters, (3 + averages) * FLOAT * parameters
    kept = checkpoints * weights + min(2, len(experiment.steps)) * runs * state + _dataset_bytes(experiment)
    kept += 3 * experiment.dataset.image_size**2 * samples // measured if experiment.sample.keep else 0
    hours = (images / rates.train / 3600, samples / rates.sample / 3600)
    return Budget(runs, trained, images, samples, *hours, jobs, kept, kept + at_once * state)


def trial_budget(experiment: Experiment, rates: Rates, at_once: int) -> Budget:
    """Returns the estimated cost of the trials of a study, in addition to `budget`, which has the same arguments."""
    trials = layout.trials(experiment)
    settings = [(arm, values) for arm in experiment.arms for values in experiment.grid(arm)]
    arms = [experiment.arm(arm, values).model_copy(update={"match": None}) for arm, values in settings]
    changes = {
        "checkpoints": tuple(sorted({trial.step for trial in trials})),
        "seeds": tuple(sorted({trial.seed for trial in trials})),
        "arms": {f"arm{index}": arm for index, arm in enumerate(arms)},
        "probe": None,
    }
    cost, shared = budget(experiment.model_copy(update=changes), rates, at_once), _dataset_bytes(experiment)
    return cost._replace(jobs=2 * cost.checkpoints + 1, kept=cost.kept - shared, peak=cost.peak - shared)


def _dataset_bytes(experiment: Experiment) -> int:
    """Returns the disk space of the dataset and the references of a study."""
    count = _images(experiment)
    reference = FLOAT * FEATURES * min(experiment.evaluate.reference_images or count, count)
    return 3 * experiment.dataset.image_size**2 * count + len(experiment.evaluate.features) * reference


def _images(experiment: Experiment) -> int:
    """Returns the number of images of a prepared dataset, otherwise the number of images in its source."""
    prepared = layout.dataset_directory(experiment.dataset) / "images.npy"
    if prepared.exists():
        return images_in(str(prepared), experiment.dataset.image_size)
    return count_images(experiment.dataset)


def measure(experiment: Experiment) -> Rates:
    """Measures on this machine how many images per second the study's net trains and samples.

    The measurement takes about half a minute.

    Raises:
        StudyError: if the net does not fit the GPU memory, or the study needs a GPU and there is none.
    """
    import numpy as np
    import torch

    from convergence.jobs import use_torch
    from convergence.snakefile import gpus
    from diffusion.devices import compute_copy
    from diffusion.training.state import TrainState, train_step

    run = experiment.run(next(iter(experiment.arms)))
    device = use_torch(run.train.threads, gpus(experiment, elsewhere=False))
    size = run.dataset.image_size

    def seconds(work: Callable[[], object]) -> float:
        for _ in range(2):  # the first call of a shape includes preparations
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def batch_seconds(count: int) -> tuple[float, float]:
        """Returns the seconds of a training step and of a forward pass with `count` images."""
        settings = run.train.model_copy(update={"batch_size": count, "micro_batch": None})
        state = TrainState(run.model_copy(update={"train": settings}), 0, device)
        x, t = torch.zeros(count, 3, size, size, device=device), torch.zeros(count, dtype=torch.int64, device=device)
        model = compute_copy(state.model, experiment.sample.precision)
        with torch.no_grad():
            forward = seconds(lambda: model(x, t))
        batches = state.batches(np.zeros((count, size, size, 3), np.uint8))
        return seconds(lambda: train_step(state, batches)), forward

    count = 1
    try:
        step, _ = batch_seconds(count)
        count = max(1, min(run.train.micro_batch or run.train.batch_size, int(MEASURE_SECONDS / step)))
        step, forward = batch_seconds(count)
    except torch.OutOfMemoryError:
        raise StudyError(
            f"{experiment.name}: a batch of {count} does not fit the GPU memory: lower train.micro_batch, or give "
            "--train-rate and --sample-rate"
        ) from None
    rates = Rates(count / step, count / forward / experiment.sample.steps)
    logger.info(
        "%s: measured on this machine (%s, batch size %d): %.3g images/s in training, %.3g in sampling",
        experiment.name, device, count, *rates,
    )  # fmt: skip
    return rates


def table(budgets: dict[str, Budget]) -> str:
    """Returns a Markdown table with a row per study, and a row of sums if there are several."""
    if len(budgets) > 1:
        budgets = budgets | {"all": Budget(*map(sum, zip(*budgets.values(), strict=True)))}
    rows = [
        [
            name, b.runs, f"{b.checkpoints:,}", f"{b.images:,}", f"{b.samples:,}", f"{b.train_hours:,.1f}",
            f"{b.sample_hours:,.1f}", f"{b.jobs:,}", f"{b.kept / GIGA:,.1f}", f"{b.peak / GIGA:,.1f}",
        ]
        for name, b in budgets.items()
    ]  # fmt: skip
    head = ["study", "runs", "checkpoints", "training images", "samples", "training hours", "sampling hours", "jobs"]
    return markdown_table([*head, "GB at the end", "GB at most"], rows)


class _Rate(click.FloatRange):
    """Click type of a rate in images per second."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the rate, which must not be NaN."""
        rate = super().convert(value, param, ctx)
        return self.fail("nan is not a rate.", param, ctx) if math.isnan(rate) else rate


_RATE = _Rate(min=1e-6, max=1e9)


@click.command("budget")
@studies_argument
@click.option("--train-rate", type=_RATE, metavar="RATE", show_default="measured on this machine",
              help="Images per second of a training job.")  # fmt: skip
@click.option("--sample-rate", type=_RATE, metavar="RATE", show_default="measured on this machine",
              help="Images per second of a sampling job.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="Jobs that run at the same time.")
def main(studies: tuple[str, ...], train_rate: float | None, sample_rate: float | None, jobs: int) -> None:
    """Estimate the hours, disk space and jobs of studies.

    Each STUDY is a file in experiments/. The estimate is for the whole study, even if some results exist already. The
    trials of `tune` have a row of their own.
    """
    budgets = {}
    for study in studies:
        experiment = load_experiment(layout.study_file(study))
        rates = Rates(train_rate, sample_rate) if train_rate and sample_rate else measure(experiment)
        rates = Rates(train_rate or rates.train, sample_rate or rates.sample)
        budgets[study] = budget(experiment, rates, jobs)
        if experiment.tune:
            budgets[f"{study}: trials"] = trial_budget(experiment, rates, jobs)
    click.echo(table(budgets) + "\n")
    free = shutil.disk_usage(".").free
    click.echo(f"Free disk space: {free / GIGA:,.1f} GB. These hours do not include evaluation and probes.")
    if free < sum(estimate.peak for estimate in budgets.values()):
        click.echo("The free space is not enough: use fewer checkpoints, seeds or samples, or a larger disk.")
