"""A folder of images that has changed since its dataset was prepared."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image
from projects import ROOT, copy_project, edit, snakemake

from convergence import layout, start_warnings
from convergence.study_file import load_experiment
from diffusion.data.folder import prepare_folder


def save(path):
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(path)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of eight images, with its dataset prepared."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pictures").mkdir()
    for index in range(8):
        save(f"my pictures/{index}.png")
    (tmp_path / "experiments").mkdir()
    content = yaml.safe_load((ROOT / "experiments/openmoji.yaml").read_text()) | {"name": "mine", "probe": None}
    content["dataset"] = {"source": "folder", "path": "my pictures", "image_size": 16}
    content["evaluate"] = {"features": ["efficientnet-lite0"]}
    (tmp_path / "experiments/mine.yaml").write_text(yaml.safe_dump(content))
    experiment = load()
    prepare_folder(layout.dataset_directory(experiment.dataset), experiment.dataset.path, 16)
    return experiment


def load():
    return load_experiment(layout.study_file("mine"))


def warnings(*experiments):
    return list(start_warnings.changed_folders(experiments))


def add(folder):
    save(folder / "9.jfif")
    os.utime(folder / "9.jfif", (1, 1))


def remove(folder):
    (folder / "1.png").unlink()
    (folder / "2.png").unlink()


def enlarge(folder):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes() + b"!")


def touch(folder):
    os.utime(folder / "4.png", (1, 1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([add], "1 added"),
        ([remove], "2 removed"),
        ([enlarge], "1 with another size"),
        ([touch], "1 with another modification time"),
        ([add, remove, enlarge, touch], "1 added, 2 removed, 1 with another size, 1 with another modification time"),
    ],
)
def test_changes_of_a_folder_are_counted(study, changes, text):
    folder = study.dataset.path
    (folder / "notes.txt").touch()
    assert warnings(study, study) == []
    for change in changes:
        change(folder)
    (warning,) = warnings(study, study)
    assert warning.startswith("my pictures has changed since results/datasets/folder-") and f"({text})" in warning


def test_the_command_makes_a_new_dataset_and_keeps_the_old_one(study):
    add(study.dataset.path)
    (study.dataset.path.with_name("my pictures-2")).symlink_to("nowhere")
    (warning,) = warnings(study)
    command, path = re.search(r"run `(.*)` and set dataset.path: (.*) in experiments/mine.yaml$", warning).groups()
    subprocess.run(command, shell=True, check=True)
    edit(study.dataset.path.parent, lambda content: content["dataset"].update(path=path), "mine")
    new = load()
    directory = layout.dataset_directory(new.dataset)
    assert path == "my pictures-3" and directory != layout.dataset_directory(study.dataset)
    prepare_folder(directory, new.dataset.path, 16)
    assert len(np.load(directory / "images.npy")) == 9 and warnings(new) == []


@pytest.mark.parametrize("path", [".", "..", "/data/a.b/"])
def test_any_path_has_a_new_name_next_to_it(tmp_path, monkeypatch, path):
    (tmp_path / "x/y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x/y")
    remedy = start_warnings._remedy(layout.Path(path), "mine")
    expected = {".": f"y {tmp_path}/x/y-2", "..": f"x {tmp_path}/x-2", "/data/a.b/": "a.b /data/a-2.b"}[path]
    assert f"`ln -s {expected}`" in remedy


def test_a_zip_file_is_compared_as_a_whole(study, tmp_path):
    shutil.make_archive("all", "zip", study.dataset.path)
    edit(tmp_path, lambda content: content["dataset"].update(path="all.zip"), "mine")
    study = load()
    prepare_folder(layout.dataset_directory(study.dataset), study.dataset.path, 16)
    assert warnings(study) == []
    os.utime("all.zip", (1, 1))
    assert "all.zip has changed" in warnings(study)[0] and "(1 with another modification time)" in warnings(study)[0]


def test_datasets_without_a_list_of_files_are_compared_by_number(study):
    (layout.dataset_directory(study.dataset) / "files.json").unlink()
    touch(study.dataset.path)
    assert warnings(study) == []
    add(study.dataset.path)
    assert "(9 images instead of 8)" in warnings(study)[0]


def test_a_slow_check_is_given_up(study, monkeypatch):
    monkeypatch.setattr(start_warnings, "CHECK_SECONDS", 0)
    (warning,) = warnings(study)
    assert warning == "my pictures: not checked whether its images have changed (its files are not listed in 0 s)"


def test_folders_that_are_gone_or_not_prepared_are_no_change(study, tmp_path):
    add(study.dataset.path)
    manifest = tmp_path / layout.dataset_directory(study.dataset) / "manifest.json"
    manifest.rename("manifest.json")
    assert warnings(study) == []
    (tmp_path / "manifest.json").rename(manifest)
    study.dataset.path.rename("elsewhere")
    assert warnings(study) == []


@pytest.mark.slow
def test_the_dry_run_reports_a_changed_folder(study, tmp_path):
    experiment = (tmp_path / "experiments/mine.yaml").read_text()
    copy_project(tmp_path / "clone")
    for name in ("results", "my pictures"):
        (tmp_path / name).rename(tmp_path / "clone" / name)
    (tmp_path / "clone/experiments/mine.yaml").write_text(experiment)
    add(tmp_path / "clone/my pictures")
    done = snakemake(tmp_path / "clone", "--dry-run", "--config", "experiments=mine")
    assert done.returncode == 0 and "Warning: my pictures has changed" in done.stderr, done.stderr
