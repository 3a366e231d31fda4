"""Checks before the first job, the queue of a cluster, and the errors of jobs."""

import errno
import logging
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from projects import ROOT
from snakemake.exceptions import WorkflowError
from snakemake.shell import shell

from convergence import jobs, layout, resources, snakefile, start_checks, terminal
from convergence.analysis.results import FailedRun, StudyVerdict, save_verdict
from convergence.errors import StudyError
from convergence.schema import Experiment
from convergence.start_warnings import few_images
from convergence.study_file import load_experiment
from diffusion.errors import FileError, InputError, Stopped


def study(folder, held_out):
    """Writes a study of four images, some of them held out."""
    (folder / "pictures").mkdir()
    for index in range(4):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / f"pictures/{index}.png")
    content = yaml.safe_load((ROOT / "experiments/openmoji.yaml").read_text()) | {"name": "mine", "probe": None}
    content["dataset"] = {"source": "folder", "path": "pictures", "image_size": 16, "held_out": held_out}
    content["evaluate"] = {"features": ["efficientnet-lite0"]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("held_out", [4, 9])
def test_held_out_images_must_leave_some_to_train_on(tmp_path, monkeypatch, held_out):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, held_out)
    with pytest.raises(StudyError, match=rf"mine.yaml: dataset.held_out: {held_out} of 4 .*: lower it"):
        start_checks.load_experiments({"experiments": "mine"}, tmp_path)


@pytest.mark.parametrize(
    ("kept", "held_out", "message"),
    [
        (1, 0, r"the part `train` \(1 images, dataset.held_out 0\) needs at least 2 images, but has 1"),
        (4, 3, r"the part `train` \(4 images, dataset.held_out 3\) needs at least 2 images, but has 1"),
    ],
)
def test_the_reference_needs_two_images(tmp_path, monkeypatch, kept, held_out, message):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, held_out)
    for index in range(kept, 4):
        (tmp_path / f"pictures/{index}.png").unlink()
    with pytest.raises(StudyError, match=f"mine.yaml: dataset: {message}: add images"):
        start_checks.load_experiments({"experiments": "mine"}, tmp_path)


def test_a_probe_needs_two_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, 0)
    path = tmp_path / "mine.yaml"
    for batch_size, fits in ((2, True), (4, False)):
        content = yaml.safe_load(path.read_text()) | {"probe": {"images": 16, "batch_size": batch_size}}
        path.write_text(yaml.safe_dump(content))
        with nullcontext() if fits else pytest.raises(StudyError, match="probe.batch_size: 4 images .* lower it"):
            start_checks.load_experiments({"experiments": "mine"}, tmp_path)


def test_images_are_counted_by_their_names_or_in_the_prepared_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, 2)
    experiment = start_checks.load_experiments({"experiments": " mine.yaml"}, tmp_path)["mine"]
    directory = layout.dataset_directory(experiment.dataset)
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text('{"count": 2}')
    with pytest.raises(StudyError, match="dataset.held_out: 2 of 2 .*: lower it"):
        start_checks.load_experiments({"experiments": "mine"}, tmp_path)
    (directory / "manifest.json").unlink()
    for picture in (tmp_path / "pictures").iterdir():
        picture.rename(picture.with_suffix(".txt"))
    with pytest.raises(StudyError, match="dataset: there are no images in pictures: name a folder"):
        start_checks.load_experiments({"experiments": "mine"}, tmp_path)


def test_some_images_may_be_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path, 2)
    assert set(start_checks.load_experiments({"experiments": "mine"}, tmp_path)) == {"mine"}


def test_a_job_requests_time_and_memory_to_sample_and_to_evaluate():
    experiment = load_experiment(ROOT / "experiments/fashion_mnist.yaml")
    run = experiment.run(next(iter(experiment.arms)))
    assert resources.evaluate(experiment, run, 60_000, gpus=0) == (849, 5_532)
    assert resources.evaluate(experiment, run, 60_000, gpus=1) == (27, 4_812)


