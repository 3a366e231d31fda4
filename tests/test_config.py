"""Study files: every mistake has a message, and a hash changes exactly if the settings of the run change."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from convergence import layout
from convergence.errors import StudyError
from convergence.schema import Experiment
from convergence.study_file import load_experiment
from diffusion import losses, timesteps
from diffusion.build import NETS
from diffusion.config import TRAIN_VERSION, Dataset, Density, Initial, RunConfig, Train, Weight
from diffusion.section import LATER_KEYS

STUDY = {
    "name": "study",
    "dataset": {"source": "openmoji", "image_size": 32},
    "model": {
        "channels": 32,
        "channel_mult": [1, 2],
        "res_blocks": 1,
        "attention_resolutions": [16],
        "head_channels": 16,
    },
    "train": {"batch_size": 12},
    "checkpoints": {"every": 10, "until": 40},
    "seeds": [0, 1],
    "arms": {
        "uni05": {"timesteps": "uniform", "mse_weight": {"p2": {"gamma": 0.5, "k": 1}}},
        "under05": {"timesteps": {"p2": {"gamma": 0.5, "k": 1}}},
        "matched05": {"timesteps": {"p2": {"gamma": 0.5, "k": 1}}, "match": "uni05"},
    },
    "compare": {
        "baseline": "uni05",
        "candidates": ["under05", "matched05"],
        "primary": {"candidate": "under05"},
    },
}
P2 = {"p2": {"gamma": 0.5}}


def edited(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The study with values at dotted keys replaced or added."""
    study = copy.deepcopy(STUDY)
    for key, value in changes:
        *path, last = key.split(".")
        section = study
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return study


def load(directory: Path, content: dict[str, Any] | str) -> Experiment:
    path = directory / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return load_experiment(path)


