"""Evaluation in a study: what the dry run reports, and a complete run with Inception on random weights."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from metric_tables import PLAN
from projects import REPORT, copy_project, edit, jobs, reduce, snakemake
from test_extractors import write_random_inception

from convergence import layout
from convergence.analysis.comparison import EFFECT_COLUMNS, effects_table
from convergence.analysis.verdict import judge
from convergence.errors import StudyError
from convergence.figures.curves import fid_curves
from convergence.rows import COLUMNS, PROBE_COLUMNS, of_checkpoint, write_rows
from convergence.schema import Evaluate, Experiment
from convergence.tables import collect, read_table, write_table
from diffusion.config import OpenMoji
from diffusion.evaluation.weights import INCEPTION, LITE0, SOURCES

ROWS = [(LITE0, "fd")]  # of the table of each checkpoint


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """No weights in the cache of torch, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # No server listens on the discard port.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def with_evaluate(**evaluate):
    return lambda study: study["evaluate"].update(evaluate)


def without_held_out(**evaluate):
    return lambda study: (study["dataset"].pop("held_out"), study["evaluate"].update(evaluate))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            with_evaluate(features=[INCEPTION]),
            [str(SOURCES[INCEPTION].sha256), "cannot be reached", "in weights"],
        ),
        (
            with_evaluate(features=[INCEPTION], weights={INCEPTION: "nowhere.pth"}),
            ["nowhere.pth: does not exist", "the weights of inception-v3-compat"],
        ),
        (with_evaluate(features=["inception"]), ["evaluate.features", "'inception': choose from", LITE0, INCEPTION]),
        (
            with_evaluate(weights={INCEPTION: "a.pth"}),
            ["evaluate", "weights", "inception-v3-compat is not one of the features"],
        ),
        (without_held_out(metrics=["fd", "memorised"]), ["set dataset.held_out to 2 or more"]),
        (without_held_out(reference="held_out"), ["set dataset.held_out to 2 or more"]),
    ],
)
def test_missing_requirements_of_evaluation_are_reported_before_training(tmp_path, no_network, change, parts):
    project = copy_project(tmp_path / "study")
    edit(project, change)
    done = snakemake(project, "--dry-run")
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output and not (project / "results").exists()
    assert any(all(part in line for part in ["openmoji.yaml", *parts]) for line in output.splitlines()), output


def test_held_out_images_change_runs_and_references_but_not_the_dataset():
    whole, part = OpenMoji(source="openmoji", image_size=16), OpenMoji(source="openmoji", image_size=16, held_out=100)
    assert layout.dataset_directory(whole).name == "openmoji-df41e68c"
    assert layout.dataset_directory(part) == layout.dataset_directory(whole)
    evaluate = Evaluate(features=[LITE0], reference_images=2000)
    paths = {
        layout.reference_path(dataset, LITE0, evaluate.model_copy(update={"reference": reference}))
        for dataset in (whole, part)
        for reference in ("train", "held_out")
    }
    assert len(paths) == 4

    def run_hash(dataset):
        study = {"name": "a", "dataset": dataset, "model": {"channel_mult": [1, 1], "attention_resolutions": []}}
        return Experiment(**study, checkpoints=[1], seeds=[0], arms={"uniform": {}}).run("uniform").hash8

    assert run_hash(whole) == "78a7466c" != run_hash(part)


def test_unequal_numbers_of_samples_are_refused(tmp_path):
    row = dict.fromkeys(COLUMNS, 0) | {"study": "small", "arm": "x", "features": LITE0, "metric": "fd", "reason": ""}
    a, b, diverged = (tmp_path / f"{name}.csv" for name in ("a", "b", "diverged"))
    for path, value, n in ((a, 1.0, 100), (b, 1.0, 200), (diverged, np.nan, 0)):
        write_table(pd.DataFrame([row | {"value": value, "n": n}]), path)
    assert len(collect([a, diverged], ["x", "x"], ROWS)) == 2
    with pytest.raises(StudyError, match="of 100 and of 200 samples"):
        collect([a, b], ["x", "x"], ROWS)


