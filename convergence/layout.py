"""Where results lie. Paths are relative to the directory Snakemake runs in."""

import hashlib
from pathlib import Path

from convergence.schema import Evaluate, Experiment
from diffusion.config import Dataset, RunConfig

RESULTS = Path("results")
DATASETS = RESULTS / "datasets"
REFERENCES = RESULTS / "references"
REPORTS = Path("reports")


def dataset_directory(dataset: Dataset) -> Path:
    """`results/datasets/<source>-<hash8>`, where the hash is that of the settings that determine the pixels."""
    return DATASETS / f"{dataset.source}-{_hash8(pixels(dataset))}"


def pixels(dataset: Dataset) -> str:
    """The settings that determine the pixels of a dataset, as JSON: all keys, with `held_out` at 0."""
    return dataset.model_copy(update={"held_out": 0}).canonical()


def reference_path(dataset: Dataset, features: str, evaluate: Evaluate) -> Path:
    """`results/references/<dataset>-<features>-<part>-<images>.npz`, shared by all studies with the same reference."""
    name = f"{dataset_directory(dataset).name}-{features}-{evaluate.reference}-{evaluate.reference_images or 'all'}"
    if dataset.held_out:
        name += f"-without{dataset.held_out}"
    weights = evaluate.weights.get(features)
    if weights and weights.sha256:
        name += f"-weights{weights.sha256[:8]}"
    return REFERENCES / f"{name}.npz"


def run_directory(study: str, arm: str, run: RunConfig, seed: int) -> Path:
    """`results/<study>/<arm>-<hash8>/seed<k>`: one training run."""
    return RESULTS / study / f"{arm}-{run.hash8}" / f"seed{seed}"


def step_directory(study: str, arm: str, run: RunConfig, seed: int, step: int) -> Path:
    """Where one checkpoint lies. The untrained net (step 0) is shared by all arms that start from it."""
    if step == 0:
        return RESULTS / study / f"init-{run.initial.hash8}" / f"seed{seed}" / "step0"
    return run_directory(study, arm, run, seed) / f"step{step}"


def checkpoints(experiment: Experiment) -> list[tuple[str, int, int, Path]]:
    """(arm, seed, step, directory) of every checkpoint of a study."""
    return [
        (arm, seed, step, step_directory(experiment.name, arm, run, seed, step))
        for arm, run in [(arm, experiment.run(arm)) for arm in experiment.arms]
        for seed in experiment.seeds
        for step in experiment.steps
    ]


def _hash8(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