# Key and value of the mistake, and parts of the message: the key, what is wrong, and what to do.
WRONG = [
    ("modle", {}, ["modle: unknown key", "did you mean model?"]),
    ("train.lerning_rate", 1e-4, ["train.lerning_rate: unknown key", "did you mean learning_rate?"]),
    ("xyzzy", 1, ["xyzzy: unknown key; known keys: arms, checkpoints"]),
    ("arms.folder", {"timestep": "uniform"}, ["arms.folder.timestep: unknown key", "did you mean timesteps?"]),
    ("dataset.image_size", 4, ["dataset.image_size: input should be greater than or equal to 8", "4"]),
    ("checkpoints", {"every": 1000, "until": 500}, ["checkpoints: steps must be increasing", "raise until"]),
    ("name", "datasets", ["name: results/datasets/ is reserved", "choose another"]),
    ("evaluate.metrics", ["kid", "precision"], ["evaluate: metrics: must include fd", "add it"]),
    ("dataset.imge_size", 32, ["dataset.imge_size: unknown key", "did you mean image_size?"]),
    ("arms.under05.timestep", "uniform", ["arms.under05.timestep: unknown key", "did you mean timesteps?"]),
    (
        "arms.under05.timesteps",
        {"p2": {"gama": 1}},
        ["arms.under05.timesteps.p2.gama", "did you mean gamma?"],
    ),
    (
        "arms.under05.train",
        {"lerning_rate": 1},
        ["arms.under05.train.lerning_rate", "did you mean learning_rate?"],
    ),
    ("checkpoints", {"evry": 10, "until": 40}, ["checkpoints.evry: unknown key", "did you mean every?"]),
    ("train.batch_size", "many", ["train.batch_size", "integer", "'many'"]),
    ("train.batch_size", 0, ["train.batch_size", "greater than 0"]),
    ("train.learning_rate", "fast", ["train.learning_rate", "number", "'fast'"]),
    ("train.learning_rate", -1e-4, ["train.learning_rate", "greater than 0"]),
    ("train.learning_rate", float("inf"), ["train.learning_rate", "write a number, such as 0.5 or 1e-4", "'.inf'"]),
    ("train.learning_rate", "inf", ["train.learning_rate", "finite"]),
    ("train.ema_decay", 1.0, ["train.ema_decay", "less than 1"]),
    ("train.decay", "cosine", ["train.decay.cosine.until", "missing"]),
    ("train.decay", {"linear": {"from": 9, "until": 9}}, ["train.decay.linear: from 9 is not before until 9", "raise"]),
    ("train.decay", {"linear": {"until": 99, "to": 1}}, ["train: decay: its last value 1 is not below learning_rate"]),
    ("train.decay", {"linear": {"until": 3}}, ["is 0 after step 3, but the last checkpoint is at step", "set `to`"]),
    ("train.betas", [0.9, 1], ["train.betas", "less than 1"]),
    ("train.ema_decay", [], ["train.ema_decay: name at least one"]),
    ("train.ema_decay", [0.9, 1.5], ["train.ema_decay.1", "less than 1"]),
    ("train.ema_decay", [0.9, 0.9], ["train.ema_decay: ema0.9 appears twice"]),
    ("train.ema_decay", ["rwa"], ["train.ema_decay.0: write a number", "'rwa'"]),
    ("train.ema_decay", [{"power": 0.3}], ["train.ema_decay.0.power", "less than 0.2886"]),
    ("train.ema_decay", [{"width": 0.1}], ["train.ema_decay.0.power: missing"]),
    (
        "evaluate.ema",
        [{"power": 0.1}],
        ["evaluate.ema: uni05 does not keep the average power0.1", "add it to ema_decay"],
    ),
    ("train.precision", "fp17", ["train.precision", "'bf16'", "'fp17'"]),
    ("train.micro_batch", 5, ["train: micro_batch 5 does not divide batch_size 12", "choose a divisor"]),
    ("arms.under05.train", {"micro_batch": 5}, ["arms.under05.train: micro_batch 5", "choose a divisor"]),
    ("arms.under05.train", {"batch_size": "x"}, ["arms.under05.train.batch_size", "integer", "'x'"]),
    ("diffusion.schedule", "cos", ["diffusion.schedule.cos: unknown key", "did you mean cosine?"]),
    ("diffusion.schedule", {"flow": {"shift": 0}}, ["diffusion.schedule.flow.shift", "greater than 0"]),
    ("diffusion.schedule", {"karras": {"min": 3, "max": 2}}, ["diffusion.schedule.karras: min 3", "raise max"]),
    ("diffusion.predict", "eps", ["diffusion.predict.eps: unknown key", "did you mean epsilon?"]),
    ("diffusion.loss_in", "x0", ["diffusion.loss_in", "'x_start'", "'x0'"]),
    ("arms.under05.diffusion", {"predict": "noise"}, ["arms.under05.diffusion.predict.noise: unknown key"]),
    ("arms.under05.diffusion", {"preict": "v"}, ["arms.under05.diffusion.preict: unknown key", "mean predict?"]),
    ("arms.under05.diffusion", {"timesteps": 9}, ["arms.under05.diffusion.timesteps", "set diffusion.timesteps"]),
    (
        "arms.uni05.diffusion",
        {"schedule": "flow"},
        ["arms.matched05.match: uni05 has another diffusion.schedule", "match an arm with the same schedule"],
    ),
    ("diffusion.timesteps", 1, ["diffusion.timesteps", "greater than or equal to 2"]),
    ("model", None, ["model: write keys and values", "None"]),
    ("model", {"unet": {"chanels": 32}}, ["model.unet.chanels: unknown key", "did you mean channels?"]),
    ("model", {"dit": {"widht": 32}}, ["model.dit.widht: unknown key", "did you mean width?"]),
    ("model", {"dit": {"width": 32, "heads": 3}}, ["model.dit: width 32 is not divisible by 3 heads", "change width"]),
    ("model", {"dit": {"width": 30}}, ["model.dit: width 30 is not divisible by 4", "change width"]),
    ("model", {"dit": {"patch": 3}}, ["model and dataset.image_size: image_size 32", "patches of 3", "change patch"]),
    ("model", {"dit": {"width": 30_000}}, ["parameters needs", "GB: lower its width, its depth or image_size"]),
    ("model", {"dit": {}, "unet": {}}, ["model: choose exactly one of unet, dit"]),
    (
        "model",
        {"tid": {}},
        ["model and dataset.image_size: no net has the name tid: choose from unet, dit, or add it to NETS"],
    ),
    ("model.channels", 48, ["model: channels x channel_mult", "multiple of 32", "change channels"]),
    ("model.channel_mult", [], ["model.channel_mult", "name at least one"]),
    (
        "model.attention_resolutions",
        [8],
        ["model and dataset.image_size: attention_resolutions: no level has 8", "choose from 32, 16"],
    ),
    (
        "model.head_channels",
        48,
        ["model and dataset.image_size: head_channels: 48 does not divide", "64", "choose a divisor"],
    ),
    ("model.dropout", 1, ["model.dropout", "less than 1"]),
    ("dataset.image_size", 33, ["model and dataset.image_size: image_size 33", "channel_mult", "use a multiple of 2"]),
    ("dataset.source", "cifar", ["dataset.source: cifar is unknown: choose from 'openmoji', 'folder'"]),
    ("dataset", {"image_size": 32}, ["dataset.source: missing: add it"]),
    ("dataset", {"source": "folder", "image_size": 32}, ["dataset.path: missing", "add it"]),
    ("checkpoints", [20, 10], ["checkpoints", "[20, 10]", "put them in order"]),
    ("checkpoints", [10, 10], ["checkpoints", "[10, 10]", "put them in order"]),
    ("checkpoints", [], ["checkpoints", "steps must be increasing"]),
    ("checkpoints", [0], ["checkpoints", "the last above 0"]),
    ("checkpoints", [-10, 10], ["checkpoints", "[-10, 10]", "none below 0"]),
    ("checkpoints", {"every": 50, "until": 40}, ["checkpoints", "are []"]),
    ("checkpoints", {"every": 10}, ["checkpoints.until: missing", "add it"]),
    ("checkpoints", 5, ["checkpoints", "but it is '5'"]),
    ("seeds", [0, 0], ["seeds: 0 appears twice", "remove one"]),
    ("seeds", [], ["seeds", "name at least one"]),
    ("seeds", [-1], ["seeds.0", "greater than or equal to 0"]),
    ("arms", {}, ["arms", "name at least one"]),
    ("arms.init", {}, ["arms.init: this name is reserved", "choose another"]),
    ("arms.Under-05", {}, ["arms.Under-05: use lower-case letters, digits and _"]),
    ("arms.under05", None, ["arms.under05: write keys and values", "{} for none"]),
    ("arms.under05.timesteps", "p3", ["arms.under05.timesteps.p3: unknown key"]),
    ("arms.under05.timesteps", None, ["arms.under05.timesteps: choose exactly one of", "uniform", "p2"]),
    ("arms.under05.timesteps", P2 | {"uniform": None}, ["arms.under05.timesteps: choose exactly one of"]),
    ("arms.under05.timesteps", {"p2": {"gamma": -1}}, ["arms.under05.timesteps.p2.gamma", "greater than"]),
    (
        "arms.under05.mse_weight",
        P2,
        ["arms.under05: ", "applied twice", "remove mse_weight", "weigh_twice: true"],
    ),
    ("arms.matched05.vb_weight", P2, ["arms.matched05: match sets both weights", "remove"]),
    (
        "arms.matched05.match",
        "nobody",
        ["arms.matched05.match: nobody cannot be matched", "must name another arm"],
    ),
    (
        "arms.under05.match",
        "matched05",
        ["arms.under05.match: matched05 cannot be matched", "must name another arm"],
    ),
    (
        "arms.under05.match",
        "under05",
        ["arms.under05.match: under05 cannot be matched", "must name another arm"],
    ),
    (
        "arms.matched05.importance_corrected",
        True,
        [
            "arms.matched05: match sets both weights",
            "remove mse_weight, vb_weight and importance_corrected, or remove match",
        ],
    ),
    (
        "arms.uni05.timesteps",
        "loss_second_moment",
        ["arms.matched05.match: the density of uni05 changes", "match an arm with a constant density"],
    ),
    ("arms.under05.correct_vb", False, ["arms.under05: correct_vb: false has no effect", "remove it"]),
    (
        "arms.learned",
        {"timesteps": "loss_second_moment", "importance_corrected": False, "correct_vb": False},
        ["arms.learned: correct_vb: false has no effect", "importance_corrected: true"],
    ),
    ("arms.under05.correct_vb", "perhaps", ["arms.under05.correct_vb", "boolean", "'perhaps'"]),
    ("arms.under05.stratified", "perhaps", ["arms.under05.stratified", "boolean", "'perhaps'"]),
    ("arms.under05.importance_corrected", 2, ["arms.under05.importance_corrected", "boolean", "2"]),
    *(
        (
            "arms.under05.mse_weight",
            weight,
            [f"arms.under05: draws timesteps by p2 and weights the loss by {weight}", "importance_corrected: true"],
        )
        for weight in ("min_snr", "debiased", "speed")
    ),
    *(
        (f"arms.uni05.{key}", {name: {parameter: value}}, [f"arms.uni05.{key}.{name}.{parameter}: ", expected])
        for key, name, parameter, value, expected in [
            ("timesteps", "loss_second_moment", "history", 0, "greater than 0"),
            ("timesteps", "loss_second_moment", "uniform_share", 1.5, "less than or equal to 1"),
            ("timesteps", "loss_second_moment", "uniform_share", -0.1, "greater than or equal to 0"),
            ("timesteps", "log_normal_sigma", "std", 0, "greater than 0"),
            ("timesteps", "log_normal_sigma", "mean", "inf", "finite"),
            ("timesteps", "log_normal_sigma", "sigma", 1, "unknown key; known keys: mean, std"),
            ("timesteps", "logit_normal", "std", -1, "greater than 0"),
            ("timesteps", "logit_normal", "mean", "low", "number"),
            ("timesteps", "speed", "k", 0, "greater than 0"),
            ("timesteps", "speed", "tau", 0, "greater than 0"),
            ("timesteps", "speed", "tau", 1001, "1001 exceeds the 1000 timesteps: lower it"),
            ("timesteps", "speed", "tau", 0.5, "integer"),
            ("mse_weight", "speed", "tau", 1001, "1001 exceeds the 1000 timesteps: lower it"),
            ("vb_weight", "speed", "tau", 1001, "1001 exceeds the 1000 timesteps: lower it"),
            ("mse_weight", "speed", "lam", 0.49, "greater than or equal to 0.5"),
            ("mse_weight", "speed", "lam", 1, "less than 1"),
            ("mse_weight", "min_snr", "gamma", 0, "greater than 0"),
            ("mse_weight", "debiased", "gamma", 1, "unknown key; known keys: none"),
        ]
    ),
    ("processes", 0, ["processes", "greater than 0"]),
    ("processes", 5, ["processes: 5 does not divide the batch_size 12 of uni05: choose a divisor"]),
    ("compare.baseline", "nobody", ["compare: nobody is not among the arms", "uni05, under05, matched05"]),
    ("compare.candidates", ["under05", "nobody"], ["compare: nobody is not among the arms"]),
    ("compare.primary.candidate", "uni05", ["compare.primary: uni05 is not among the candidates"]),
    ("compare.candidates", [], ["compare.candidates", "name at least one"]),
    ("compare.candidates", ["under05", "uni05"], ["compare: uni05 appears twice", "name every arm once"]),
    ("compare.candidates", ["under05", "under05"], ["compare: under05 appears twice", "name every arm once"]),
    ("compare.primary.metric", "kid", ["compare.primary.metric: kid is not evaluated: add it"]),
    ("compare.thresholds", [], ["compare.thresholds", "name at least one"]),
    ("compare.thresholds", [50, -1], ["compare.thresholds", "greater than 0"]),
    ("probe.images", 40, ["probe: images 40", "batches of batch_size 16", "set images to 32, 48"]),
    ("probe.images", 16, ["probe: images 16", "two or more whole batches"]),
    ("probe.bins", 2000, ["probe.bins: 2000 is more than the 1000 timesteps: lower it"]),
    ("dataset.held_out", 20, ["probe.batch_size: 20 held-out images", "two batches of 16", "raise dataset.held_out"]),
    ("evaluate.metrics", ["fid"], ["evaluate.metrics.0", "'fd'", "'fid'"]),
    ("sample.images", 1, ["sample.images", "greater than or equal to 2"]),
    ("model.head_channels", None, ["model: heads and head_channels are both null", "set one of them"]),
    ("model.heads", 4, ["model: heads and head_channels both set", "remove one of them"]),
    ("arms.timesteps", {"stratifed": True}, ["arms.timesteps.stratifed: unknown key", "did you mean stratified?"]),
    (
        "evaluate.weights",
        {"inception-v3-compat": {"path": "x.pth", "sha256": "abc"}},
        ["evaluate.weights.inception-v3-compat.sha256", "[0-9a-f]{64}", "'abc'"],
    ),
    # magnitudes
    *(
        (key, value, [f"{key}: input should be less than or equal to {limit}", value])
        for key, value, limit in [
            ("dataset.image_size", "8192", "4096"),
            ("dataset.held_out", "1000000001", "1000000000"),
            ("diffusion.timesteps", "1000000000", "100000"),
            ("model.res_blocks", "101", "100"),
            ("model.channels", str(10**30), "1000000000"),
            ("train.batch_size", str(10**12), "1000000"),
            ("train.learning_rate", "1e300", "1000000000000000"),
            ("train.threads", "1000000", "1024"),
            ("sample.seed", str(2**64), str(2**53)),
            ("sample.images", "10000000000", "1000000000"),
            ("probe.images", "1000000000", "1000000"),
            ("arms.uni05.mse_weight.p2.gamma", "1000", "100"),
        ]
    ),
    ("train.batch_size", "9" * 5000, ["train.batch_size: unable to parse input string as an integer", "...999"]),
    ("seeds", [2**64], [f"seeds.0: input should be less than or equal to {2**53}", str(2**64)]),
    ("seeds", [2**53 + 1], ["seeds.0: input should be less than or equal to"]),
    ("seeds", list(range(20_000)), ["arms x seeds x checkpoints: 240,000", "use fewer"]),
    ("checkpoints", {"every": 1, "until": 10**9}, ["checkpoints: these are 1,000,000,000 checkpoints", "raise every"]),
    ("checkpoints.until", 10**30, ["checkpoints.until: input should be less than or equal to 1000000000"]),
    ("model.channels", 320_000, ["model and dataset.image_size: a net of ", "GB", "lower channels"]),
    ("model.channel_mult", [1] * 11, ["model.channel_mult", "at most 10 items"]),
    ("evaluate.features", ["a", "a"], ["evaluate.features: a appears twice"]),
    ("evaluate.metrics", ["fd", "fd"], ["evaluate.metrics: fd appears twice"]),
    ("compare.thresholds", [50, 50.0], ["compare.thresholds: 50.0 appears twice"]),
    # paths
    ("external_curves", "~nosuchuser/a.csv", ["external_curves: ~nosuchuser has no home directory", "whole path"]),
    (
        "dataset",
        {"source": "folder", "path": "~nosuchuser", "image_size": 32},
        ["dataset.path: ~nosuchuser has no home directory", "write the whole path"],
    ),
    ("evaluate.weights", {"vgg16": "~nosuchuser"}, ["evaluate.weights.vgg16.path: ~nosuchuser has no home"]),
    ("name", "other", ["name is other, but the file is called study", "make them equal"]),
    ("name", "Study!", ["name: use lower-case letters", "'Study!'"]),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG, ids=[f"{key}={value}"[:80] for key, value, _ in WRONG])
