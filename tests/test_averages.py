"""Averages of the weights: their definitions, their files, and how a study measures and compares several of them."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from metric_tables import PLAN, curves, study, verdict_on
from projects import edit, jobs, snakemake, tiny_project
from safetensors.torch import load_file
from test_training import IMAGES, assert_same_end, tiny

from convergence.analysis.markdown import to_markdown
from convergence.figures.averages import _draw
from convergence.tables import check_curves, of_average
from convergence.tracking.content import eval_metrics, failure
from diffusion.averages import Power, ema_decay, power_exponent, relative_width
from diffusion.training.segment import train_segment
from diffusion.training.state import TrainState, train_step

LIST = [0.9, {"power": 0.1}, "raw", {"power": 0.2}]
FILES = [f"weights{name}.safetensors" for name in ("", ".power0.1", ".raw", ".power0.2")]


@pytest.mark.parametrize("width", [0.001, 0.05, 0.1, 0.2, 0.288])
def test_the_exponent_gives_the_relative_width(width):
    gamma = power_exponent(width)
    assert gamma > 0 and (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2, rel=1e-9)


@pytest.mark.parametrize(
    ("average", "steps", "width"),
    [
        (Power(power=0.1), 5000, 0.1),
        (Power(power=0.25), 5000, 0.25),
        ("raw", 100, 0),
        (0.0, 100, 0),
        (0.99, 5000, np.sqrt(0.99) / 0.01 / 5000),  # a geometric distribution
    ],
)
def test_the_relative_width_of_an_average(average, steps, width):
    assert relative_width(average, steps, warmup=False) == pytest.approx(width, rel=1e-4)


def test_each_average_is_the_weighted_mean_of_its_definition():
    state, steps = TrainState(tiny(ema_decay=LIST, ema_warmup=False), 0, "cpu"), 12
    history = [[p.detach().double().clone() for p in state.parameters]]
    for _ in range(steps):
        train_step(state, state.batches(IMAGES))
        history.append([p.detach().double().clone() for p in state.parameters])
    k = np.arange(steps + 1)
    expected = {"ema0.9": np.where(k > 0, 0.1, 1) * 0.9 ** (steps - k), "raw": k == steps}
    for width in (0.1, 0.2):  # the share of step k is the integral of t^gamma from k - 1 to k
        expected[f"power{width}"] = np.diff((k / steps) ** (power_exponent(width) + 1), prepend=0)
    found = state.averaged_weights()
    assert list(found) == ["ema0.9", "power0.1", "raw", "power0.2"]
    for name, shares in expected.items():
        assert shares.sum() == pytest.approx(1)
        for place, actual in enumerate(found[name].values()):
            mean = sum(share * weights[place] for share, weights in zip(shares, history, strict=True))
            torch.testing.assert_close(actual.double(), mean, rtol=1e-5, atol=1e-6)


def test_warm_up_limits_constant_decays_only():
    assert ema_decay(0, 0.999, True) == 0.1 and ema_decay(0, 0.999, False) == 0.999
    power = Power(power=0.1)
    assert [ema_decay(step, power, True) for step in range(9)] == [ema_decay(step, power, False) for step in range(9)]
    assert ema_decay(0, power, True) == 0


def test_a_resumed_run_has_the_same_averages_in_every_byte(tmp_path):
    run, previous = tiny(ema_decay=LIST), None
    train_segment(run, 0, IMAGES, None, tmp_path / "whole/step6", 6, "cpu")
    for until in (2, 4, 6):
        train_segment(run, 0, IMAGES, previous, tmp_path / f"parts/step{until}", until, "cpu")
        previous = tmp_path / f"parts/step{until}/state.pt"
    whole, parts = tmp_path / "whole/step6", tmp_path / "parts/step6"
    assert_same_end(whole, parts)
    files = [(whole / file).read_bytes() for file in FILES]
    assert files == [(parts / file).read_bytes() for file in FILES] and len(set(files)) == len(LIST)
    raw = torch.load(whole / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(raw[name], value) for name, value in load_file(whole / FILES[2]).items())


def test_further_averages_change_neither_training_nor_the_first_average(tmp_path):
    for name, decay in (("one", 0.9), ("several", LIST)):
        train_segment(tiny(ema_decay=decay), 0, IMAGES, None, tmp_path / name / "step4", 4, "cpu")
    one, several = (
        {k: v for k, v in load_file(tmp_path / name / "step4" / FILES[0]).items()} for name in ("one", "several")
    )
    assert all(torch.equal(one[name], several[name]) for name in one)
    states = [torch.load(tmp_path / name / "step4/state.pt", weights_only=True) for name in ("one", "several")]
    assert states[0]["ema"].keys() == one.keys()  # as in versions that kept one average
    assert list(states[1]["ema"]) == ["ema0.9", "power0.1", "power0.2"]


def averaged(factors, order=("ema0.9", "power0.1")):
    """The table of two arms with an average per factor, candidate / baseline."""
    base = curves(4, 1, noise=0.01)
    tables = [
        study(base, curves(4, factor, 1, 0.01)).assign(ema=name) for name, factor in zip(order, factors, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize(("other", "changes"), [(1.1, True), (0.8, False)])
def test_the_verdict_shows_other_averages_and_says_when_the_sign_changes(other, changes):
    table = averaged([0.9, other])
    verdict = verdict_on(table, PLAN.model_copy(update={"ema": "ema0.9"}))
    alone = verdict_on(of_average(table), PLAN)
    assert verdict.comparisons == alone.comparisons and verdict.outcome == "faster"
    rows = [row for row in verdict.sensitivity if row.endpoint.endswith(", power0.1")]
    assert [row.endpoint for row in rows] == ["average over images, power0.1", "last checkpoint, power0.1"]
    expected = verdict_on(of_average(table, "power0.1"), PLAN).primary
    assert [row.estimate for row in rows] == [expected.average.estimate, expected.final.estimate]
    assert "| average over images, power0.1 |" in to_markdown(verdict)
    sentence = f"The sign depends on the average of the weights: +{rows[0].estimate:.1f}%"
    assert (sentence in verdict.answer) == changes == ("The sign depends" in verdict.answer)
    if not changes:
        assert verdict.answer == alone.answer


def test_the_plan_chooses_the_primary_average():
    table = averaged([0.9, 1.1])
    assert verdict_on(table, PLAN.model_copy(update={"ema": "power0.1"})).outcome == "slower"
    assert verdict_on(table, PLAN).outcome == "faster"  # by default the first one
    missing = verdict_on(table, PLAN.model_copy(update={"ema": "raw"}))
    assert missing.outcome is None and "raw, is not measured: add it to evaluate.ema" in " ".join(missing.warnings)


def test_a_planned_average_without_influences_is_judged():
    """Influences are known for the first measured average only."""
    table = averaged([0.9, 1.1])
    table["influences"] = pd.Series(
        [np.zeros(4)] * (table["ema"] == "ema0.9").sum(), table.index[table["ema"] == "ema0.9"]
    )
    found = verdict_on(table, PLAN.model_copy(update={"ema": "power0.1"})).comparisons[0]
    assert found.outcome == "slower" and np.isnan(found.noise.samples)


def test_curves_with_averages_are_those_of_the_first_one():
    table = averaged([0.9, 1.1])
    pd.testing.assert_frame_equal(check_curves(table), check_curves(of_average(table)))


def test_mlflow_names_further_averages():
    row = {"metric": "fd", "features": "lite0", "images": "32", "value": "5", "reason": ""}
    other = row | {"ema": "raw", "value": "7", "reason": "collapsed at step 4"}
    rows = [row | {"ema": "ema0.9"}, other]
    assert eval_metrics(rows) == {("eval/fd lite0", 32): 5, ("eval/fd lite0 raw", 32): 7}
    assert eval_metrics([row]) == {("eval/fd lite0", 32): 5} and eval_metrics([]) == {}
    assert failure(rows) is None and failure([other]) == "collapsed at step 4" and failure([]) is None


def test_the_figure_shows_the_mean_at_the_last_checkpoint_over_the_width():
    table = averaged([0.9, 1.1])
    table.loc[(table["ema"] == "power0.1") & (table["seed"] == 0), ["value", "reason"]] = [
        np.nan,
        "collapsed at step 9",
    ]
    widths = {(arm, name): width for arm in ("base", "cand") for name, width in (("ema0.9", 0.3), ("power0.1", 0.1))}
    ax = _draw(table, widths).axes[0]
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.8]
    end = table[(table["step"] == 400) & table["value"].notna()]
    for line, arm in zip(lines, ("base", "cand"), strict=True):
        means = [
            np.exp(np.log(end[(end["arm"] == arm) & (end["ema"] == name)]["value"]).mean())
            for name in ("power0.1", "ema0.9")
        ]
        np.testing.assert_allclose(line.get_xdata(), [0.1, 0.3])
        np.testing.assert_allclose(line.get_ydata(), means)
    assert {"base", "cand", "ema0.9", "power0.1"} <= {text.get_text() for text in ax.texts}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished study that measures three averages."""
    project = tiny_project(tmp_path_factory.mktemp("averages") / "project")

    def several(study):
        study["train"]["ema_decay"] = [0.9, {"power": 0.1}]
        study["evaluate"]["ema"] = [{"power": 0.1}, 0.9, "raw"]
        study |= {"tracking": False, "probe": None, "checkpoints": [0, 4]}

    edit(project, several)
    done = snakemake(project, target="all")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.mark.slow