@pytest.mark.parametrize("squeue", [None, "#!/bin/sh\nexit 3\n"])
def test_a_failing_squeue_is_reported(tmp_path, monkeypatch, squeue):
    if squeue:
        (tmp_path / "squeue").write_text(squeue)
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkflowError, match=r"squeue fails \(.*\): .*login node.*--workflow-profile"):
        snakefile.cancel_left_jobs([("train", ["a"])])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StudyError("a mistake"), "a mistake"),
        (Stopped("stopped"), "stopped"),
        (KeyboardInterrupt(), "run the same command again"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory of the GPU is full"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "the memory of the machine is full",
        ),
        (MemoryError("Unable to allocate 1 PiB"), "the memory of the machine is full"),
        (OSError(errno.ENOSPC, "No space left", "a.pt"), "a.pt: No space left: free space"),
    ],
)
def test_errors_of_the_user_are_reported_in_a_sentence(caplog, error, message):
    with pytest.raises(SystemExit) as ended, jobs.exit_on_job_error():
        raise error
    assert ended.value.code == 1 and len(caplog.records) == 1 and message in caplog.text


@pytest.mark.parametrize(
    ("path", "exists", "remedy"),
    [
        ("results/a/state.pt", True, ": delete it and run the same command again"),
        ("results/a/state.pt", False, ": run the same command again"),
        ("reports/a/metrics.csv", True, ": delete it and run the same command again"),
        ("downloads/a.pt", True, ""),
    ],
)
def test_an_unusable_file_of_the_results_is_to_be_made_again(tmp_path, monkeypatch, caplog, path, exists, remedy):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(SystemExit), jobs.exit_on_job_error():
        raise FileError(path, "is damaged")
    assert caplog.messages == [f"{path}: is damaged{remedy}"]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("probe", InputError("lower batch_size"), "probe: lower batch_size"),
        ("reference", InputError("lower it"), "evaluate: lower it"),
        ("probe", StudyError("probe.bins: lower it"), "probe.bins: lower it"),
        ("dataset", FileError("a.zip", "is damaged"), "a.zip: is damaged"),
        ("train", InputError("another process is training"), "another process is training"),
    ],
)
def test_an_error_about_an_argument_names_the_section_of_the_rule(tmp_path, caplog, rule, error, message):
    snakemake = SimpleNamespace(rule=rule, wildcards=["mine"], log=[str(tmp_path / "job.log")])
    with pytest.raises(SystemExit), jobs.job(snakemake):
        raise error
    assert [record.message for record in caplog.records if record.levelno > logging.DEBUG] == [message]


def test_the_last_lines_name_only_files_of_this_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    layout.FIGURE.parent.mkdir()
    layout.FIGURE.write_bytes(b"of another call")
    terminal.print_results(["mine"], {layout.report_directory("mine") / "metrics.csv"}, [])
    assert not capsys.readouterr().err
    terminal.print_results(["mine"], {layout.FIGURE}, ["mine: http://host/1"])
    lines = capsys.readouterr().err
    assert str(layout.FIGURE.resolve()) in lines and "verdict" not in lines
    assert "`make report EXPERIMENTS=mine`" in lines and "`make ui`" in lines and "  mine: http://host/1" in lines