def test_rows_are_written_as_pandas_writes_them(tmp_path):
    wildcards = SimpleNamespace(study="2024", arm="a-1a2b3c4d", seed="0")
    values = [np.float64(0.1) + 0.2, 1e-7, 123456789.125, 1e16, -0.0, 3.0, np.inf, np.nan, math.nan]
    reasons = ["", 'a "quoted" word, and\na line', "é", *[""] * 6]
    rows = of_checkpoint(
        [
            {"timesteps": "0-99", "metric": "mse", "value": value, "n": 8, "held_out": True, "reason": reason}
            for value, reason in zip(values, reasons, strict=True)
        ],
        wildcards,
        {"step": 4, "images": 32, "seconds": 0.0},
    )
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    write_rows(rows, ours, PROBE_COLUMNS)
    write_table(pd.DataFrame(rows), theirs, PROBE_COLUMNS)
    assert ours.read_bytes() == theirs.read_bytes() and len(ours.read_bytes().splitlines()) == 11


@pytest.mark.parametrize("arm", ["05", "nan", "na"])
def test_names_that_look_like_numbers_stay_names(tmp_path, arm):
    paths, arms = [], []
    for name, step, value in (("1", 4, 3.0), ("1", 8, 2.0), (arm, 4, 2.5), (arm, 8, 1.0)):
        wildcards = SimpleNamespace(study="2024", arm=f"{name}-1a2b3c4d", seed="0")
        row = {"features": LITE0, "metric": "fd", "value": value, "stderr": np.nan, "n": 12, "reason": ""}
        provenance = {"step": step, "images": 8 * step, "seconds": 1.5}
        paths.append(tmp_path / f"{name}{step}.csv")
        arms.append(name)
        write_rows(of_checkpoint([row], wildcards, provenance), paths[-1])
    assert read_table(paths[-1])["arm"].tolist() == [arm]
    write_table(collect(paths, arms, ROWS), tmp_path / "metrics.csv")
    table = read_table(tmp_path / "metrics.csv")
    assert table["study"].unique().tolist() == ["2024"] and table["arm"].tolist() == arms
    plan = PLAN.model_copy(update={"baseline": "1", "candidates": (arm,), "candidate": arm, "features": LITE0})
    comparisons = judge(table, pd.DataFrame(columns=PROBE_COLUMNS), "2024", plan).comparisons
    effects_table(comparisons).to_csv(tmp_path / "effects.csv", index=False)
    effects = read_table(tmp_path / "effects.csv", EFFECT_COLUMNS)
    assert len(effects) and effects["baseline"].eq("1").all() and effects["candidate"].eq(arm).all()
    fid_curves(table, [tmp_path / "curves.png"], comparisons=comparisons)


@pytest.mark.slow
def test_inception_from_a_file_to_the_table(tmp_path, no_network):
    project = copy_project(tmp_path / "study")
    write_random_inception(project / "random.pth")
    digest = hashlib.sha256((project / "random.pth").read_bytes()).hexdigest()
    edit(project, reduce)
    edit(project, lambda study: study["dataset"].update(held_out=30))
    edit(project, lambda study: study.update(seeds=[0], arms={"under05": study["arms"]["under05"]}))
    edit(project, lambda study: study.pop("compare"))
    metrics = ["fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage", "memorised"]
    weights = {INCEPTION: {"path": "random.pth", "sha256": digest}}
    edit(project, with_evaluate(features=[INCEPTION, LITE0], metrics=metrics, weights=weights))
    done = snakemake(project, "--config", "tracking=off", target=str(REPORT / "metrics.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(project / REPORT / "metrics.csv")
    assert sorted(table["features"].unique()) == sorted([LITE0, INCEPTION]) and len(table) == 2 * 8 * 3
    assert table.loc[table["metric"] != "fd_infinity", "value"].notna().all()
    assert table.loc[table["metric"] == "fd_infinity", "reason"].str.startswith("needs more than").all()
    assert (table.loc[table["metric"].isin(["fd", "kid"]), "stderr"] > 0).all()
    # The reference of each extractor is computed once, and not again for other metrics.
    assert len(list(project.glob("results/references/*.npz"))) == 2
    edit(project, with_evaluate(metrics=["fd"]))
    assert not [job for job in jobs(project) if job.startswith(("Reference", "Train"))]