def test_a_study_measures_each_average_from_its_own_file(project):
    table = pd.read_csv(project / "reports/openmoji/metrics.csv")
    names = ["power0.1", "ema0.9", "raw"]
    assert list(table["ema"].unique()) == names and (table.groupby(["arm", "step"]).size() == 3).all()
    by_step = {step: rows.groupby(["arm"])["value"].nunique() for step, rows in table.groupby("step")}
    assert (by_step[0] == 1).all() and (by_step[4] == 3).all()  # all averages of the untrained net are equal
    (first,) = project.glob("results/openmoji/uni05-*/seed0/step4")
    facts = json.loads((first / "provenance.json").read_text())
    assert list(facts["averages"]) == ["ema0.9", "power0.1", "raw"] and facts["averages"]["ema0.9"] == facts["sha256"]
    assert sorted(path.name for path in first.glob("weights*")) == sorted(FILES[:3])
    plan = json.loads((project / "results/openmoji/plan.json").read_text())
    verdict = json.loads((project / "reports/openmoji/verdict.json").read_text())
    assert plan["ema"] == verdict["plan"]["ema"] == "power0.1"
    assert {row["endpoint"] for row in verdict["sensitivity"]} >= {"last checkpoint, raw", "last checkpoint, ema0.9"}
    assert (project / "reports/openmoji/averages.png").stat().st_size > 10_000
    assert jobs(project) == []


@pytest.mark.slow
def test_a_changed_file_of_an_average_is_noticed_and_another_choice_trains_nothing(project):
    (first,) = project.glob("results/openmoji/uni05-*/seed0/step4")
    sample = [sys.executable, "-m", "convergence", "sample", "--images", "2", "--steps", "2"]
    for file in FILES[:2]:
        subprocess.run([*sample, first / file, "--out", project / file], cwd=project, check=True, capture_output=True)
    images = [np.load(project / file / "samples.npy") for file in FILES[:2]]
    assert not np.array_equal(*images)

    edit(project, lambda study: study["evaluate"].update(ema=[0.9, "raw"]))
    assert not [message for message in jobs(project) if message.startswith("Train")]
    (first / FILES[2]).write_bytes((first / FILES[0]).read_bytes())
    done = snakemake(project, target=str((first / "metrics.csv").relative_to(project)))
    assert done.returncode and FILES[2] in done.stdout + done.stderr
