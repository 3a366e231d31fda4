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
    """`results/datasets/<source>-<hash8>`: named after what determines the pixels."""
    return DATASETS / f"{dataset.source}-{_hash8(pixels(dataset))}"


def pixels(dataset: Dataset) -> str:
    """What determines the pixels of a dataset, as JSON: not how many of its images training sees."""
    return dataset.model_dump_json(exclude={"held_out"}, exclude_defaults=True)


def reference_path(dataset: Dataset, features: str, evaluate: Evaluate) -> Path:
    """Reference statistics of a dataset, shared by all studies on it."""
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
