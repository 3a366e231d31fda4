"""The studies in experiments/: their settings, their JSON schema, and the jobs that Snakemake plans for them."""

import copy
import json
import re

import jsonschema
import pytest
import yaml
from PIL import Image
from projects import ROOT, copy_project, edit, snakemake

from convergence.study_file import load_experiment
from diffusion.nets.size import unet_size

STUDIES = {path.stem: load_experiment(path) for path in sorted((ROOT / "experiments").glob("*.yaml"))}
PUBLISHED = ("ffhq128", "flowers102")
VALIDATOR = jsonschema.Draft202012Validator(json.loads((ROOT / "docs/schema.json").read_text()))
SCHEMA_LINE = "# yaml-language-server: $schema=../docs/schema.json"


class Yaml12Loader(yaml.SafeLoader):
    """Reads scalars as the core schema of YAML 1.2 does, which editors use: 2e-3 is a number, yes is a string."""

    yaml_implicit_resolvers = {}


for tag, pattern, first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
]:
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)


@pytest.mark.parametrize("study", PUBLISHED)
def test_published_recipes_are_complete(study):
    experiment = STUDIES[study]
    run = experiment.run("under05")
    size = unet_size(run.model, run.dataset.image_size)
    assert size.parameters == pytest.approx(98.6e6, rel=1e-3)
    assert 2 * size.multiply_adds == pytest.approx(148e9, rel=5e-3)
    assert run.train.batch_size * experiment.steps[-1] == 25_600_000 and experiment.steps == list(
        range(10_000, 100_001, 10_000)
    )
    assert run.model.dropout == 0 and run.model.learn_sigma and run.model.resblock_updown and run.model.scale_shift_norm
    assert (run.diffusion.schedule.chosen[0], run.diffusion.timesteps) == (
        "linear",
        1000,
    ) and run.train.learning_rate == 2e-5
    assert (experiment.sample.sampler, experiment.sample.steps, experiment.sample.images) == ("ddim", 25, 10_000)
    assert experiment.evaluate.features == ("inception-v3-compat",) and len(experiment.seeds) == 3
    # The published arms have no moving average; otherwise they are equal to the others.
    for arm in ("uni05", "under05"):
        raw = experiment.run(f"{arm}_as_published")
        assert raw.train.ema_decay == 0 and raw.scheme == experiment.run(arm).scheme


def read_as_editors_do(study):
    text = (ROOT / f"experiments/{study}.yaml").read_text()
    assert text.splitlines()[0] == SCHEMA_LINE
    return yaml.load(text, Yaml12Loader)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_validates_against_the_json_schema(study):
    content = read_as_editors_do(study)
    assert isinstance(content["train"]["learning_rate"], float)
    assert [error.message for error in VALIDATOR.iter_errors(content)] == []


def edited(changes):
    """The default study as editors read it, with values at dotted keys replaced or added."""
    content = copy.deepcopy(read_as_editors_do("openmoji"))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = content
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return content


@pytest.mark.parametrize(
    "changes",
    [
        {"arms.a": {}},
        {"arms.a": {"timesteps": "speed", "mse_weight": "min_snr"}},
        {"arms.a": {"timesteps": {"speed": {"tau": 10}}, "train": {"learning_rate": 1e-3}, "match": "uni05"}},
        {"arms.a": {"timesteps": {"p2": None}, "importance_corrected": None}},
        {"checkpoints": [0, 1]},
        {"evaluate.weights": {"vgg16": "vgg16.pth"}},
        {"evaluate.weights": {"vgg16": {"path": "vgg16.pth", "sha256": "0" * 64}}},
        {"probe": None, "compare": None, "external_curves": "curves.csv"},
        {"dataset": {"source": "folder", "path": "images", "image_size": 16}},
        {"model.heads": 4, "model.head_channels": None},
    ],
    ids=str,
)
def test_json_schema_accepts_every_form_of_a_value(changes):
    assert [error.message for error in VALIDATOR.iter_errors(edited(changes))] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"modle": {}},
        {"published": "curves.csv"},
        {"dataset.imge_size": 16},
        {"dataset.source": "opnmoji"},
        {"dataset": {"source": "folder", "image_size": 16}},
        {"model.chanels": 32},
        {"model.channels": "32"},
        {"diffusion.schedule": "cos"},
        {"train.batchsize": 32},
        {"train.batch_size": 0},
        {"checkpoints": {"every": 1, "untill": 2}},
        {"checkpoints": 5},
        {"seeds": []},
        {"arms": {}},
        {"arms.Under-05": {}},
        {"arms.a": {"timestep": "uniform"}},
        {"arms.a": {"timesteps": "unifrom"}},
        {"arms.a": {"timesteps": {}}},
        {"arms.a": {"timesteps": {"p2": {}, "uniform": {}}}},
        {"arms.a": {"timesteps": {"p2": {"gama": 1}}}},
        {"arms.a": {"mse_weight": {"debiased": {"gamma": 1}}}},
        {"arms.a": {"train": {"lerning_rate": 1}}},
        {"arms.a": {"train": {"learning_rate": 0}}},
        {"sample.sampler": "dimm"},
        {"evaluate.metrics": ["fid"]},
        {"evaluate.weights": {"vgg16": {"file": "vgg16.pth"}}},
        {"probe.bin": 8},
        {"compare.primary.candiate": "uni05"},
        {"tracking": "on"},
    ],
    ids=str,
)
def test_json_schema_rejects_a_mistake(changes):
    assert not VALIDATOR.is_valid(edited(changes))


def test_json_schema_lists_the_train_keys_of_an_arm_without_requiring_any():
    definitions = VALIDATOR.schema["$defs"]
    keys = definitions["Arm"]["properties"]["train"]
    assert keys["properties"] == definitions["Train"]["properties"] and "required" not in keys


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_can_be_planned(tmp_path, study):
    project, experiment = copy_project(tmp_path), STUDIES[study]
    if study in PUBLISHED:
        # Their extractor must be downloaded, which needs a network connection.
        edit(project, lambda content: content["evaluate"].update(features=["efficientnet-lite0"]), study)
        (project / "reports/published/claim").mkdir(parents=True)
        (project / "reports/published/claim/curves.csv").write_text("arm,images,value\na,1,2\n")
    if study == "ffhq128":
        (project / "data/thumbnails128x128").mkdir(parents=True)
        for index in range(2):
            Image.new("1", (128, 128)).save(project / f"data/thumbnails128x128/{index:05}.png")
    done = snakemake(project, "--dry-run", "--quiet", "all", "--config", f"experiments={study}", "tracking=off")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    stats = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", output, re.M)}
    trained = len([step for step in experiment.steps if step])
    assert stats["train"] == len(experiment.arms) * len(experiment.seeds) * trained
    assert stats["evaluate"] >= stats["train"] and stats["figures"] == 1


def test_study_without_its_images_says_where_they_belong(tmp_path):
    project = copy_project(tmp_path)
    done = snakemake(project, "--dry-run", "--config", "experiments=ffhq128", "tracking=off")
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "data/thumbnails128x128 does not exist: put images there" in output
