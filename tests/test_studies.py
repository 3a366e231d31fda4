"""The studies in experiments/: that each is what it says, and can be planned."""

import re

import numpy as np
import pytest
from PIL import Image
from projects import ROOT, copy_project, edit, snakemake

from convergence.resources import unet_size
from convergence.study_file import load_experiment

STUDIES = {path.stem: load_experiment(path) for path in sorted((ROOT / "experiments").glob("*.yaml"))}
PUBLISHED = ("ffhq128", "flowers102")


@pytest.mark.parametrize("study", PUBLISHED)
def test_published_recipes_are_complete(study):
    experiment = STUDIES[study]
    run = experiment.run("under05")
    size = unet_size(run.model, run.dataset.image_size)
    assert size.parameters == pytest.approx(98.6e6, rel=1e-3)
    assert 2 * size.products == pytest.approx(148e9, rel=5e-3)
    assert run.train.batch_size * experiment.steps[-1] == 25_600_000 and experiment.steps == list(
        range(10_000, 100_001, 10_000)
    )
    assert run.model.dropout == 0 and run.model.learn_sigma and run.model.resblock_updown and run.model.scale_shift_norm
    assert (run.diffusion.schedule, run.diffusion.timesteps) == ("linear", 1000) and run.train.learning_rate == 2e-5
    assert (experiment.sample.sampler, experiment.sample.steps, experiment.sample.images) == ("ddim", 25, 10_000)
    assert experiment.evaluate.features == ("inception-v3-compat",) and len(experiment.seeds) == 3
    # As published, nothing is averaged; otherwise the arms are the same.
    for arm in ("uni05", "under05"):
        raw = experiment.run(f"{arm}_as_published")
        assert raw.train.ema_decay == 0 and raw.scheme == experiment.run(arm).scheme


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_can_be_planned(tmp_path, study):
    project, experiment = copy_project(tmp_path), STUDIES[study]
    if study in PUBLISHED:
        # Their extractor is fetched, for which there may be no network here.
        edit(project, lambda content: content["evaluate"].update(features=["efficientnet-lite0"]), study)
        (project / "reports/published/claim").mkdir(parents=True)
        (project / "reports/published/claim/curves.csv").write_text("arm,images,value\n")
    if study == "ffhq128":
        (project / "data/thumbnails128x128").mkdir(parents=True)
        Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(project / "data/thumbnails128x128/00000.png")
    done = snakemake(project, "--dry-run", "--quiet", "all", "--config", f"experiments={study}", "tracking=off")
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    stats = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", told, re.M)}
    trained = len([step for step in experiment.steps if step])
    assert stats["train"] == len(experiment.arms) * len(experiment.seeds) * trained
    assert stats["evaluate"] == stats["sample"] >= stats["train"] and stats["figures"] == 1


def test_studies_without_their_pictures_say_where_they_belong(tmp_path):
    project = copy_project(tmp_path)
    done = snakemake(project, "--dry-run", "--config", "experiments=ffhq128", "tracking=off")
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "data/thumbnails128x128 is not there: put images there" in told
