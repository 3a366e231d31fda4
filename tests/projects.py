"""The project as a user has it: a copy in its own directory, run by a real Snakemake."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from made import scenes
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
REPORT = Path("reports/openmoji")
TINY_MODEL = {"channels": 32, "channel_mult": [1], "res_blocks": 1, "attention_resolutions": [], "head_channels": 32}
PARTS = ["Snakefile", "workflow", "diffusion", "convergence", "experiments", "profiles", "environment.yml"]


def copy_project(destination):
    destination.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        source, target = ROOT / part, destination / part
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return destination


def snakemake(project, *arguments, target="reports/fid_curves.png", timeout=900):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments, "--", target]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=timeout)


def edit(project, change, study="openmoji"):
    path = project / f"experiments/{study}.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def reduce(study):
    study["seeds"] = [0, 1]
    study["train"] |= {"batch_size": 8, "log_every": 2}
    study["checkpoints"] = {"start": 0, "every": 4, "until": 8}
    study["sample"]["images"] = 12
    study["evaluate"] |= {"metrics": ["fd"], "reference_images": 40}
    study["probe"] = {"images": 8, "batch_size": 4, "bins": 3}


def tiny_project(destination):
    """The project with a study of eight pictures and one seed, which runs in half a minute."""
    project = copy_project(destination)
    write_pictures(project)
    edit(project, reduce)
    edit(project, shrink)
    return project


def write_pictures(project):
    (project / "pictures").mkdir()
    for index, image in enumerate(scenes(8, seed=0, size=16)):
        Image.fromarray(image).save(project / f"pictures/{index}.png")


def shrink(study):
    study |= {"dataset": {"source": "folder", "path": "pictures", "image_size": 16}, "model": TINY_MODEL, "seeds": [0]}
    study["sample"] |= {"images": 8, "steps": 2}
    study["evaluate"].pop("reference_images")
    study["probe"]["batch_size"] = 2


def jobs(project, *arguments):
    """The message of each job that a dry run lists, without hashes, such as "Train openmoji uni05 seed 0 to step 4"."""
    done = snakemake(project, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    messages = re.findall(r"^Job \d+: (.*)$", done.stdout + done.stderr, re.M)
    return sorted({re.sub(r"-[0-9a-f]{8}", "", message) for message in messages})


def assert_equal_results(ours, theirs):
    """Images and weights are equal in every byte, metrics in value; times and provenance may differ."""
    for path in sorted(theirs.glob("results/**/*")):
        if path.name in ("weights.safetensors", "images.npy"):
            assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes(), path
    for table in ("metrics.csv", "mechanism.csv"):
        found, expected = (
            pd.read_csv(root / REPORT / table).drop(columns="contended_seconds") for root in (ours, theirs)
        )
        pd.testing.assert_frame_equal(found, expected)
    left = [path for path in ours.glob("results/**/.*") if not path.name.endswith(".lock")]
    assert not left and not list(ours.glob("results/**/state.partial.pt"))


def assert_tracked_once(project):
    """Each run of the reduced study is finished in MLflow and has each of its steps once."""
    database = sqlite3.connect(f"file:{project}/mlflow.db?mode=ro", uri=True)
    runs = database.execute("select name, status from runs").fetchall()
    seeds = yaml.safe_load((project / "experiments/openmoji.yaml").read_text())["seeds"]
    names = ["openmoji", *(f"{arm} seed {k}" for arm in ("uni05", "under05") for k in seeds)]
    assert sorted(runs) == sorted((name, "FINISHED") for name in names)
    points = "select r.name, m.step, count(*) from metrics m join runs r on r.run_uuid = m.run_uuid where m.key = ?"
    for metric, expected in (("train/loss", [16, 32, 48, 64]), ("eval/fd efficientnet-lite0", [0, 32, 64])):
        rows = database.execute(f"{points} group by r.name, m.step", [metric]).fetchall()
        assert len(rows) == (len(names) - 1) * len(expected)
        assert all(count == 1 for *_, count in rows) and sorted({step for _, step, _ in rows}) == expected