def test_mistake_is_reported_with_key_and_remedy(tmp_path, key, value, expected):
    with pytest.raises(StudyError) as error:
        load(tmp_path, edited((key, value)))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'study.yaml'}: ")
    for part in expected:
        assert part in message


TEXTS = [
    ("name: study\nname: study\n", ["not valid YAML", "'name' is written twice", "line 1"]),
    ("name: study\narms:\n  a: {}\n  a: {}\n", ["'a' is written twice", "line 3"]),
    ("name: [", ["not valid YAML", "line 1"]),
    ("\x00", ["not valid YAML"]),
    ("? [a]\n: 1\n", ["not valid YAML"]),
    ("name: !!python/object/apply:os.getcwd []", ["not valid YAML", "python/object"]),
    ("", ["must contain keys with values", "name: study", "is empty"]),
    ("- name", ["must contain keys with values", "is a list"]),
    ("study", ["must contain keys with values", "is a str"]),
    ("name: " + "[" * 3000 + "]" * 3000, ["nested too deeply", "correct the file"]),
    ("name: " + "{a: " * 3000 + "}" * 3000, ["nested too deeply", "correct the file"]),
    (
        "train: {batch_size: 010}",
        ["not valid YAML", '010 is unclear: write 10 for a number, or "010" for text', "line 1"],
    ),
    ("arms: {007: {}}", ["not valid YAML", '007 is unclear: write 7 for a number, or "007" for text', "line 1"]),
    ("train: {batch_size: !!int 0x10}", ["not valid YAML", "tag:yaml.org,2002:int"]),
    ("train: {batch_size: !!timestamp x}", ["not valid YAML", "tag:yaml.org,2002:timestamp"]),
    (r'name: "a\ud800"', ["not valid YAML", r"'a\ud800' is not text"]),
    (r'name: "a\0"', ["not valid YAML", r"'a\x00' is not text"]),
    ("name: &a [*a]", ["name: input should be a valid string, but it is [[", "[...]"]),
    ("name: study\n", ["dataset: missing: add it", "arms: missing: add it", "seeds: missing: add it"]),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[repr(text)[:80] for text, _ in TEXTS])
