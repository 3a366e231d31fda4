"""The workflow as its user meets it: the default study, reduced, through a real Snakemake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from projects import ROOT, assert_tracked_once, copy_project, edit, jobs, reduce, snakemake
from safetensors.torch import load_file


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished study, to be changed at will."""
    shutil.copytree(finished, tmp_path / "study", symlinks=True)
    return tmp_path / "study"


@pytest.mark.slow
def test_one_command_leads_from_images_to_the_figure(finished):
    table = pd.read_csv(finished / "reports/metrics.csv")
    assert len(table) == 2 * 2 * 3 and table["value"].notna().all() and (table["n"] == 12).all()
    assert sorted(table["images"].unique()) == [0, 32, 64]
    at_start = table[table["step"] == 0]
    assert at_start.groupby("seed")["value"].nunique().tolist() == [1, 1]
    speedups = pd.read_csv(finished / "reports/speedup.csv")
    assert set(speedups["quantity"]) == {"average", "final", "images", "seconds"} and speedups["primary"].all()
    assert "**Two seeds** can hardly conclude" in (finished / "reports/verdict.md").read_text()
    probes = pd.read_csv(finished / "reports/mechanism.csv")
    assert len(probes) == 4 * 2 * (3 + 1) * 5 and probes["held_out"].all() and (probes["n"] == 8).all()
    assert probes.loc[probes["metric"].isin(["mse", "gradient_variance"]), "value"].gt(0).all()
    assert "`under05` against `uni05`:" in (finished / "reports/verdict.md").read_text()
    for figure in ("fid_curves.png", "samples.png", "schedules.png", "speedups.png", "mechanism.png"):
        assert min(Image.open(finished / "reports" / figure).size) > 200
    assert "FD (EfficientNet-Lite0)" in (finished / "reports/fid_curves.svg").read_text()
    log = (finished / "run.log").read_text()
    assert re.search(r"^openmoji: .*under05.* uni05 in FD .*2 paired seeds", log, re.M)
    assert "reports/fid_curves.png" in log and "left" in log and "Traceback" not in log


@pytest.mark.slow
def test_checkpoints_hold_what_goes_on_and_drop_what_was_used(finished):
    steps = sorted(finished.glob("results/openmoji/*/seed*/step*"))
    assert len(steps) == 2 + 2 * 2 * 2
    assert not list(finished.glob("results/**/samples.npy")) and not list(finished.glob("results/**/*.tmp*"))
    for directory in steps:
        assert (directory / "weights.safetensors").exists() and (directory / "preview.png").exists()
        about = json.loads((directory / "provenance.json").read_text())
        assert about["step"] == int(directory.name[4:]) and about["versions"]["torch"] and about["host"]
    manifest = json.loads(next(finished.glob("results/datasets/*/manifest.json")).read_text())
    assert manifest["count"] > 4000 and "CC" in manifest["licence"]


@pytest.mark.slow
def test_mlflow_knows_each_run_and_step_once(finished):
    assert_tracked_once(finished)


@pytest.mark.slow
def test_the_report_is_one_file_that_tells_the_story_in_order(project):
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
    assert "Figures fit the window" in report and "The answer." in report and "2 paired seeds. Speed-up" in report
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", report)


