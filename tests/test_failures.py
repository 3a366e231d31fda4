"""Runs that diverge or collapse, and the tables of checkpoints: what is missing in them is never taken for a result."""

import re

import numpy as np
import pandas as pd
import pytest
from made import scenes
from metric_tables import compare_rows, curves, study, verdict_on
from projects import REPORT, TINY_MODEL, copy_project, edit, snakemake, write_pictures
from test_mechanism import probes

from convergence.analysis.mechanism import mechanisms
from convergence.analysis.verdict import read_verdict, to_markdown
from convergence.failures import failed, without_failed_runs, without_failures
from convergence.rows import COLUMNS, PROBE_COLUMNS
from convergence.tables import collect, read_checkpoint, read_table, write_table
from diffusion.errors import FileError
from diffusion.evaluation.failure import failure

NOISE = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
BLACK = np.zeros_like(NOISE)
ALMOST_EQUAL = (NOISE[:1] // 2 + np.arange(8).reshape(8, 1, 1, 1) % 2).astype(np.uint8)  # deviation 0.5
PAIRS = [("lite0", "fd"), ("lite0", "kid")]


@pytest.mark.parametrize(
    ("facts", "samples", "expected"),
    [
        ({}, NOISE, ""),
        ({}, scenes(8, seed=0, size=16), ""),
        ({"diverged": 7}, NOISE[:0], "diverged at step 7"),
        ({}, NOISE[:0], "diverged at step 9 (samples are not finite)"),
        ({"mse": 49_000.0}, NOISE, "collapsed at step 9 (mse 4.9e+04, an untrained net has at most 1)"),
        ({"mse": 0.98}, BLACK, "collapsed at step 9 (samples differ by 0 grey levels)"),
        ({"mse": None}, BLACK, "collapsed at step 9 (samples differ by 0 grey levels)"),
        ({}, ALMOST_EQUAL, "collapsed at step 9 (samples differ by 0.5 grey levels)"),
        ({}, 3 * ALMOST_EQUAL, ""),
        ({}, BLACK[:1], ""),  # one image has no deviation
        # The mse of an untrained net over 8 images of 768 values has a standard error of 0.018.
        ({"mse": 1.05}, NOISE, ""),
        ({"mse": 1.05, "mse_images": 8000}, NOISE, "collapsed at step 9 (mse 1.05, an untrained net has at most 1)"),
    ],
)
def test_a_checkpoint_fails_if_it_is_worse_than_an_untrained_net(facts, samples, expected):
    assert failure({"step": 9, "diverged": None, "mse": 0.5, "mse_images": 8} | facts, samples, NOISE) == expected


@pytest.mark.parametrize(("untrained", "expected"), [(4.0, ""), (1.0, "collapsed at step 9 (mse 3.9, an untrained")])
def test_the_mse_of_an_untrained_net_depends_on_what_the_net_predicts(untrained, expected):
    facts = {"step": 9, "diverged": None, "mse": 3.9, "mse_images": 8000}
    assert failure(facts, NOISE, NOISE, untrained)[: len(expected) or None] == expected


def test_samples_may_differ_as_little_as_the_images_of_the_dataset():
    assert failure({"step": 9, "diverged": None, "mse": 0.5, "mse_images": 8}, ALMOST_EQUAL, ALMOST_EQUAL) == ""


def test_a_checkpoint_of_which_no_mse_is_known_is_judged_by_its_samples():
    assert failure({"step": 0, "diverged": None}, NOISE, NOISE) == ""
    assert failure({"step": 0, "diverged": None}, BLACK, NOISE).startswith("collapsed")


def marked(metrics, arm, seed, *steps, reason="collapsed at step {}"):
    rows = (metrics["arm"] == arm) & (metrics["seed"] == seed) & metrics["step"].isin(steps)
    return metrics.assign(reason=metrics["reason"].mask(rows, metrics["step"].map(reason.format)))


def values(table, arm="cand", seed=0):
    return table.query("arm == @arm and seed == @seed").set_index("step")["value"].dropna().index.tolist()


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([], [0, 100, 200, 300, 400]),
        ([400], [0, 100, 200, 300]),
        ([100, 300, 400], [0, 100, 200]),
        ([0, 100, 200, 300, 400], []),
        ([100, 200], [0, 100, 200, 300, 400]),  # it recovers
    ],
)
def test_only_the_end_of_a_run_fails(steps, left):
    metrics = marked(study(curves(2, 1.0), curves(2, 0.9)), "cand", 0, *steps)
    table = without_failures(metrics.sample(frac=1, random_state=0)).sort_index()
    assert values(table) == left and values(table, seed=1) == values(table, "base") == [0, 100, 200, 300, 400]
    assert set(table.loc[failed(table), "reason"]) == ({"collapsed at step 400"} if 400 in steps else set())
    known = table["value"].notna()
    assert table["value"][known].equals(metrics["value"][known])
    recovered = known & (table["reason"] != "")
    assert table.loc[recovered, "reason"].tolist() == [
        f"recovered after it collapsed at step {step}" for step in steps if step in left
    ]