def test_file_that_is_not_a_study_is_reported(tmp_path, text, expected):
    with pytest.raises(StudyError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'study.yaml'}: ")
    for part in expected:
        assert part in message


def test_missing_file_lists_those_that_exist(tmp_path):
    for name in ("second", "first"):
        (tmp_path / f"{name}.yaml").touch()
    with pytest.raises(StudyError, match=r"study.yaml: no such study: choose from first, second$"):
        load_experiment(tmp_path / "study.yaml")


def test_missing_file_in_an_empty_directory(tmp_path):
    with pytest.raises(StudyError, match="run this in the directory that contains experiments/"):
        load_experiment(tmp_path / "study.yaml")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe\xff")], ids=["folder", "binary"])
def test_unreadable_file_is_reported(tmp_path, make):
    make(tmp_path / "study.yaml")
    with pytest.raises(StudyError, match="study.yaml: cannot be read .* UTF-8 text"):
        load_experiment(tmp_path / "study.yaml")


def test_every_mistake_of_a_file_has_its_own_line(tmp_path):
    with pytest.raises(StudyError) as error:
        load(tmp_path, edited(("train.batch_size", 0), ("modle", {}), ("seeds", [])))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(tmp_path)) for line in lines)


def test_mapping_of_checkpoints_is_not_reported_as_a_bad_list(tmp_path):
    with pytest.raises(StudyError) as error:
        load(tmp_path, edited(("checkpoints", {"every": 10, "untill": 40})))
    assert "did you mean until?" in str(error.value) and "write a list" not in str(error.value)


def written(key: str, value: str) -> str:
    """A study file with a value of the section `train` as it is written here."""
    return yaml.safe_dump(STUDY).replace("  batch_size: 12\n", f"  batch_size: 12\n  {key}: {value}\n")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *[("learning_rate", text, 1e-4) for text in ("1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", '"1e-4"')],
        ("learning_rate", "5.", 5.0),
        ("log_every", "1_000", 1000),
        ("log_every", "+5", 5),
        ("log_every", "5.0", 5),
        ("micro_batch", "~", None),
        ("micro_batch", "", None),
        *[("random_flip", text, True) for text in ("yes", "on", "true", "True", "1")],
        *[("random_flip", text, False) for text in ("no", "off", "false", "FALSE", "0")],
    ],
)
def test_value_as_it_is_written(tmp_path, key, text, value):
    assert getattr(load(tmp_path, written(key, text)).train, key) == value


INTEGER, NUMBER = "write an integer in decimal digits, such as 16", "write a number, such as 0.5 or 1e-4"


@pytest.mark.parametrize(
    ("key", "text", "remedy"),
    [
        *[("log_every", text, INTEGER) for text in ("yes", "off", "1:30", "0x10", "0o17", "0b11", "1e3", ".5", "true")],
        *[("weight_decay", text, NUMBER) for text in ("yes", "no", "1:30", "1:30.5", "0x10", "'1,5'", ".inf", ".nan")],
        *[("weight_decay", text, NUMBER) for text in ("2024-01-01", "''")],
        ("random_flip", "2", "write a boolean, true or false"),
    ],
)
def test_value_that_is_no_number(tmp_path, key, text, remedy):
    with pytest.raises(StudyError) as error:
        load(tmp_path, written(key, text))
    value = text.strip("'")
    assert f"train.{key}: {remedy}, but it is {value!r}" in str(error.value)


@pytest.mark.parametrize("name", ["no", "y", "on", "true", "2024", "1e3", "0x10", "2024_01_01", '"010"', '"null"'])
def test_names_are_text(tmp_path, name):
    study = load(tmp_path, yaml.safe_dump(STUDY, sort_keys=False).replace("under05", name))
    name = name.strip('"')
    assert name in study.arms and name in study.compare.candidates and study.compare.primary.candidate == name


