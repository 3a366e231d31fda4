"""Paths of studies and results, relative to the directory in which Snakemake runs."""

import hashlib
import shlex
from pathlib import Path

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
    """Directory of one training run: `results/<study>/<arm>-<hash8>/seed<k>`."""
    return _step(study, f"{arm}-{run.hash8}", seed, 0).parent


def step_directory(study: str, arm: str, run: RunConfig, seed: int, step: int) -> Path:
    """Directory of one checkpoint. The untrained net (step 0) is shared by all arms that start from it."""
    return _step(study, f"{arm}-{run.hash8}" if step else f"init-{run.initial.hash8}", seed, step)


def _step(study: str, arm: str, seed: int, step: int) -> Path:
    return Path(str(STEP).format(study=study, arm=arm, seed=seed, step=step))


def report_directory(study: str) -> Path:
    """Directory of the tables, figures and verdict of one study: `reports/<study>`."""
    return REPORTS / study


def study_file(study: str) -> Path:
    """File with the settings of one study: `experiments/<study>.yaml`."""
    return EXPERIMENTS / f"{study}.yaml"


def plan_path(study: str) -> Path:
    """File with the recorded plan of a study: `results/<study>/plan.json`."""
    return RESULTS / study / "plan.json"


def untracked(study: str) -> Path:
    """File that exists while MLflow may lack results of a study: `results/<study>.untracked`."""
    return RESULTS / f"{study}.untracked"


def snakemake_command(*arguments: str) -> str:
    """Returns a Snakemake command line for the working directory, with the options it needs outside the clone."""
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


def _hash8(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
