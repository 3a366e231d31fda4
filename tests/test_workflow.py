"""The workflow as a user runs it: the reduced default study through a real Snakemake."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from projects import REPORT, ROOT, assert_tracked_once, copy_project, edit, jobs, reduce, snakemake
from safetensors.torch import load_file

from convergence.analysis.verdict import read_verdict
from diffusion.config import EVALUATE_VERSION


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished study, which a test may change, without MLflow's store."""
    ignored = shutil.ignore_patterns("mlflow.db*", "mlartifacts")
    shutil.copytree(finished, tmp_path / "study", symlinks=True, ignore=ignored)
    return tmp_path / "study"


@pytest.mark.slow
def test_one_command_makes_all_tables_and_figures(finished):
    reports = finished / REPORT
    table = pd.read_csv(reports / "metrics.csv")
    assert len(table) == 2 * 2 * 3 and table["value"].notna().all() and (table["n"] == 12).all()
    assert sorted(table["images"].unique()) == [0, 32, 64]
    at_start = table[table["step"] == 0]
    assert at_start.groupby("seed")["value"].nunique().tolist() == [1, 1]
    assert at_start["value"].nunique() == 2  # untrained nets are equal, but each seed has its own latents
    effects = pd.read_csv(reports / "effects.csv")
    assert {"average", "final", "images"} <= set(effects["quantity"]) and effects["role"].eq("primary").all()
    verdict = (reports / "verdict.md").read_text()
    assert "seeds 0, 1; margin 2%" in verdict and "`under05` against `uni05`, 2 checkpoints" in verdict
    probes = pd.read_csv(reports / "mechanism.csv")
    assert len(probes) == 4 * 2 * ((3 + 1) * 4 + 2) and probes["held_out"].all() and (probes["n"] == 8).all()
    assert probes.loc[probes["metric"].isin(["mse", "gradient_variance", "update_norm"]), "value"].gt(0).all()
    assert probes["value"].notna().all() and "times that of `uni05`; apart from this factor, only" in verdict
    assert "| norm of the update |" in verdict and "| arm | seconds per 1000 images |" in verdict
    for figure in ("fid_curves", "hour_curves", "samples", "schedules", "speedups", "mechanism"):
        assert min(Image.open(reports / f"{figure}.png").size) > 200
    for curves in (reports / "fid_curves.svg", finished / "reports/fid_curves.svg"):
        assert "FD (EfficientNet-Lite0)" in curves.read_text()
    assert min(Image.open(finished / "reports/fid_curves.png").size) > 200


@pytest.mark.slow
def test_the_cost_of_the_arms_is_measured_while_no_other_job_runs(finished):
    events = re.findall(r"^(Job|Finished jobid:) (\d+)(?:: (Time))?", (finished / "run.log").read_text(), re.M)
    start = next(index for index, (*_, word) in enumerate(events) if word == "Time")
    running = {job for kind, job, _ in events[:start] if kind == "Job"}
    assert running == {job for kind, job, _ in events[:start] if kind != "Job"}
    assert events[start + 1] == ("Finished jobid:", events[start][1], "")
    cost = pd.read_csv(finished / REPORT / "cost.csv").set_index("arm")
    assert list(cost.index) == ["uni05", "under05"] and (cost["seconds_per_1000_images"] > 0).all()
    uni05, under05 = cost.loc["uni05"], cost.loc["under05"]
    assert uni05["ratio"] == 1 and under05["ratio_low"] < under05["ratio"] < under05["ratio_high"]
    np.testing.assert_allclose(under05["ratio"] * uni05["seconds_per_1000_images"], under05["seconds_per_1000_images"])
    assert '"seconds"' not in (finished / REPORT / "verdict.json").read_text()


@pytest.mark.slow
def test_the_last_lines_give_the_answer_and_the_files(finished):
    log = (finished / "run.log").read_text()
    answer = read_verdict(finished / REPORT / "verdict.json").answer
    assert "FD" in answer and "on average (" in answer
    assert f"\nopenmoji: {answer}\n" in log and str(finished / REPORT / "verdict.md") in log
    assert str(finished / "reports/fid_curves.png") in log and "`make report EXPERIMENTS=openmoji`" in log
    assert re.search(r"^(about \d+ min|less than a minute) left$", log, re.M) and "Traceback" not in log