def test_numbers_of_an_arm_are_numbers(tmp_path):
    arm = load(tmp_path, edited(("arms.under05.train", {"learning_rate": "3e-5"}))).run("under05")
    assert arm.train.learning_rate == 3e-5
    with pytest.raises(StudyError, match=f"arms.under05.train.batch_size: {INTEGER}, but it is 'yes'"):
        load(tmp_path, edited(("arms.under05.train", {"batch_size": "yes"})))


def test_samples_fit_in_memory(tmp_path):
    size = ("dataset.image_size", 256), ("model.attention_resolutions", [])
    with pytest.raises(StudyError, match="sample.images: 10,000,000 need 1,966 GB: lower it"):
        load(tmp_path, edited(*size, ("sample.images", 10**7)))


def test_home_directory_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = ("external_curves", "~/a.csv"), ("evaluate.features", ["vgg16"]), ("evaluate.weights", {"vgg16": "~/w"})
    study = load(tmp_path, edited(*changes))
    assert (study.external_curves, study.evaluate.weights["vgg16"].path) == (tmp_path / "a.csv", tmp_path / "w")


@pytest.mark.parametrize(
    ("checkpoints", "steps"),
    [
        ({"every": 10, "until": 40}, [10, 20, 30, 40]),
        ({"every": 10, "until": 45}, [10, 20, 30, 40]),
        ({"every": 10, "until": 20, "start": 0}, [0, 10, 20]),
        ({"every": 10, "until": 30, "start": 5}, [5, 15, 25]),
        ([0, 1, 7], [0, 1, 7]),
    ],
)
def test_steps_of_the_checkpoints(tmp_path, checkpoints, steps):
    assert load(tmp_path, edited(("checkpoints", checkpoints))).steps == steps


def test_required_keys_are_enough(tmp_path):
    needed = {key: STUDY[key] for key in ("name", "checkpoints", "seeds")}
    study = load(tmp_path, needed | {"dataset": {"source": "openmoji", "image_size": 128}, "arms": {"plain": {}}})
    scheme = study.run("plain").scheme
    assert scheme.timesteps.chosen == ("uniform", {})
    assert scheme.mse_weight.chosen == scheme.vb_weight.chosen == ("unweighted", {})
    assert study.diffusion.timesteps == 1000


# A density or weight as written in a study file, and its name with all parameters.
DENSITIES = [
    ("uniform", ("uniform", {})),
    ("p2", ("p2", {"gamma": 0.5, "k": 1.0})),
    ("loss_second_moment", ("loss_second_moment", {"history": 10, "uniform_share": 0.001})),
    ({"loss_second_moment": {"history": 3}}, ("loss_second_moment", {"history": 3, "uniform_share": 0.001})),
    ("log_normal_sigma", ("log_normal_sigma", {"mean": -1.2, "std": 1.2})),
    ({"log_normal_sigma": {"mean": 0, "std": 2}}, ("log_normal_sigma", {"mean": 0.0, "std": 2.0})),
    ("logit_normal", ("logit_normal", {"mean": 0.0, "std": 1.0})),
    ({"logit_normal": {"mean": "-5e-1"}}, ("logit_normal", {"mean": -0.5, "std": 1.0})),
    ("speed", ("speed", {"k": 5.0, "tau": 700})),
    ({"speed": {"k": 0.5, "tau": 1000}}, ("speed", {"k": 0.5, "tau": 1000})),
]
WEIGHTS = [
    ("unweighted", ("unweighted", {})),
    ("p2", ("p2", {"gamma": 0.5, "k": 1.0})),
    ("min_snr", ("min_snr", {"gamma": 5.0})),
    ({"min_snr": {"gamma": 1}}, ("min_snr", {"gamma": 1.0})),
    ("debiased", ("debiased", {})),
    ("speed", ("speed", {"lam": 0.6, "tau": 700})),
    ({"speed": {"lam": 0.5, "tau": 1}}, ("speed", {"lam": 0.5, "tau": 1})),
]


@pytest.mark.parametrize(
    ("key", "written", "chosen"),
    [("timesteps", *case) for case in DENSITIES] + [(key, *c) for key in ("mse_weight", "vb_weight") for c in WEIGHTS],
    ids=str,
)
def test_densities_and_weights_by_name_with_or_without_parameters(tmp_path, key, written, chosen):
    run = load(tmp_path, edited(("arms.another", {key: written}))).run("another")
    assert getattr(run.scheme, key).chosen == chosen
    back = RunConfig.model_validate_json(run.canonical())
    assert back == run and getattr(back.scheme, key).chosen == chosen


def test_every_density_and_weight_can_be_chosen():
    assert {chosen[0] for _, chosen in DENSITIES} == set(Density.model_fields) == set(timesteps.DENSITIES)
    assert {chosen[0] for _, chosen in WEIGHTS} == set(Weight.model_fields) == set(losses.WEIGHTS)


@pytest.mark.parametrize(
    "arm",
    [
        {"timesteps": "p2", "mse_weight": "p2", "importance_corrected": True},
        {"timesteps": "p2", "mse_weight": "min_snr", "weigh_twice": True},
        {"timesteps": "p2", "mse_weight": "p2", "importance_corrected": True, "correct_vb": False},
        {"timesteps": "p2", "vb_weight": "p2"},
        {"timesteps": "p2", "mse_weight": "unweighted"},
        {"timesteps": "p2", "stratified": True},
        {"timesteps": "log_normal_sigma", "mse_weight": "p2"},
        {"timesteps": "speed", "mse_weight": "speed"},
        {"timesteps": "loss_second_moment", "mse_weight": "p2"},
        {"timesteps": "loss_second_moment", "correct_vb": False},
        {"timesteps": "loss_second_moment", "importance_corrected": False},
        {"timesteps": "loss_second_moment", "match": "uni05"},
        {"timesteps": "p2", "match": "uni05", "correct_vb": False},
        {"timesteps": "p2", "match": "under05", "stratified": True},
    ],
    ids=str,
)
def test_valid_combinations_of_densities_and_weights(tmp_path, arm):
    run = load(tmp_path, edited(("arms.another", arm))).run("another")
    for key in {"stratified", "importance_corrected", "correct_vb"} & arm.keys():
        assert getattr(run.scheme, key) is arm[key]
    assert RunConfig.model_validate_json(run.canonical()) == run


