"""Wrong input of every kind to the commands of a user: one clear sentence, no traceback, and no file written."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from projects import ROOT, copy_project
from safetensors.torch import save_file

from convergence import layout
from convergence.study_file import load_experiment

DRY_RUN = ["snakemake", "--cores", "1", "--dry-run", "--config", "experiments=bad"]
DATASET = ["snakemake", "--cores", "1", "--config", "experiments=bad", "tracking=off", "--", "reports/bad/metrics.csv"]
STUDY = yaml.safe_load((ROOT / "experiments/openmoji.yaml").read_text()) | {"name": "bad"}


def study(**sections):
    """Write the default study with these sections merged into it; None removes one."""

    def prepare(project):
        content = {key: value for key, value in STUDY.items() if sections.get(key, 0) is not None}
        for key, value in sections.items():
            if value is not None:
                content[key] = (
                    content[key] | value if isinstance(content.get(key), dict) and isinstance(value, dict) else value
                )
        (project / "experiments/bad.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    return prepare


def trials(**tune):
    return study(tune={"learning_rate": [1e-3], "seeds": [100], "until": 128} | tune)


def text(content):
    return lambda project: (project / "experiments/bad.yaml").write_text(content)


def folder(write):
    """Write a study of a folder or zip; `write` fills the folder."""

    def prepare(project):
        (project / "pictures").mkdir()
        write(project / "pictures")
        study(dataset=None)(project)
        content = yaml.safe_load((project / "experiments/bad.yaml").read_text())
        content["dataset"] = {"source": "folder", "path": "pictures", "image_size": 16}
        content["probe"] = None
        del content["evaluate"]["reference_images"]
        (project / "experiments/bad.yaml").write_text(yaml.safe_dump(content))

    return prepare


def few(project):
    folder(images)(project)
    path = project / "experiments/bad.yaml"
    content = yaml.safe_load(path.read_text())
    content["evaluate"]["reference_images"] = 2000
    path.write_text(yaml.safe_dump(content))


def images(place, count=4, size=20):
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")


def half_readable(place):
    images(place)
    (place / "5.png").write_bytes(b"no picture")


def bomb(place):
    images(place)
    Image.new("1", (20_000, 20_000)).save(place / "bomb.png")


def broken_zip(project):
    folder(images)(project)
    shutil.make_archive(str(project / "all"), "zip", project / "pictures")
    shutil.rmtree(project / "pictures")
    (project / "pictures").write_bytes((project / "all.zip").read_bytes()[:-30])


def evil_zip(project):
    folder(images)(project)
    with zipfile.ZipFile(project / "all.zip", "w") as archive:
        archive.writestr("../../escaped.png", b"no picture")
    shutil.rmtree(project / "pictures")
    (project / "all.zip").rename(project / "pictures")


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


def checkpoint(name, content):
    return lambda project: (project / name).write_bytes(content)


def pickled(project):
    torch.save({"weight": Code()}, project / "evil.pt")


def plain(project):
    torch.save({"weight": torch.zeros(1)}, project / "plain.pt")


def damaged_manifest(project):
    study()(project)
    experiment = load_experiment(project / "experiments/bad.yaml")
    manifest = project / layout.dataset_directory(experiment.dataset) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")


def damaged_weights(project):
    (project / "results").mkdir()
    (project / "results/a.safetensors").write_bytes(b"\x08")


def metrics(project):
    header = "study,arm,seed,step,images,contended_seconds,features,metric,value,stderr,n,reason\n"
    rows = [f"small,{arm},0,100,3200,50,lite0,fd,10.0,,500,\n" for arm in ("base", "cand")]
    (project / "metrics.csv").write_text(header + "".join(rows))


def two_sizes(project):
    (project / "mixed").mkdir()
    for name, size in (("a", 8), ("b", 16)):
        Image.new("RGB", (size, size)).save(project / "mixed" / f"{name}.png")


def wrong_weights(project):
    (project / "mine.pth").write_bytes(b"others")
    study(evaluate={"features": ["inception-v3-compat"], "weights": {"inception-v3-compat": "mine.pth"}})(project)


P2 = {"p2": {"gamma": 0.5}}
SAMPLE = ["-m", "convergence", "sample", "--out", "samples"]
TABLE = {
    "average that is not kept": (
        DRY_RUN,
        study(evaluate={"ema": [0.999, {"power": 0.1}]}),
        [
            "evaluate.ema: uni05 does not keep the average power0.1 (it keeps ema0.999)",
            "add it to ema_decay, or remove it",
        ],
    ),
    # config
    "unknown key": (DRY_RUN, study(train={"batchsize": 3}), ["train.batchsize", "did you mean batch_size?"]),
    "a word for a number": (DRY_RUN, study(train={"learning_rate": "fast"}), ["train.learning_rate", "'fast'"]),
    "negative number": (DRY_RUN, study(train={"batch_size": -1}), ["train.batch_size", "greater than 0"]),
    "infinite number": (DRY_RUN, study(train={"learning_rate": "inf"}), ["train.learning_rate", "finite"]),
    "key written twice": (DRY_RUN, text("name: bad\nname: bad\n"), ["bad.yaml", "'name' is written twice"]),
    "no YAML": (DRY_RUN, text("name: [bad\n"), ["bad.yaml", "not valid YAML"]),
    "empty file": (DRY_RUN, text(""), ["bad.yaml", "must contain keys with values"]),
    "no text": (DRY_RUN, lambda p: (p / "experiments/bad.yaml").write_bytes(b"\xff\xfe"), ["cannot be read", "UTF-8"]),
    "code in YAML": (DRY_RUN, text("name: !!python/object/apply:os.system ['touch owned']\n"), ["not valid YAML"]),
    "missing section": (DRY_RUN, study(dataset=None), ["bad.yaml", "dataset"]),
    "unknown density": (DRY_RUN, study(arms={"a": {"timesteps": "p3"}}), ["arms.a.timesteps", "p3"]),
    "weighting twice": (DRY_RUN, study(arms={"a": {"timesteps": P2, "mse_weight": P2}}), ["applied twice"]),
    "match to an unknown arm": (
        DRY_RUN,
        study(arms={"a": {"timesteps": P2, "match": "b"}}),
        ["arms.a.match", "another arm"],
    ),
    "nested too deeply": (DRY_RUN, text("a: " + "[" * 3000 + "]" * 3000), ["bad.yaml", "nested too deeply"]),
    "a path that is too long": (
        DRY_RUN,
        study(dataset={"source": "folder", "path": "x" * 5000}),
        ["File name too long: correct the path"],
    ),
    "results that are a link to nothing": (
        DRY_RUN,
        lambda p: (study()(p), (p / "results").symlink_to("/nowhere/else")),
        ["results is a link to /nowhere/else, which does not exist"],
    ),
    "steps in disorder": (DRY_RUN, study(checkpoints=[8, 4]), ["checkpoints", "put them in order"]),
    "size that cannot be halved": (DRY_RUN, study(dataset={"image_size": 15}), ["cannot be halved", "multiple of 2"]),
    "comparison with an unknown arm": (DRY_RUN, study(compare={"baseline": "b"}), ["compare: b is not among the arms"]),
    "empty grid": (DRY_RUN, trials(learning_rate=[]), ["tune.learning_rate: name at least one"]),
    "tuned key without numbers": (DRY_RUN, trials(precision=[1]), ["tune.precision: no arm has a number"]),
    "trial with a planned seed": (DRY_RUN, trials(seeds=[2, 100]), ["tune.seeds: 2 is", "other seeds"]),
    "trial until no checkpoint": (DRY_RUN, trials(until=100), ["tune.until: 100 is not", "use 128"]),
    "more bins than timesteps": (DRY_RUN, study(probe={"bins": 2000}), ["probe.bins", "lower it"]),
    "another name": (DRY_RUN, study(name="good"), ["name is good", "make them equal"]),
    "the name of another directory": (DRY_RUN, study(name="published"), ["name: ", "choose another"]),
    "a path for a name": (DRY_RUN, study(name="../bad"), ["name: use lower-case letters"]),
    # data
    "no such folder": (DRY_RUN, study(dataset={"source": "folder", "path": "no"}), ["dataset", "no"]),
    "fewer images than needed": (DRY_RUN, few, ["evaluate.reference_images: 2000", "the 4 images", "lower it"]),
    "one image": (DRY_RUN, folder(lambda place: images(place, 1)), ["bad.yaml: dataset: ", "at least 2 images"]),
    "no such class of torchvision": (
        DATASET,
        study(dataset={"source": "torchvision", "name": "Flower", "held_out": 0}),
        ["dataset: name: torchvision has no dataset Flower"],
    ),
    "external curves that do not exist": (
        DRY_RUN,
        study(external_curves="no.csv"),
        ["external_curves: no.csv does not"],
    ),
    "folder without images": (DATASET, folder(lambda place: None), ["dataset: there are no images in pictures"]),
    "unreadable images": (DATASET, folder(half_readable), ["1 of the 5 images", "cannot be used"]),
    "decompression bomb": (DATASET, folder(bomb), ["bomb.png", "DecompressionBomb"]),
    "truncated zip": (DATASET, broken_zip, ["there are no images in", "a complete zip"]),
    "zip that leaves its folder": (DRY_RUN, evil_zip, ["dataset: there are no images in pictures"]),
    "damaged dataset": (
        DRY_RUN,
        damaged_manifest,
        ["manifest.json: is damaged", ": delete it and run the same command"],
    ),
    "damaged dataset to carry": (
        ["-m", "convergence", "carry", "collect", "bad"],
        damaged_manifest,
        ["manifest.json: is damaged", ": delete it and run the study again"],
    ),
    # checkpoints
    "no such checkpoint": ([*SAMPLE, "no.safetensors"], None, ["no.safetensors"]),
    "truncated checkpoint": (
        [*SAMPLE, "a.safetensors"],
        checkpoint("a.safetensors", b"\x08"),
        ["a.safetensors: ", "name another"],
    ),
    "damaged checkpoint of a study": (
        [*SAMPLE, "results/a.safetensors"],
        damaged_weights,
        ["results/a.safetensors: ", ": delete it and run the study again"],
    ),
    "foreign safetensors": (
        [*SAMPLE, "b.safetensors"],
        lambda p: save_file({"w": torch.zeros(2)}, p / "b.safetensors"),
        ["b.safetensors", "checkpoint"],
    ),
    "code in a checkpoint": ([*SAMPLE, "evil.pt", "--image-size", "16"], pickled, ["evil.pt"]),
    "published checkpoint of unknown size": ([*SAMPLE, "plain.pt"], plain, ["--image-size"]),
    # environment
    "weights of others": (DRY_RUN, wrong_weights, ["bad.yaml", "evaluate.features", "mine.pth", "sha256"]),
    "unknown extractor": (DRY_RUN, study(evaluate={"features": ["vgg"]}), ["evaluate.features", "'vgg': choose from"]),
    # command line
    "unknown study": (
        [*DRY_RUN[:-1], "experiments=opnmoji"],
        None,
        ["opnmoji.yaml", "choose from fair16, fashion_mnist"],
    ),
    "unknown option": ([*DRY_RUN[:-1], "experiment=bad"], None, ["--config experiment: unknown key"]),
    "tracking half": ([*DRY_RUN, "tracking=half"], study(), ["--config tracking=half", "tracking=off"]),
    "plan from nothing": (
        ["-m", "convergence", "plan", "no.csv", "--baseline", "a", "--candidate", "b", "--effect", "2%"],
        None,
        ["no.csv: not a table", "name a CSV file"],
    ),
    "plan from one seed": (
        [
            "-m",
            "convergence",
            "plan",
            "metrics.csv",
            "--baseline",
            "base",
            "--candidate",
            "cand",
            "--effect",
            "2%",
        ],
        metrics,
        ["1 pairs of base and cand", "train more seeds"],
    ),
    "plan for an unknown arm": (
        ["-m", "convergence", "plan", "metrics.csv", "--baseline", "base", "--candidate", "c", "--effect", "2%"],
        metrics,
        ["metrics.csv: there is no arm c: choose one of base, cand"],
    ),
    "no effect": (
        ["-m", "convergence", "plan", "metrics.csv", "--baseline", "a", "--candidate", "b", "--effect", "0"],
        metrics,
        ["'--effect': 0 ", "write it as 2% or 0.02"],
    ),
    "budget at no speed": (
        ["-m", "convergence", "budget", "openmoji", "--train-rate", "0"],
        None,
        ["'--train-rate': 0", "in the range"],
    ),
    "budget of nothing": (
        ["-m", "convergence", "budget", "opnmoji"],
        None,
        ["opnmoji.yaml", "choose from fair16, fashion_mnist"],
    ),
    "orphans of a broken study": (["-m", "convergence", "orphans", "--remove"], text("name: [\n"), ["bad.yaml"]),
    "images of two sizes": (
        ["-m", "convergence", "evaluate", "mixed", "mixed"],
        two_sizes,
        ["mixed: b.png has 16x16 pixels, but the first image has 8x8", "resize all images to one size"],
    ),
    "unknown metric": (["-m", "convergence", "evaluate", "a", "b", "--metrics", "fid"], None, ["'fid'", "'fd'"]),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("bad"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_one_clear_sentence(project, tmp_path, name):
    command, prepare, parts = TABLE[name]
    here = tmp_path / "study"
    shutil.copytree(project, here, symlinks=True)
    if prepare:
        prepare(here)
    before = digests(here)
    command = ["-m", *command] if command[0] == "snakemake" else command
    environment = os.environ | {"PYTHONPATH": str(here), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, *command], cwd=here, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0 and not any("Traceback" in line for line in lines), lines
    assert any(all(part in line for part in parts) for line in lines), lines
    print(f"\n| {name} | {max(lines, key=lambda line: sum(part in line for part in parts))} |")
    assert digests(here) == before and not (here / "owned").exists()


def digests(place):
    """Digests of all files but logs, those of Snakemake, and what Snakemake's start records about studies."""
    left_out = {".snakemake", "__pycache__", "studies", "plan.json"}
    kept = [path for path in place.rglob("*") if path.is_file() and not left_out & set(path.parts)]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept if path.suffix != ".log"}
