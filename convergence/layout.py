"""Defines the paths of studies and results, relative to the directory in which Snakemake runs.

In a path, `<hash8>` is the first 8 hexadecimal digits of the SHA-256 of settings.
"""

import hashlib
import shlex
from pathlib import Path
from typing import NamedTuple

from convergence.schema import Evaluate, Experiment
from diffusion.config import Dataset, RunConfig

# The clone that this code belongs to.
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = Path("experiments")
RESULTS = Path("results")
DATASETS = RESULTS / "datasets"
REFERENCES = RESULTS / "references"
# The study files as they were when Snakemake last started: a file may be edited while its study runs.
STUDIES = RESULTS / "studies"
REPORTS = Path("reports")
# Downloads of torchvision.
DOWNLOADS = Path("data")
# Shows the curves of the selected studies together.
FIGURE = REPORTS / "fid_curves.png"
# Compares the selected studies, if there are several.
STUDIES_FIGURE = REPORTS / "studies.png"
FRONT_PAGE = REPORTS / "pages/front.rst"
HTML_REPORT = REPORTS / "report.html"
# Directories with the wildcards of the Snakemake rules.
DATASET = DATASETS / "{dataset}"
STEP = RESULTS / "{study}/{arm}/seed{seed}/step{step}"
REPORT = REPORTS / "{study}"


def dataset_directory(dataset: Dataset) -> Path:
    """Returns `results/datasets/<source>-<hash8>`, with the hash of the settings that determine the pixels."""
    return DATASETS / f"{dataset.source}-{_hash8(pixels(dataset))}"


def pixels(dataset: Dataset) -> str:
    """Returns the settings that determine the pixels of a dataset, as JSON.

    `held_out` is set to 0, because this key does not change the pixels.
    """
    return dataset.model_copy(update={"held_out": 0}).canonical()


def reference_path(dataset: Dataset, features: str, evaluate: Evaluate) -> Path:
    """Returns the path of the reference of a dataset: features of real images, and statistics of these features.

    The path is `results/references/<dataset>-<features>-<part>-<images>.npz`, where `<part>` is `train` or `held_out`.
    The name has suffixes for the number of held-out images and for weights with a SHA-256. Studies with the same
    reference share the file.
    """
    name = f"{dataset_directory(dataset).name}-{features}-{evaluate.reference}-{evaluate.reference_images or 'all'}"
    if dataset.held_out:
        name += f"-without{dataset.held_out}"
    weights = evaluate.weights.get(features)
    if weights and weights.sha256:
        name += f"-weights{weights.sha256[:8]}"
    return REFERENCES / f"{name}.npz"


def run_directory(study: str, arm: str, run: RunConfig, seed: int) -> Path:
    """Returns the directory of one training run: `results/<study>/<arm>-<hash8>/seed<k>`."""
    return _step(study, f"{arm}-{run.hash8}", seed, 0).parent


def step_directory(study: str, arm: str, run: RunConfig, seed: int, step: int) -> Path:
    """Returns the directory of one checkpoint: `results/<study>/<arm>-<hash8>/seed<k>/step<n>`.

    The untrained net (step 0) is in a directory `init-<hash8>` instead of `<arm>-<hash8>`. All arms that start from
    this net share the directory.
    """
    return _step(study, f"{arm}-{run.hash8}" if step else f"init-{run.initial.hash8}", seed, step)


def _step(study: str, arm: str, seed: int, step: int) -> Path:
    return Path(str(STEP).format(study=study, arm=arm, seed=seed, step=step))


def report_directory(study: str) -> Path:
    """Returns the directory of the tables, figures and verdict of one study: `reports/<study>`."""
    return REPORTS / study


def study_file(study: str) -> Path:
    """Returns the path of the file with the settings of one study: `experiments/<study>.yaml`."""
    return EXPERIMENTS / f"{study}.yaml"


def plan_path(study: str) -> Path:
    """Returns the path of the file in which the plan of a study is recorded: `results/<study>/plan.json`."""
    return RESULTS / study / "plan.json"


def untracked(study: str) -> Path:
    """Returns the path of an empty file that exists while results of a study may be missing in MLflow.

    The path is `results/<study>.untracked`.
    """
    return RESULTS / f"{study}.untracked"


def snakemake_command(*arguments: str) -> str:
    """Returns a Snakemake command line for the working directory.

    Outside of the clone, the command includes the options `--snakefile` and `--directory`.
    """
    outside = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(Path.cwd())]
    return shlex.join(["snakemake", *(outside if Path.cwd() != ROOT else []), *arguments])


def checkpoints(experiment: Experiment) -> list[tuple[str, int, int, Path]]:
    """Returns (arm, seed, step, directory) of every checkpoint of a study."""
    return [
        (arm, seed, step, step_directory(experiment.name, arm, run, seed, step))
        for arm, run in [(arm, experiment.run(arm)) for arm in experiment.arms]
        for seed in experiment.seeds
        for step in experiment.steps
    ]


class Trial(NamedTuple):
    """A checkpoint of a trial: an arm with one combination of the tuned values, and one seed."""

    arm: str
    values: dict[str, float]
    """The tuned values."""
    seed: int
    step: int
    directory: Path


def trials(experiment: Experiment) -> list[Trial]:
    """Returns every trained checkpoint of the trials of a study. A trial is in the directory of an ordinary run."""
    tune = experiment.tune
    if tune is None:
        return []
    return [
        Trial(arm, values, seed, step, step_directory(experiment.name, arm, run, seed, step))
        for arm in experiment.arms
        for values in experiment.grid(arm)
        for run in [experiment.run(arm, values)]
        for seed in tune.seeds
        for step in experiment.steps
        if 0 < step <= tune.until
    ]


def _hash8(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