def test_tau_is_at_most_the_number_of_timesteps(tmp_path):
    arm = {"timesteps": {"speed": {"tau": 300}}, "mse_weight": {"speed": {"tau": 250}}}
    changes = ("diffusion.timesteps", 250), ("arms.another", arm)
    with pytest.raises(StudyError, match="arms.another.timesteps.speed.tau: 300 exceeds the 250 timesteps"):
        load(tmp_path, edited(*changes))
    arm["timesteps"] = {"speed": {"tau": 250}}
    assert load(tmp_path, edited(*changes)).run("another").scheme.timesteps.chosen[1]["tau"] == 250


def test_processes_divide_the_batch_size_of_every_arm(tmp_path):
    assert load(tmp_path, edited(("processes", 3))).processes == 3
    with pytest.raises(StudyError, match="processes: 3 does not divide the batch_size 8 of under05"):
        load(tmp_path, edited(("processes", 3), ("arms.under05.train", {"batch_size": 8})))


def test_weighting_twice_can_be_allowed(tmp_path):
    study = load(tmp_path, edited(("arms.under05.mse_weight", P2), ("arms.under05.weigh_twice", True)))
    scheme = study.run("under05").scheme
    assert scheme.timesteps.chosen == scheme.mse_weight.chosen == ("p2", {"gamma": 0.5, "k": 1.0})


def test_run_has_the_train_section_with_the_changes_of_its_arm(tmp_path):
    study = load(
        tmp_path,
        edited(("train.weight_decay", 0.1), ("arms.under05.train", {"batch_size": 6, "random_flip": True})),
    )
    plain, changed = study.run("uni05").train, study.run("under05").train
    assert (plain.batch_size, plain.random_flip, plain.weight_decay) == (12, False, 0.1)
    assert (changed.batch_size, changed.random_flip, changed.weight_decay) == (6, True, 0.1)


def test_matched_run_contains_the_scheme_of_its_target(tmp_path):
    study = load(tmp_path, STUDY)
    assert study.run("matched05").match == study.run("uni05").scheme
    assert study.run("uni05").match is None


@pytest.mark.parametrize("arm", STUDY["arms"])
@pytest.mark.parametrize(
    "changes",
    [
        [],
        [("dataset", {"source": "folder", "path": "some/images", "image_size": 32})],
        [("train.micro_batch", 4), ("diffusion.schedule", "cosine"), ("model.dropout", 0.1)],
        [
            (
                "diffusion",
                {"schedule": {"flow": {"shift": 3}}, "predict": {"edm": {"data_std": 0.3}}, "loss_in": "x_start"},
            )
        ],
        [("arms.uni05.diffusion", {"predict": "v"})],
    ],
)
def test_canonical_form_restores_the_run(tmp_path, arm, changes):
    run = load(tmp_path, edited(*changes)).run(arm)
    back = RunConfig.model_validate_json(run.canonical())
    assert run.canonical() == json.dumps(json.loads(run.canonical()), sort_keys=True)
    assert back == run
    assert back.hash8 == run.hash8
    assert back.scheme.timesteps.chosen == run.scheme.timesteps.chosen


def test_hash_is_eight_hexadecimal_digits(tmp_path):
    study = load(tmp_path, STUDY)
    hashes = [study.run(arm).hash8 for arm in study.arms]
    assert len(set(hashes)) == 3
    assert all(len(h) == 8 and int(h, 16) >= 0 for h in hashes)


UNCHANGED = [
    ("seeds", [5]),
    ("checkpoints", [1, 2]),
    ("sample", {"steps": 5, "images": 100}),
    ("evaluate", {"metrics": ["fd", "kid"]}),
    ("tracking", False),
    ("device", "cpu"),
    ("arms.another", {}),
    ("arms.uni05.mse_weight", {"p2": {"gamma": 1}}),
    ("compare", None),
    # The same settings, written in another way.
    ("diffusion", {"timesteps": 1000, "schedule": "linear"}),
    ("diffusion", {"schedule": {"linear": {}}, "predict": "epsilon", "loss_in": "prediction"}),
    ("arms.under05.diffusion", {"predict": {"epsilon": None}}),
    ("model.learn_sigma", "auto"),
    ("model.learn_sigma", True),
    ("train.learning_rate", 1e-4),
    ("train.learning_rate", "1e-4"),
    ("train.micro_batch", None),
    ("model.dropout", 0),
    ("arms.under05.timesteps", "p2"),
    ("arms.under05.timesteps", {"p2": None}),
    ("arms.under05.mse_weight", "unweighted"),
    ("arms.under05.train", {"batch_size": 12}),
    ("arms.under05.weigh_twice", True),
    ("arms.under05.stratified", False),
    ("arms.under05.importance_corrected", None),
    ("processes", 3),
]


@pytest.mark.parametrize(("key", "value"), UNCHANGED, ids=str)
def test_hash_ignores_keys_that_do_not_determine_the_run(tmp_path, key, value):
    before, after = load(tmp_path, STUDY), load(tmp_path, edited((key, value)))
    assert after.run("under05").hash8 == before.run("under05").hash8


