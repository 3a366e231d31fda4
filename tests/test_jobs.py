"""What stands between Snakemake and the work: counts before anything is spent, the queue of a cluster, mistakes."""

import errno
import logging

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from projects import ROOT
from snakemake.exceptions import WorkflowError

from convergence import jobs, layout, snakefile
from convergence.errors import StudyError
from diffusion.errors import Stopped


def study(folder, held_out):
    """A study of four pictures, some of them held out."""
    (folder / "pictures").mkdir()
    for index in range(4):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / f"pictures/{index}.png")
    content = yaml.safe_load((ROOT / "experiments/openmoji.yaml").read_text()) | {"name": "mine", "probe": None}
    content["dataset"] = {"source": "folder", "path": "pictures", "image_size": 16, "held_out": held_out}
    content["evaluate"] = {"features": ["efficientnet-lite0"]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("held_out", [4, 9])
def test_what_is_held_out_leaves_some_to_train_on(tmp_path, monkeypatch, held_out):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, held_out)
    told = f"mine.yaml: dataset.held_out: {held_out} of 4 pictures leaves none to train on: lower it"
    with pytest.raises(StudyError, match=told):
        snakefile.load_experiments({"experiments": "mine"}, tmp_path)


def test_pictures_are_counted_by_their_names_and_after_they_were_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, 2)
    experiment = snakefile.load_experiments({"experiments": " mine.yaml"}, tmp_path)["mine"]
    directory = layout.dataset_directory(experiment.dataset)
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text('{"count": 2}')
    with pytest.raises(StudyError, match="2 of 2 pictures leaves none to train on"):
        snakefile.load_experiments({"experiments": "mine"}, tmp_path)
    (directory / "manifest.json").unlink()
    for picture in (tmp_path / "pictures").iterdir():
        picture.rename(picture.with_suffix(".txt"))
    with pytest.raises(StudyError, match="there are no pictures in pictures: name a folder"):
        snakefile.load_experiments({"experiments": "mine"}, tmp_path)


def test_enough_may_be_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, 2)
    assert set(snakefile.load_experiments({"experiments": "mine"}, tmp_path)) == {"mine"}


@pytest.mark.parametrize("squeue", [None, "#!/bin/sh\nexit 3\n"])
def test_a_queue_that_cannot_be_seen_is_told(tmp_path, monkeypatch, squeue):
    if squeue:
        (tmp_path / "squeue").write_text(squeue)
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        WorkflowError, match=r"squeue fails \(.*\): start this on a login node of the cluster, or without"
    ):
        snakefile.cancel_left_jobs([("train", ["a"])])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StudyError("a mistake"), "a mistake"),
        (Stopped("stopped"), "stopped"),
        (KeyboardInterrupt(), "the same command does it again"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory of the GPU is full"),
        (OSError(errno.ENOSPC, "No space left", "a.pt"), "a.pt: No space left: make room"),
    ],
)
def test_mistakes_are_told_in_a_sentence(caplog, error, said):
    with pytest.raises(SystemExit) as ended, jobs.exit_on_job_error():
        raise error
    assert ended.value.code == 1 and len(caplog.records) == 1 and said in caplog.text


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError(errno.EIO, "a fault")])
def test_what_is_no_mistake_of_the_user_stays_as_it_is(caplog, error):
    with pytest.raises(type(error)), jobs.exit_on_job_error():
        raise error
    assert not caplog.records and logging.getLogger().handlers