@pytest.mark.slow
def test_checkpoints_keep_what_is_needed_to_continue_and_no_samples(finished):
    steps = sorted(finished.glob("results/openmoji/*/seed*/step*"))
    assert len(steps) == 2 + 2 * 2 * 2
    assert not list(finished.glob("results/**/samples.npy")) and not list(finished.glob("results/**/*.tmp*"))
    for directory in steps:
        assert (directory / "weights.safetensors").exists() and (directory / "preview.png").exists()
        provenance = json.loads((directory / "provenance.json").read_text())
        assert provenance["step"] == int(directory.name[4:])
        influences = np.load(directory / "influences.npy")
        assert influences.shape == (1, 12) and influences.dtype == np.float32 and influences.std() > 0
        assert provenance["versions"]["torch"] and provenance["host"]
    manifest = json.loads(next(finished.glob("results/datasets/*/manifest.json")).read_text())
    assert manifest["count"] > 4000 and "CC" in manifest["licence"]


@pytest.mark.slow
def test_samples_are_kept_on_request_and_nothing_is_trained_again(project):
    metrics = next(project.glob("results/openmoji/uni05-*/seed0/step8")) / "metrics.csv"
    before = metrics.read_text()
    edit(project, lambda study: study["sample"].update(keep=True))
    assert {job.split()[0] for job in jobs(project)} == {"Evaluate", "Compare", "Draw"}
    target = str(metrics.with_name("samples.npy").relative_to(project))
    done = snakemake(project, "--config", "tracking=off", target=target)
    assert done.returncode == 0, done.stdout + done.stderr
    samples = np.load(project / target)
    assert samples.shape == (12, 16, 16, 3) and samples.dtype == np.uint8 and samples.std() > 0
    assert metrics.read_text() == before
    # The preview is a grid of the samples, with a gap of one pixel before each.
    preview = np.asarray(Image.open(metrics.with_name("preview.png")))
    np.testing.assert_array_equal(preview[1:17, 18:34], samples[1])
    edit(project, lambda study: study["sample"].update(keep=False))
    assert not [job for job in jobs(project) if job.startswith("Evaluate")]
    # Samples of other settings than those of the metrics are removed.
    edit(project, lambda study: study["sample"].update(seed=1))
    done = snakemake(project, "--config", "tracking=off", target=str(metrics.relative_to(project)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics.read_text() != before and not (project / target).exists()


@pytest.mark.slow
def test_another_version_of_the_evaluation_repeats_it_and_trains_nothing(project):
    path = project / "diffusion/config.py"
    content = path.read_text()
    path.write_text(
        content.replace(f"EVALUATE_VERSION = {EVALUATE_VERSION}", f"EVALUATE_VERSION = {EVALUATE_VERSION + 1}")
    )
    assert {job.split()[0] for job in jobs(project)} == {"Evaluate", "Compare", "Draw"}


@pytest.mark.slow
def test_kept_samples_that_do_not_fit_the_disk_are_reported_before_sampling(project):
    samples = next(project.glob("results/openmoji/uni05-*/seed0/step8")) / "samples.npy"
    edit(project, lambda study: study["sample"].update(keep=True, images=10**9))
    done = snakemake(project, "--config", "tracking=off", target=str(samples.relative_to(project)))
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "samples.npy: No space left on device: free space" in output


@pytest.mark.slow
def test_mlflow_has_each_run_and_step_once(finished):
    assert_tracked_once(finished)


@pytest.mark.slow
def test_the_report_is_one_file_with_its_chapters_in_order(project):
    done = snakemake(project, "--config", "tracking=off", target="all")
    assert done.returncode == 0, done.stdout + done.stderr
    done = snakemake(
        project, "--report", "reports/report.html", "--report-stylesheet", "workflow/report/report.css", target="all"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = (project / "reports/report.html").read_text()
    chapters = ["1. Verdict", "2. Curves", "3. Samples", "4. Schedules"]
    chapters += ["5. Mechanism", "6. Data", "7. Provenance", "8. Cost"]
    assert sorted(set(re.findall(r"\d\. [A-Z][a-z]+(?=\")", report))) == chapters
    assert {"openmoji", "all"} <= set(re.findall(r"\"study\": ?\"(\w+)\"", report))
    assert "Figures fit the window" in report and "The answer." in report and "on average (" in report
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", report)


@pytest.mark.slow
def test_a_study_without_compare_has_curves_and_no_verdict(project):
    edit(project, lambda study: study.pop("compare"))
    assert sorted(jobs(project)) == [
        "Compare the arms of openmoji",
        "Draw the curves of all selected studies",
        "Draw the figures of openmoji",
    ]
    done = snakemake(project, "--config", "tracking=off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_verdict(project / REPORT / "verdict.json").answer is None
    assert "\nopenmoji: " in done.stderr and "`compare`" in done.stderr


@pytest.mark.slow
def test_the_last_lines_leave_out_what_is_not_part_of_the_call(project):
    done = snakemake(project, "--config", "tracking=off", "--forcerun", "dataset", "--until", "dataset")
    assert done.returncode == 0 and "Finished jobid" in done.stderr, done.stdout + done.stderr
    assert "openmoji: " not in done.stderr and "verdict.md" not in done.stderr
    assert "fid_curves.png" not in done.stderr and "make report" not in done.stderr


@pytest.mark.slow
def test_a_second_run_does_nothing(project):
    done = snakemake(project)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.slow
def test_newer_files_with_the_same_content_start_no_job(project):
    for path in project.glob("results/**/*"):
        os.utime(path)
    assert jobs(project) == []
    # A copy without times and without Snakemake's records.
    shutil.rmtree(project / ".snakemake/metadata")
    now = time.time()
    for path in project.glob("results/openmoji/*/*/*/*"):
        os.utime(path, (now, now))
    # A manifest as another version of Pillow writes it.
    manifest = next(project.glob("results/datasets/*/manifest.json"))
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"versions": {}}))
    assert not [job for job in jobs(project) if job.startswith("Train")]
    # A manifest of other images.
    manifest.write_text(json.dumps(content | {"sha256": "0" * 64}))
    done = snakemake(project, "--dry-run")
    assert "Warning: 8 trained checkpoints are trained again: the dataset has other images than before" in done.stderr


@pytest.mark.slow
def test_a_dataset_that_is_prepared_again_repeats_nothing(project):
    shutil.rmtree(project / "results/datasets")
    next(project.glob("results/references/*.npz")).unlink()
    metrics = next(project.glob("results/openmoji/uni05-*/seed0/step8")) / "metrics.csv"
    metrics.unlink()
    shutil.rmtree(project / "reports")
    done = snakemake(project, "--dry-run")
    assert "Note: a dataset is prepared again; finished checkpoints are kept unless the new images" in done.stderr
    done = snakemake(project, "--config", "tracking=off", target=str(REPORT / "metrics.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"^Job \d+: (\w+)", done.stderr, re.M)
    assert sorted(ran) == ["Compare", "Evaluate", "Prepare", "Reference"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [{"start": 0, "every": 2, "until": 8}, [8]])
def test_other_checkpoints_before_the_last_one_are_announced(project, checkpoints):
    edit(project, lambda study: study.update(checkpoints=checkpoints))
    done = snakemake(project, "--dry-run")
    (warning,) = [line for line in done.stderr.splitlines() if "trained again" in line]
    again = 8 if isinstance(checkpoints, dict) else 4
    assert warning.startswith(
        f"Warning: {again} trained checkpoints are trained again: only the two newest states of a"
    )


@pytest.mark.slow
def test_an_edited_arm_is_trained_alone_and_an_undone_edit_runs_nothing(project):
    before = (project / "experiments/openmoji.yaml").read_text()
    edit(project, lambda study: study["arms"]["under05"].update(train={"learning_rate": 1e-3}))
    trained = [job for job in jobs(project) if job.startswith(("Train", "Evaluate", "Probe", "Initialise", "Prepare"))]
    verbs = [("Train", "to"), ("Evaluate", "at"), ("Probe", "at")]
    assert trained == sorted(
        f"{verb} openmoji under05 seed {k} {word} step {step}"
        for verb, word in verbs
        for k in (0, 1)
        for step in (4, 8)
    )
    (project / "experiments/openmoji.yaml").write_text(before)
    assert jobs(project) == []


@pytest.mark.slow
def test_added_checkpoints_train_only_the_new_steps_and_equal_an_uninterrupted_run(project, tmp_path):
    edit(project, lambda study: study["checkpoints"].update(until=16))
    trained = [job for job in jobs(project) if job.startswith("Train")]
    assert trained == sorted(
        f"Train openmoji {arm} seed {k} to step {step}"
        for arm in ("under05", "uni05")
        for k in (0, 1)
        for step in (12, 16)
    )
    extended = "results/openmoji/{}/seed0/step16/weights.safetensors"
    arm = next(project.glob("results/openmoji/uni05-*")).name
    assert snakemake(project, "--config", "tracking=off", target=extended.format(arm)).returncode == 0
    # Two states are kept: the newest, and the one before it until Snakemake has recorded the newest as complete.
    states = sorted(project.glob(f"results/openmoji/{arm}/seed0/step*/state.pt"))
    assert [state.parent.name for state in states] == ["step12", "step16"]
    whole = copy_project(tmp_path / "whole")
    shutil.copytree(project / "results/datasets", whole / "results/datasets")
    edit(whole, reduce)
    edit(whole, lambda study: study.update(checkpoints=[16]))
    assert snakemake(whole, "--config", "tracking=off", target=extended.format(arm)).returncode == 0
    assert (whole / extended.format(arm)).read_bytes() == (project / extended.format(arm)).read_bytes()
    assert not [job for job in jobs(project) if "uni05 seed 0" in job and job.startswith("Train")]


@pytest.mark.slow
def test_a_run_continues_in_two_processes(project, tmp_path):
    shutil.copytree(project, tmp_path / "alone", symlinks=True)
    one, two = tmp_path / "alone", project
    arm = next(project.glob("results/openmoji/under05-*")).name
    weights = f"results/openmoji/{arm}/seed0/step12/weights.safetensors"
    for root in (one, two):
        edit(root, lambda study: study["checkpoints"].update(until=12))
    edit(two, lambda study: study.update(processes=2))
    assert not [job for job in jobs(two) if job.startswith("Train") and "step 12" not in job]
    for root in (one, two):
        done = snakemake(root, "--config", "tracking=off", target=weights)
        assert done.returncode == 0, done.stdout + done.stderr
    provenances = [json.loads((root / weights).with_name("provenance.json").read_text()) for root in (one, two)]
    assert [provenance["processes"] for provenance in provenances] == [1, 2]
    assert [provenance["step"] for provenance in provenances] == [12, 12]
    alone, shared = (load_file(root / weights) for root in (one, two))
    # Rounding differs, and Adam takes full steps for gradients that are only rounding errors: compare values, not bits.
    change = sum((alone[name] - shared[name]).square().sum() for name in alone) ** 0.5
    size = sum(value.square().sum() for value in alone.values()) ** 0.5
    assert change < 1e-2 * size and (root / weights).read_bytes() != (one / weights).read_bytes()


@pytest.mark.slow
def test_a_new_seed_arm_or_study_trains_only_what_is_new(project):
    shutil.copy(project / "experiments/openmoji.yaml", project / "experiments/other.yaml")
    edit(project, lambda study: study.update(name="other", seeds=[5]), "other")
    edit(project, lambda study: (study.update(seeds=[0, 1, 2]), study["arms"].update(uniform={})))
    new = [job for job in jobs(project, "--config", "experiments=openmoji,other") if "seed" in job]
    parts = ("seed 2", "uniform", "other")
    assert all(any(part in job for part in parts) for job in new), new
    assert all(any(job.startswith("Train") and part in job for job in new) for part in parts), new


@pytest.mark.slow
def test_several_studies_are_compared_in_one_figure(project):
    assert not (project / "reports/studies.png").exists()  # of one study
    shutil.copy(project / "experiments/openmoji.yaml", project / "experiments/other.yaml")
    edit(project, lambda study: study.update(name="other"), "other")
    shutil.copytree(project / "reports/openmoji", project / "reports/other")
    for name in ("metrics.csv", "verdict.json"):
        path = project / "reports/other" / name
        path.write_text(path.read_text().replace("openmoji", "other"))
    options = ["--allowed-rules", "overview", "--config", "experiments=openmoji,other", "tracking=off"]
    done = snakemake(project, *options, target="reports/studies.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "reports/studies.png").stat().st_size > 10_000
    table = pd.read_csv(project / "reports/studies.csv")
    assert set(table["study"]) == {"openmoji", "other"} and set(table["role"]) == {"primary"}


@pytest.mark.slow
def test_changed_code_is_reported_with_the_command_that_trains_again(project):
    source = project / "diffusion/timesteps.py"
    source.write_text(source.read_text() + "\n\ndef unused():\n    return 1\n")
    dry_run = snakemake(project, "--dry-run").stderr
    warning, few = [line for line in dry_run.splitlines() if line.startswith("Warning: ")]
    assert "with 40 reference images" in few and "1,280 dimensions" in few
    assert "uni05 (" in warning and "under05 (" in warning
    assert re.search(r"snakemake .*experiments=openmoji --forcerun .*train$", warning)
    assert not [job for job in jobs(project) if job.startswith(("Train", "Evaluate", "Probe"))]
    done = snakemake(project, "--config", "tracking=off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count(warning) == 2  # at the start and at the end
    stale, few_images = read_verdict(project / REPORT / "verdict.json").warnings
    assert "under05" in stale and few == f"Warning: {few_images}"
    shutil.copy(ROOT / "diffusion/timesteps.py", source)
    done = snakemake(project, "--config", "tracking=off")
    assert done.returncode == 0 and "under05 (" not in done.stderr
    assert read_verdict(project / REPORT / "verdict.json").warnings == (few_images,)


@pytest.fixture
def elsewhere(finished, tmp_path):
    """A directory without the code, with the smallest study, which starts from the prepared dataset."""
    directory = tmp_path / "my studies"
    (directory / "experiments").mkdir(parents=True)
    content = yaml.safe_load((finished / "experiments/openmoji.yaml").read_text())
    content |= {"name": "mine", "seeds": [0], "checkpoints": [4], "probe": None}
    (directory / "experiments/mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for part in ("datasets", "references"):
        shutil.copytree(finished / "results" / part, directory / "results" / part)
    return directory


@pytest.mark.slow
def test_a_study_runs_in_a_directory_outside_the_clone(elsewhere, tmp_path, monkeypatch):
    clone = copy_project(tmp_path / "clone")
    before = {path.relative_to(clone) for path in clone.rglob("*") if "__pycache__" not in path.parts}
    command = [sys.executable, "-m", "snakemake", "--snakefile", "clone/Snakefile", "--directory", "my studies"]
    command += ["--cores", "2", "--config", "experiments=mine", "--", "reports/fid_curves.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clone/profiles/default" in done.stderr
    answer = read_verdict(elsewhere / "reports/mine/verdict.json").answer
    assert f"\nmine: {answer}\n" in done.stderr
    assert len(list(elsewhere.glob("results/mine/*/seed0/step4/metrics.csv"))) == 2
    assert (elsewhere / "reports/fid_curves.png").exists() and (elsewhere / "reports/mine/samples.png").exists()
    database = sqlite3.connect(f"file:{elsewhere}/mlflow.db?mode=ro", uri=True)
    assert ("mine",) in database.execute("select name from experiments").fetchall()
    assert before == {path.relative_to(clone) for path in clone.rglob("*") if "__pycache__" not in path.parts}
    # The hint for the report works from any directory.
    (hint,) = re.findall(r"^All results in one page: `(.*)`$", done.stderr, re.M)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(["bash", "-c", hint], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7. Provenance" in (elsewhere / "reports/report.html").read_text()


def test_a_dry_run_imports_neither_torch_nor_what_only_jobs_need(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "snakemake", "--cores", "1", "--dry-run"]
    done = subprocess.run(command, cwd=copy_project(tmp_path), capture_output=True, text=True)
    imported = set(re.findall(r"^import time: .*\|\s+(\w+)$", done.stderr, re.M))
    assert done.returncode == 0 and "convergence" in imported, done.stderr
    assert not {"torch", "mlflow", "matplotlib", "scipy"} & imported


def test_unreadable_images_of_a_folder_are_reported_before_training(tmp_path):
    project = copy_project(tmp_path / "study")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    dataset = {"source": "folder", "path": str(folder), "image_size": 16}
    edit(project, lambda s: s.update(dataset=dataset, probe=None))
    edit(project, lambda s: s["evaluate"].pop("reference_images"))
    done = snakemake(project, "--config", "tracking=off")
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output
    assert any("broken.png" in line for line in output.splitlines()), output
    assert not list(project.glob("results/openmoji/*/seed*/step*/state.pt"))


def test_the_commands_of_the_docs_run(tmp_path):
    project = copy_project(tmp_path)
    shutil.copy(project / "experiments/openmoji.yaml", project / "experiments/mine.yaml")
    edit(project, lambda study: study.update(name="mine"), "mine")
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    lines = set(re.findall(r"^(?:    )?(snakemake --cores .*?)(?:  +#.*)?$", pages, re.M))
    assert len(lines) >= 2
    for line in lines:
        command = [sys.executable, "-m", *line.replace("--cores all", "--cores all --dry-run").split()]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0 and re.search("[Tt]rain", output), line + output