def test_hash_ignores_the_order_of_keys(tmp_path):
    def reverse(value: Any) -> Any:
        return {k: reverse(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    before, after = load(tmp_path, STUDY), load(tmp_path, reverse(STUDY))
    assert list(after.arms) == list(reversed(before.arms))
    assert [after.run(arm).hash8 for arm in before.arms] == [before.run(arm).hash8 for arm in before.arms]


SHARED = [
    ("dataset.image_size", 64),
    ("dataset", {"source": "folder", "path": "some/images", "image_size": 32}),
    ("model.res_blocks", 2),
    ("model.dropout", 0.1),
    ("diffusion.timesteps", 500),
    ("diffusion.schedule", "cosine"),
    ("diffusion.schedule", "flow"),
    ("diffusion.predict", "v"),
    ("diffusion.loss_in", "x_start"),
    ("arms.under05.diffusion", {"predict": "x_start"}),
    ("model.learn_sigma", False),
]
OWN = [
    ("train.batch_size", 24),
    ("train.threads", 2),
    ("arms.under05.train", {"learning_rate": 1e-3}),
    ("arms.under05.timesteps", "uniform"),
    ("arms.under05.timesteps", {"p2": {"gamma": 0.6}}),
    ("arms.under05.vb_weight", P2),
    ("arms.under05.match", "uni05"),
    ("arms.under05.stratified", True),
    ("arms.under05.importance_corrected", True),
    ("arms.under05", {"timesteps": "speed"}),
    ("arms.under05", {"timesteps": {"loss_second_moment": {"history": 9}}}),
]


@pytest.mark.parametrize(
    ("key", "value", "same_start"),
    [(*change, False) for change in SHARED] + [(*change, True) for change in OWN],
    ids=str,
)
def test_hash_changes_with_keys_that_determine_the_run(tmp_path, key, value, same_start):
    before = load(tmp_path, edited(("model.attention_resolutions", [])))
    after = load(tmp_path, edited(("model.attention_resolutions", []), (key, value)))
    assert after.run("under05").hash8 != before.run("under05").hash8
    assert (after.run("under05").initial.hash8 == before.run("under05").initial.hash8) is same_start


def test_hash_of_a_matched_run_changes_with_its_target(tmp_path):
    before, after = (
        load(tmp_path, STUDY),
        load(tmp_path, edited(("arms.uni05.mse_weight", {"p2": {"gamma": 1}}))),
    )
    assert after.run("matched05").hash8 != before.run("matched05").hash8


def test_hash_changes_with_the_train_version(tmp_path, monkeypatch):
    before = load(tmp_path, STUDY).run("under05")
    monkeypatch.setattr("convergence.schema.TRAIN_VERSION", before.train_version + 1)
    after = load(tmp_path, STUDY).run("under05")
    assert after.hash8 != before.hash8 and after.initial.hash8 != before.initial.hash8


def test_hashes_of_the_default_study_stay():
    """A changed hash makes all existing results of a study orphans.

    If what a run computes has changed, increase `TRAIN_VERSION` and write the new hashes here. If a key was added, list
    it in `LATER_KEYS` instead. A changed default changes the hash of the studies that use the default.
    """
    study = load_experiment(Path(__file__).resolve().parents[1] / "experiments/openmoji.yaml")
    assert TRAIN_VERSION == 2
    assert {arm: study.run(arm).hash8 for arm in study.arms} == {"uni05": "7d4d5ca1", "under05": "78f0a69b"}
    assert study.run("uni05").initial.hash8 == "09733dad"


def test_both_forms_of_a_unet_are_the_same_run(tmp_path):
    short, named = (load(tmp_path, edited(("model", keys))) for keys in (STUDY["model"], {"unet": STUDY["model"]}))
    assert named.run("uni05") == short.run("uni05") and named.run("uni05").hash8 == short.run("uni05").hash8


def test_the_keys_of_a_net_of_ones_own_are_numbers_or_text(tmp_path, monkeypatch):
    class Mine(torch.nn.Conv2d):
        def __init__(self, image_size, learn_sigma, **keys):
            super().__init__(3, 3, 1)
            assert keys == {"width": 8, "rate": 1e-4, "sizes": [4, "four"], "wide": True, "kind": "no"}

        def forward(self, x, t):
            return super().forward(x)

    monkeypatch.setitem(NETS, "mine", Mine)
    keys = "{learn_sigma: false, width: 8, rate: 1e-4, sizes: [4, four], wide: true, kind: no}"
    text = yaml.safe_dump(STUDY | {"model": "MODEL"}).replace("MODEL", f"{{mine: {keys}}}")
    run = load(tmp_path, text).run("uni05")
    assert RunConfig.model_validate_json(run.canonical()) == run
    with pytest.raises(StudyError, match=r"mine: its output has the shape \[1, 3, 32, 32\], not \[1, 6, 32, 32\]"):
        load(tmp_path, text.replace("learn_sigma: false", "learn_sigma: true"))


def test_canonical_form_of_a_dit_restores_its_run(tmp_path):
    run = load(tmp_path, edited(("model", {"dit": {"patch": 4}}))).run("uni05")
    keys = {"patch": 4, "width": 384, "depth": 12, "heads": 6, "learn_sigma": True}
    assert json.loads(run.canonical())["model"] == {"dit": keys}
    assert RunConfig.model_validate_json(run.canonical()) == run
    assert run.hash8 != load(tmp_path, edited(("model", {"dit": {"patch": 8}}))).run("uni05").hash8


def test_canonical_form_has_every_key_with_its_value(tmp_path):
    run = load(tmp_path, edited(("arms.under05.train", {"learning_rate": "2e-3"}))).run("under05")
    assert json.loads(run.canonical()) == {
        "dataset": {"source": "openmoji", "image_size": 32, "held_out": 0},
        "model": {
            "channels": 32, "channel_mult": [1, 2], "res_blocks": 1, "attention_resolutions": [16], "head_channels": 16,
            "heads": None, "scale_shift_norm": True, "resblock_updown": True, "learn_sigma": True, "dropout": 0.0,
        },
        "diffusion": {"timesteps": 1000, "schedule": "linear"},
        "train": {
            "batch_size": 12, "micro_batch": None, "learning_rate": 0.002, "learning_rate_warmup": 0,
            "weight_decay": 0.0, "ema_decay": 0.9999, "ema_warmup": True, "random_flip": False, "precision": "auto",
            "threads": 1, "log_every": 50,
        },
        "scheme": {
            # Only the chosen function, so that another density or weight can be added later.
            "timesteps": {"p2": {"gamma": 0.5, "k": 1.0}}, "stratified": False, "mse_weight": {"unweighted": {}},
            "vb_weight": {"unweighted": {}}, "importance_corrected": None, "correct_vb": True,
        },
        "match": None,
        "train_version": 2,
    }  # fmt: skip


def test_changed_default_changes_the_hash():
    class Longer(Train):
        batch_size: int = 512

    assert Longer().hash8 != Train().hash8 == Longer(batch_size=256).hash8


class LaterTrain(Train):
    """The section `train` after a key was added."""

    nesterov: bool = False


class LaterBase(Initial):
    """The section that `RunConfig` inherits from, after a key was added."""

    latent: int = 0


class LaterChild(LaterBase):
    """A section that inherits the added key."""


class LaterRun(RunConfig):
    """A run with the added key."""

    train: LaterTrain


def test_key_that_is_added_later_renames_no_run(tmp_path, monkeypatch):
    """An example of what to do for a new key: list it in `LATER_KEYS`."""
    old = load(tmp_path, STUDY).run("under05")
    content = dict(old) | {"train": old.train.model_dump()}
    default, other = LaterRun(**content), LaterRun(**content | {"train": {"nesterov": True}})
    assert default.hash8 != old.hash8
    monkeypatch.setattr("diffusion.section.LATER_KEYS", (*LATER_KEYS, "LaterTrain.nesterov"))
    assert default.hash8 == old.hash8 != other.hash8
    assert "nesterov" not in default.canonical() and json.loads(other.canonical())["train"]["nesterov"]
    # The key is part of other forms, and each canonical form restores its run.
    assert default.model_dump()["train"]["nesterov"] is False
    for run in (default, other):
        assert LaterRun.model_validate_json(run.canonical()) == run


def test_later_key_of_a_base_class_renames_no_section_that_inherits_it(tmp_path, monkeypatch):
    content = dict(load(tmp_path, STUDY).run("under05").initial)
    default, other = LaterChild(**content), LaterChild(**content, latent=1)
    assert "latent" in default.canonical()
    monkeypatch.setattr("diffusion.section.LATER_KEYS", (*LATER_KEYS, "LaterBase.latent"))
    assert default.hash8 == Initial(**content).hash8 != other.hash8
    assert LaterChild.model_validate_json(other.canonical()) == other


DATASETS = [
    {"source": "openmoji", "image_size": 32},
    {"source": "folder", "path": "images", "image_size": 32},
    {"source": "folder", "path": "images", "image_size": 32, "pad": 2},
    {"source": "torchvision", "name": "CIFAR10", "image_size": 32},
    {"source": "torchvision", "name": "CIFAR10", "splits": ["train", "test"], "image_size": 32},
    {"source": "huggingface", "name": "cifar10", "image_size": 32},
    {"source": "huggingface", "name": "cifar10", "revision": "abc", "image_size": 32},
]


def test_dataset_directory_depends_on_all_keys_but_held_out():
    adapter = TypeAdapter(Dataset)
    directories = {layout.dataset_directory(adapter.validate_python(content)).name for content in DATASETS}
    assert len(directories) == len(DATASETS)
    for content in DATASETS:
        dataset = adapter.validate_python(content)
        directory = layout.dataset_directory(dataset)
        assert directory.name.startswith(f"{dataset.source}-")
        held_out = adapter.validate_python(content | {"held_out": 7})
        assert layout.dataset_directory(held_out) == directory and held_out.held_out == 7
        assert layout.dataset_directory(adapter.validate_python(dict(reversed(content.items())))) == directory
        assert adapter.validate_json(layout.pixels(held_out)) == dataset


def test_all_arms_of_a_study_start_from_the_same_weights(tmp_path):
    study = load(tmp_path, edited(("arms.under05.train", {"learning_rate": 1e-3, "batch_size": 6})))
    assert len({study.run(arm).initial.hash8 for arm in study.arms}) == 1


def test_micro_batch_of_an_arm_divides_the_batch_size_of_the_study(tmp_path):
    # 3 divides the study's 12, but not the default batch size.
    study = load(tmp_path, edited(("arms.under05.train", {"micro_batch": 3})))
    assert study.run("under05").train.micro_batch == 3


def test_batch_size_of_an_arm_must_be_a_multiple_of_the_micro_batch_of_the_study(tmp_path):
    with pytest.raises(StudyError, match="arms.under05.train: micro_batch 4 does not divide batch_size 6"):
        load(tmp_path, edited(("train.micro_batch", 4), ("arms.under05.train", {"batch_size": 6})))


@pytest.mark.parametrize(
    ("sample", "remedy"),
    [
        ({"steps": 333}, "use 334"),
        ({"steps": 1001}, "use 1000"),
        ({"sampler": "ddpm", "steps": 1001}, "use 2 to 1000"),
        ({"sampler": "ddpm", "steps": 1}, "use 2 to 1000"),
        ({"sampler": "heun", "steps": 333}, "use 334"),
    ],
)
def test_sampling_steps_fit_the_timesteps(tmp_path, sample, remedy):
    with pytest.raises(StudyError, match=f"sample: steps: .*: {remedy}$"):
        load(tmp_path, edited(("sample", sample)))


def test_the_sampler_fits_the_path_of_every_arm(tmp_path):
    flow = ("arms.under05.diffusion", {"schedule": "flow"})
    assert load(tmp_path, edited(("sample", {"sampler": "dpm", "steps": 334}), flow)).sample.sampler == "dpm"
    with pytest.raises(StudyError, match="sample: sampler: ddpm needs .*: use ddim, heun or dpm$"):
        load(tmp_path, edited(("sample", {"sampler": "ddpm"}), flow))
    with pytest.raises(StudyError, match="sample: steps: 1001 is not possible .*: use 1 to 1000$"):
        load(tmp_path, edited(("sample.steps", 1001), ("diffusion.schedule", "flow")))
    assert load(tmp_path, edited(("sample.steps", 333), ("diffusion.schedule", "flow"))).sample.steps == 333


def test_an_arm_overrides_keys_of_diffusion_and_predicts_a_variance_only_where_there_is_a_bound(tmp_path):
    study = load(tmp_path, edited(("arms.under05.diffusion", {"predict": "v"}), ("diffusion.schedule", "cosine")))
    plain, changed = study.run("uni05"), study.run("under05")
    assert changed.diffusion.predict.chosen == ("v", {}) and changed.diffusion.schedule == plain.diffusion.schedule
    assert (plain.model.learn_sigma, changed.model.learn_sigma) == (True, False)
    assert changed.diffusion.model_dump() == {
        "timesteps": 1000, "schedule": "cosine", "predict": "v", "loss_in": "prediction"
    }  # fmt: skip


@pytest.mark.parametrize(
    "diffusion", [{"schedule": "flow"}, {"schedule": "karras"}, {"predict": "v"}, {"predict": "edm"}], ids=str
)
def test_a_learned_variance_without_a_bound_is_refused(tmp_path, diffusion):
    with pytest.raises(StudyError, match="arms.under05: model: learn_sigma: true needs a variational bound.*: remove"):
        load(tmp_path, edited(("model.learn_sigma", True), ("arms.under05.diffusion", diffusion)))


def test_a_matched_run_knows_what_the_net_of_its_target_predicts(tmp_path):
    study = load(tmp_path, edited(("arms.uni05.diffusion", {"predict": "v"})))
    assert study.run("matched05").match_diffusion == study.run("uni05").diffusion
    same = load(tmp_path, edited(("diffusion.predict", "v")))
    assert same.run("matched05").match_diffusion is None