@pytest.mark.slow
def test_a_study_without_compare_has_curves_and_says_so(project):
    edit(project, lambda study: study.pop("compare"))
    assert sorted(jobs(project)) == ["Compare the arms", "Draw the figures"]
    done = snakemake(project, "--config", "tracking=off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compares nothing" in (project / "reports/verdict.md").read_text()


@pytest.mark.slow
def test_a_second_run_does_nothing(finished):
    done = snakemake(finished)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.slow
def test_an_edited_arm_is_trained_alone_and_undone_edits_cost_nothing(project):
    before = (project / "experiments/openmoji.yaml").read_text()
    edit(project, lambda study: study["arms"]["under05"].update(train={"learning_rate": 1e-3}))
    trained = [
        job
        for job in jobs(project)
        if job.startswith(("Train", "Sample", "Evaluate", "Probe", "Initialise", "Prepare"))
    ]
    verbs = [("Train", "to"), ("Sample", "at"), ("Evaluate", "at"), ("Probe", "at")]
    assert trained == sorted(
        f"{verb} openmoji under05 seed {k} {word} step {step}"
        for verb, word in verbs
        for k in (0, 1)
        for step in (4, 8)
    )
    (project / "experiments/openmoji.yaml").write_text(before)
    assert jobs(project) == []


@pytest.mark.slow
def test_more_checkpoints_train_only_what_is_new_and_equal_a_run_in_one_go(project, tmp_path):
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
    assert snakemake(project, target=extended.format(arm)).returncode == 0
    # Two states stay: the newest, and the one before it, until Snakemake has recorded the newest as done.
    states = sorted(project.glob(f"results/openmoji/{arm}/seed0/step*/state.pt"))
    assert [state.parent.name for state in states] == ["step12", "step16"]
    whole = copy_project(tmp_path / "whole")
    shutil.copytree(project / "results/datasets", whole / "results/datasets")
    edit(whole, reduce)
    edit(whole, lambda study: study.update(checkpoints=[16]))
    assert snakemake(whole, target=extended.format(arm)).returncode == 0
    assert (whole / extended.format(arm)).read_bytes() == (project / extended.format(arm)).read_bytes()
    assert not [job for job in jobs(project) if "uni05 seed 0" in job and job.startswith("Train")]


@pytest.mark.slow
def test_a_run_goes_on_in_two_processes(project, tmp_path):
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
    facts = [json.loads((root / weights).with_name("provenance.json").read_text()) for root in (one, two)]
    assert [fact["processes"] for fact in facts] == [1, 2] and facts[0]["step"] == facts[1]["step"] == 12
    alone, shared = (load_file(root / weights) for root in (one, two))
    # Rounding differs, and Adam makes full steps of gradients that are rounding alone: functions agree, not bits.
    change = sum((alone[name] - shared[name]).square().sum() for name in alone) ** 0.5
    size = sum(value.square().sum() for value in alone.values()) ** 0.5
    assert change < 1e-2 * size and (root / weights).read_bytes() != (one / weights).read_bytes()


@pytest.mark.slow
def test_a_new_seed_arm_or_study_trains_only_what_is_new(project):
    edit(project, lambda study: study.update(seeds=[0, 1, 2]))
    assert {job[:5] for job in jobs(project) if "seed" in job and "seed 2" not in job} == set()
    edit(project, lambda study: study.update(seeds=[0, 1]))
    edit(project, lambda study: study["arms"].update(uniform={}))
    assert {job for job in jobs(project) if job.startswith("Train") and "uniform" not in job} == set()
    edit(project, lambda study: study["arms"].pop("uniform"))
    shutil.copy(project / "experiments/openmoji.yaml", project / "experiments/other.yaml")
    edit(project, lambda study: study.update(name="other", seeds=[5]), "other")
    new = [job for job in jobs(project, "--config", "experiments=openmoji,other") if "seed" in job]
    assert new and all("other" in job for job in new)


@pytest.mark.slow
def test_a_killed_snakemake_loses_nothing(finished, tmp_path):
    project = copy_project(tmp_path / "study")
    edit(project, reduce)
    shutil.copytree(finished / "results/datasets", project / "results/datasets")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--config",
        "tracking=off",
        "--",
        "reports/metrics.csv",
    ]
    process = subprocess.Popen(command, cwd=project, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(project.glob("results/openmoji/*/seed*/log.csv")):
        assert process.poll() is None
        time.sleep(0.05)
    # Snakemake and its jobs at once, as a power cut would.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert snakemake(project, "--unlock", target="reports/metrics.csv").returncode == 0
    done = snakemake(project, "--config", "tracking=off", target="reports/metrics.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (project / "mlflow.db").exists()
    ours, theirs = (pd.read_csv(root / "reports/metrics.csv").drop(columns="seconds") for root in (project, finished))
    pd.testing.assert_frame_equal(ours, theirs)
    for path in finished.glob("results/openmoji/*/seed*/step*/weights.safetensors"):
        assert (project / path.relative_to(finished)).read_bytes() == path.read_bytes()


MISTAKES = [
    (lambda s: s["train"].update(batchsize=3), ["openmoji.yaml", "train.batchsize", "did you mean batch_size?"]),
    (lambda s: s.update(seeds="many"), ["openmoji.yaml", "seeds"]),
    (lambda s: s["arms"]["under05"].update(mse_weight="p2"), ["arms.under05", "weights twice", "weigh_twice: true"]),
    (lambda s: s.update(checkpoints=[8, 4]), ["checkpoints", "put them in order"]),
    (lambda s: s["dataset"].update(image_size=15), ["dataset.image_size", "cannot be halved", "multiple of 2"]),
    (
        lambda s: s.update(dataset={"source": "folder", "path": "nowhere", "image_size": 16}),
        ["openmoji.yaml", "dataset.path: nowhere is not there"],
    ),
]


@pytest.mark.parametrize(("mistake", "parts"), MISTAKES)
def test_a_mistake_is_one_sentence_at_the_dry_run(tmp_path, mistake, parts):
    project = copy_project(tmp_path)
    edit(project, mistake)
    done = snakemake(project, "--dry-run")
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in told and not (project / "results").exists()
    assert any(all(part in line for part in parts) for line in told.splitlines()), told


@pytest.mark.parametrize(
    ("configuration", "parts"),
    [
        ("experiments=opnmoji", ["opnmoji.yaml", "no such experiment", "openmoji"]),
        ("experiment=a", ["experiment:"]),
        ("tracking=maybe", ["tracking=maybe", "tracking=off"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, configuration, parts):
    done = snakemake(copy_project(tmp_path), "--dry-run", "--config", configuration)
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in told
    assert any(all(part in line for part in parts) for line in told.splitlines()), told


def test_an_own_folder_with_unreadable_images_is_told_before_training(tmp_path):
    project = copy_project(tmp_path / "study")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no image")
    edit(project, lambda s: s.update(dataset={"source": "folder", "path": str(pictures), "image_size": 16}))
    edit(project, lambda s: s["evaluate"].pop("reference_images"))
    done = snakemake(project, "--config", "tracking=off")
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in told
    assert any("broken.png" in line for line in told.splitlines()), told
    assert not list(project.glob("results/openmoji/*/seed*/step*/state.pt"))


def test_the_commands_of_the_docs_are_understood(tmp_path):
    project = copy_project(tmp_path)
    shutil.copy(project / "experiments/openmoji.yaml", project / "experiments/mine.yaml")
    edit(project, lambda study: study.update(name="mine"), "mine")
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    lines = set(re.findall(r"^(?:    )?(snakemake --cores .*?)(?:  +#.*)?$", pages, re.M))
    assert len(lines) >= 2
    for line in lines:
        command = [sys.executable, "-m", *line.replace("--cores all", "--cores all --dry-run").split()]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        told = done.stdout + done.stderr
        assert done.returncode == 0 and re.search("[Tt]rain", told), line + told


def test_the_environment_is_one_list():
    def names(lines):
        return {re.split(r"[=<>!~\[]", line)[0].strip().lower() for line in lines}

    import tomllib

    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in pin for pin in pins)
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = about["dependencies"] + about["optional-dependencies"]["dev"]
    assert names(wanted) == names(pins)
    from packaging.requirements import Requirement
    from packaging.version import Version

    pinned = {pin.split("==")[0]: Version(pin.split("==")[1]) for pin in pins}
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name]), text
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict)) == pins