def test_a_run_that_collapses_before_it_diverges_fails_from_its_collapse():
    base, cand = curves(1, 1.0), curves(1, 0.1)
    cand[0, 4] = np.nan
    table = without_failures(marked(study(base, cand), "cand", 0, 300))
    assert values(table) == [0, 100, 200] and set(table.loc[failed(table), "reason"]) == {"diverged at step 7"}


def test_a_collapsed_run_is_treated_as_a_diverged_one_and_wins_nothing():
    """The samples of the collapsed run have the best values of all, as uniform grey images may have."""
    base, cand = curves(4, 1.0), curves(4, 0.99, seed=1)
    diverging = cand.copy()
    diverging[2, 3:] = np.nan
    collapsing = cand.copy()
    collapsing[2, 3:] = 1e-3
    collapsed = without_failures(marked(study(base, collapsing), "cand", 2, 300, 400))
    found, expected = (compare_rows(rows) for rows in (collapsed, study(base, diverging)))
    assert repr(found) == repr(expected)
    assert (found.average.pairs, found.average.failed_candidate, found.outcome) == (3, 1, "undecided")
    assert np.isinf(found.images.per_seed[2].candidate)
    verdict = verdict_on(collapsed)
    assert "1 run of cand of 4 diverged or collapsed." in verdict.answer
    assert [(run.arm, run.seed, run.reason) for run in verdict.failed] == [("cand", 2, "collapsed at step 400")]
    assert "## Diverged and collapsed runs\n\n- `cand` seed 2: collapsed at step 400\n" in to_markdown(verdict)


def test_an_arm_that_collapses_wins_no_comparison():
    base, cand = curves(3, 1.0), curves(3, 0.1)
    metrics = study(base, cand)
    for seed in range(3):
        metrics = marked(metrics, "cand", seed, 100, 200, 300, 400)
    (comparison,) = verdict_on(without_failures(metrics)).comparisons
    assert comparison.outcome == "undecided" and "at least one run diverged or collapsed" in str(comparison)
    assert all(effect.shown != "better" and np.isnan(effect.estimate) for effect in comparison.effects)


def test_the_probes_of_a_failed_run_win_nothing_either():
    table = probes({("0-49", "vb"): 0.5}, seeds=2)
    metrics = marked(study(curves(2, 1.0), curves(2, 0.9)), "cand", 1, 300, 400)
    cut = without_failed_runs(table, without_failures(metrics))
    gone = (cut["arm"] == "cand") & (cut["seed"] == 1) & (cut["step"] == 300)
    assert gone.any() and cut["value"].isna().equals(gone) and set(cut.loc[gone, "reason"]) == {"collapsed at step 400"}
    for rows, pairs in ((table, 2), (cut, 1)):
        (mechanism,) = mechanisms(rows, "base", ["cand"], {})
        assert {effect.pairs for effect in mechanism.effects} == {pairs}
    pd.testing.assert_frame_equal(without_failed_runs(table, study(curves(2, 1.0), curves(2, 0.9))), table)