def test_the_last_lines_name_the_runs_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = layout.report_directory("mine") / "verdict.json"
    path.parent.mkdir(parents=True)
    save_verdict(StudyVerdict("mine", failed=(FailedRun("b", 3, "collapsed at step 8 (mse 4)"),)), path)
    terminal.print_results(["mine"], {path}, [])
    assert "\n  b seed 3 collapsed at step 8 (mse 4)\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "held_out", "batch_size", "evaluate", "expected"),
    [
        (
            80,
            64,
            32,
            {},
            [
                "experiments/mine.yaml: training has 16 images (80 images, dataset.held_out 64), fewer than its "
                "batch_size 32",
                "compare with 16 reference images (80 images, dataset.held_out 64), but the features have 1,280",
            ],
        ),
        (80, 64, 16, {"reference": "held_out"}, ["compare with 64 reference images"]),
        (80, 0, 80, {"features": ["clip-rn101"]}, ["with 80 reference images (80 images, dataset.held_out 0), but"]),
        (5000, 0, 32, {"reference_images": 1280}, ["with 1,280 reference images (5,000 images"]),
        (5000, 0, 32, {"reference_images": 1281}, []),
        (None, 64, 32, {}, []),  # not known before the download
    ],
)
def test_few_images_are_reported_with_their_numbers(
    tmp_path, monkeypatch, count, held_out, batch_size, evaluate, expected
):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((ROOT / "experiments/openmoji.yaml").read_text()) | {"name": "mine", "probe": None}
    content["dataset"] = {"source": "folder", "path": "pictures"} if count else {"source": "openmoji"}
    content["dataset"] |= {"image_size": 16, "held_out": held_out}
    content["evaluate"] = {"features": ["efficientnet-lite0"]} | evaluate
    content["train"]["batch_size"] = batch_size
    experiment = Experiment(**content)
    if count == 80:  # the folder is counted
        (tmp_path / "pictures").mkdir()
        for index in range(count):
            (tmp_path / f"pictures/{index}.png").touch()
    elif count:  # the dataset is prepared
        manifest = layout.dataset_directory(experiment.dataset) / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(f'{{"count": {count}}}')
    found = few_images(experiment, [])
    assert len(found) == len(expected) and all(part in text for part, text in zip(expected, found, strict=True)), found


def test_few_images_of_a_deleted_dataset_are_those_that_it_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(ROOT / "experiments/openmoji.yaml")
    (warning,) = few_images(experiment, [("uni05", {}), ("under05", {"dataset_images": 280})])
    assert "training has 24 images (280 images, dataset.held_out 256), fewer than its batch_size 32" in warning


def test_a_job_that_snakemake_lost_is_an_error():
    snakefile.check_all_ran(iter([]))
    with pytest.raises(WorkflowError, match="2 jobs have not run: run the same command again"):
        snakefile.check_all_ran(iter(["train", "evaluate"]))


def test_the_report_command_holds_the_options_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert terminal.report_command(["a", "b"]) == "make report EXPERIMENTS=a,b"
    monkeypatch.chdir(tmp_path)
    for command in terminal.report_command(["a"]).split(" && "):
        assert f"--snakefile {ROOT}/Snakefile --directory {tmp_path} " in command
        assert command.endswith("--config experiments=a")


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError(errno.EIO, "a fault")])
def test_bugs_keep_their_traceback(caplog, error):
    with pytest.raises(type(error)), jobs.exit_on_job_error():
        raise error
    assert not caplog.records and logging.getLogger().handlers


@pytest.mark.parametrize("moment", ["{}()", "atexit.register({})"])
def test_ctrl_c_during_imports_and_last_callbacks_prints_no_traceback(moment):
    interrupt = "lambda: os.kill(os.getpid(), signal.SIGINT)"
    code = f"import convergence.jobs, atexit, os, signal; {moment.format(f'({interrupt})')}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr


def test_ctrl_c_waits_until_a_job_can_handle_it(monkeypatch):
    """The job interrupts itself before its first import, and continues until it imports `convergence.jobs`."""
    monkeypatch.setattr(shell, "_process_prefix", None)
    snakefile.hold_interrupts()
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print(1); import convergence.jobs; print(2)"
    command = f"{shell._process_prefix} {sys.executable} -c '{code}'"
    done = subprocess.run(command, shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "1\n", "")


def test_garbage_is_collected_as_usual_after_the_imports():
    code = (
        "import gc; before = gc.get_threshold(); import convergence.jobs as jobs; assert gc.get_threshold() != before; "
        "jobs.use_torch(None, 0); assert gc.get_threshold() == before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_script_imports_what_handles_ctrl_c_before_slow_packages():
    for script in ROOT.glob("workflow/scripts/*.py"):
        names = re.findall(r"^(?:from|import) (\S+)", script.read_text(), re.M)
        assert next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names) == "convergence.jobs"