@pytest.mark.slow
def test_a_study_marks_its_failed_runs_and_names_a_table_without_rows(tmp_path):
    project = copy_project(tmp_path / "project")
    write_pictures(project)
    mine = {
        "name": "openmoji", "dataset": {"source": "folder", "path": "pictures", "image_size": 16}, "model": TINY_MODEL,
        "train": {"batch_size": 8, "log_every": 1}, "checkpoints": [3], "seeds": [0], "probe": None, "tracking": False,
        "arms": {"sound": {}, "grey": {"train": {"learning_rate": 300}}, "broken": {"train": {"learning_rate": 1e12}}},
        "sample": {"images": 8, "steps": 2}, "evaluate": {"features": ["efficientnet-lite0"]},
        "compare": {"baseline": "sound", "candidates": ["grey", "broken"], "primary": {"candidate": "grey"}},
    }  # fmt: skip
    edit(project, lambda study: (study.clear(), study.update(mine)))
    target = {"target": str(REPORT / "metrics.csv")}
    done = snakemake(project, **target)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = read_verdict(project / REPORT / "verdict.json")
    reasons = {run.arm: run.reason for run in verdict.failed}
    assert reasons.keys() == {"grey", "broken"} and reasons["broken"] == "diverged at step 3"
    assert re.fullmatch(r"collapsed at step 3 \(mse .*, an untrained net has at most 1\)", reasons["grey"])
    assert {comparison.outcome for comparison in verdict.comparisons} == {"undecided"}
    table = read_table(project / REPORT / "metrics.csv").set_index("arm")["value"]
    assert table.notna().to_dict() == {"sound": True, "grey": False, "broken": False}
    assert f"grey seed 0 {reasons['grey']}" in done.stderr and "has 8 images" not in done.stderr
    assert "with 8 reference images (8 images, dataset.held_out 0)" in verdict.warnings[0]

    (path,) = project.glob("results/openmoji/sound-*/seed0/step3/metrics.csv")
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    done = snakemake(project, **target)
    message = f"{path.relative_to(project)}: is damaged (it has no rows): delete it and run the same command again"
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


# The tables of checkpoints


def write_checkpoint(path):
    rows = [("small", "a", 0, 4, 32, 1.5, features, metric, 90.5, 0.1, 8, "") for features, metric in PAIRS]
    write_table(pd.DataFrame(rows, columns=COLUMNS), path)
    return path.read_text().splitlines(keepends=True)


def test_a_complete_table_is_read(tmp_path):
    write_checkpoint(tmp_path / "metrics.csv")
    assert len(read_checkpoint(tmp_path / "metrics.csv", COLUMNS, PAIRS)) == 2
    assert len(collect([tmp_path / "metrics.csv"], ["a"], PAIRS)) == 2


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda lines: "", "is damaged (No columns to parse from file)"),
        (lambda lines: lines[0], "is damaged (it has no rows)"),
        (lambda lines: "".join(lines[:2]), "is damaged (it lacks the row lite0, kid)"),
        (lambda lines: "".join(lines)[:-3], "is damaged (its last line is incomplete)"),
        (lambda lines: "".join([*lines, lines[2]]), "is damaged (it should not have the row lite0, kid)"),
        (lambda lines: "\0" * 400, "is damaged ("),  # after a power failure
        (lambda lines: "".join(lines).replace("reason", "why"), "is damaged (its columns are study, arm, "),
        (lambda lines: "".join(lines) + '"', "is damaged ("),
        (lambda lines: "\udcff\n", "is damaged ("),
    ],
)
def test_a_table_without_its_rows_is_named(tmp_path, damage, problem):
    path = tmp_path / "metrics.csv"
    path.write_text(damage(write_checkpoint(path)), errors="surrogateescape")
    for read in (lambda: collect([path], ["a"], PAIRS), lambda: read_checkpoint(path, COLUMNS, PAIRS)):
        with pytest.raises(FileError) as error:
            read()
        assert error.value.path == path and str(error.value).startswith(f"{path}: {problem}")


def test_a_table_that_is_gone_is_named_and_only_tables_of_metrics_must_have_rows(tmp_path):
    with pytest.raises(FileError, match="metrics.csv: cannot be read"):
        read_table(tmp_path / "metrics.csv")
    write_table(pd.DataFrame(columns=PROBE_COLUMNS), tmp_path / "mechanism.csv", PROBE_COLUMNS)
    assert read_table(tmp_path / "mechanism.csv", PROBE_COLUMNS).empty
    with pytest.raises(FileError, match="it lacks the row all, mse"):
        read_checkpoint(tmp_path / "mechanism.csv", PROBE_COLUMNS, [("all", "mse")])
