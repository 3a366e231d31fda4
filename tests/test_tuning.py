"""Tuning: the trials of a study, the best values of each arm, the tuned study, and what its verdict states."""

import copy
import math
import re
import subprocess
import sys
from itertools import product

import numpy as np
import pandas as pd
import pytest
import yaml
from metric_tables import PLAN, curves, verdict_on
from metric_tables import study as table_of
from projects import ROOT, edit, jobs, tiny_project

from convergence import layout
from convergence.analysis.tuning import select, trial_columns, trials_table, tuned_record
from convergence.analysis.verdict import to_markdown
from convergence.command.budget import Rates, trial_budget
from convergence.command.orphans import orphans
from convergence.command.tune import save_study, tuned_study
from convergence.errors import StudyError
from convergence.figures.tuning import _draw, draw_tuning
from convergence.schema import Pair
from convergence.study_file import load_experiment, parse, to_text
from convergence.study_plan import current_plan, plan_in_force, record_plan
from convergence.tuning import Tuned, TunedArm, next_value

STUDY = yaml.safe_load((ROOT / "experiments/fair16.yaml").read_text())
GRID = (7e-4, 2e-3, 6e-3)
GAMMA = {"timesteps.p2.gamma": [0.5, 1]}


def read(folder, change=lambda study: None):
    """The study fair16 with changes, read from a file."""
    content = copy.deepcopy(STUDY)
    change(content)
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_experiment(path)


def tune(**keys):
    """A change of the section `tune`; None removes a key."""

    def change(study):
        study["tune"] = {key: value for key, value in (study["tune"] | keys).items() if value is not None}

    return change


def quadratic(best, key="learning_rate", grid=GRID, failed=()):
    """Trials of arms whose level is quadratic in the log of the value, with noise that depends on the seed."""
    rows = [
        {"arm": arm, key: value, "seed": seed, "level": level, "average": math.exp(level), "reason": reason}
        for arm, optimum in best.items()
        for value, seed in product(grid, (100, 101))
        for fails in [(arm, value, seed) in failed]
        for level in [math.nan if fails else 5 + (math.log(value / optimum)) ** 2 + 0.1 * (seed - 100)]
        for reason in ["diverged at step 3" if fails else ""]
    ]
    table = pd.DataFrame(rows)
    chosen = select(table, [key])
    return table.assign(best=[row[key] == chosen.get(row["arm"], {}).get(key) for _, row in table.iterrows()])


# The selection


@pytest.mark.parametrize("optima", list(product(GRID, GRID)))
def test_the_best_learning_rate_of_a_quadratic_problem_is_found(optima):
    best = dict(zip(("uni05", "under05"), optima, strict=True))
    near = {arm: 1.2 * rate for arm, rate in best.items()}  # between two values of the grid
    assert select(quadratic(near), ["learning_rate"]) == {arm: {"learning_rate": rate} for arm, rate in best.items()}


def test_values_with_a_failed_trial_lose_and_an_arm_without_others_has_no_best():
    one = quadratic({"uni05": 2.5e-3}, failed={("uni05", 2e-3, 101)})
    assert select(one, ["learning_rate"]) == {"uni05": {"learning_rate": 6e-3}}
    every = quadratic({"uni05": 2e-3, "under05": 2e-3}, failed={("uni05", rate, 100) for rate in GRID})
    assert select(every, ["learning_rate"]) == {"under05": {"learning_rate": 2e-3}}


def test_two_keys_are_selected_together_and_an_arm_without_a_key_has_the_other():
    rows = [
        ("a", 1, 1, 3.0),
        ("a", 1, 2, 2.0),
        ("a", 2, 1, 1.0),
        ("a", 2, 2, 4.0),
        ("b", 1, None, 2.0),
        ("b", 2, None, 1.5),
    ]
    trials = pd.DataFrame(rows, columns=["arm", "x", "y", "level"])
    assert select(trials, ["x", "y"]) == {"a": {"x": 2, "y": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("grid", "best", "expected"),
    [
        (GRID, 2e-3, None),
        (GRID, 6e-3, 0.018),
        (GRID, 7e-4, 2.4e-4),  # 7e-4 / (2e-3 / 7e-4) = 2.45e-4
        ((6e-3, 7e-4, 2e-3), 6e-3, 0.018),
        ((0, 0.5, 1), 1, 1.5),
        ((0.5, 1), 1, 2),
        ((1, 2, 3), 1, 0),
        ((8, 16), 8, 4),
        ((2e-3,), 2e-3, None),
    ],
)  # fmt: skip
def test_the_value_to_add_continues_the_spacing_of_the_grid(grid, best, expected):
    assert next_value(grid, best) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("keys", "arm", "best", "expected"),
    [
        ({"learning_rate": list(GRID)}, "uni05", {"learning_rate": 6e-3}, {"learning_rate": 0.018}),
        ({"timesteps.p2.gamma": [0, 0.5, 1]}, "under05", {"timesteps.p2.gamma": 1}, {"timesteps.p2.gamma": 1.5}),
        ({"timesteps.p2.gamma": [0, 0.5, 1]}, "under05", {"timesteps.p2.gamma": 0}, {}),  # gamma is at least 0
        ({"learning_rate_warmup": [10, 15]}, "uni05", {"learning_rate_warmup": 15}, {"learning_rate_warmup": 22}),
    ],
)  # fmt: skip
def test_only_a_value_that_the_arm_can_have_is_to_be_added(tmp_path, keys, arm, best, expected):
    experiment = read(tmp_path, tune(**{"learning_rate": None} | keys))
    (key, value), grid = next(iter(best.items())), next(iter(keys.values()))
    rows = [{"arm": arm, key: number, "level": abs(number - value)} for number in grid]
    assert tuned_record(experiment, pd.DataFrame(rows)).arms[arm].add == expected


# The table of trials


def test_the_average_is_that_of_the_verdict_over_the_images_that_all_trials_cover():
    settings = {"a-1": ("a", {"x": 1.0}), "a-2": ("a", {"x": 2.0}), "b-1": ("b", {"x": 1.0})}
    values = {"a-1": [8, 4, 2], "a-2": [6, 3, 1], "b-1": [8, math.nan, math.nan]}
    rows = [
        {"arm": label, "seed": 7, "images": size * step, "value": value, "features": "lite0", "metric": metric,
         "reason": "collapsed at step 3" if math.isnan(value) else ""}
        for metric in ("fd", "kid")
        for label, size in (("a-1", 100), ("a-2", 200), ("b-1", 100))
        for step, value in enumerate(values[label] if metric == "fd" else [0, 0, 0], start=1)
    ]  # fmt: skip
    trials = trials_table(pd.DataFrame(rows), settings, PLAN, ["x"])
    assert list(trials) == trial_columns(["x"])
    # From 200 to 300 images, logs are averaged; the failed run shortens nothing.
    expected = [np.log([4, 2]).mean(), np.log([6, math.sqrt(6 * 3)]).mean()]
    np.testing.assert_allclose(trials["level"][:2], expected)
    np.testing.assert_allclose(trials["average"][:2], np.exp(expected))
    assert trials["level"].isna().tolist() == [False, False, True]
    assert trials["reason"].tolist() == ["", "", "collapsed at step 3"]
    assert trials["best"].tolist() == [True, False, False]


# The study file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (tune(learning_rate=[]), ["tune.learning_rate", "at least one"]),
        (tune(learning_rate=["fast"]), ["tune.learning_rate.0", "write a number"]),
        (tune(learning_rate=[1e-3, 1e-3]), ["tune.learning_rate", "appears twice"]),
        (tune(learning_rate=[-1]), ["tune: learning_rate -1", "greater than 0"]),
        (tune(learning_rate=None), ["tune: 0 keys", "learning_rate: ["]),
        (tune(weight_decay=[0, 1], **GAMMA), ["tune: 3 keys", "one or two"]),
        (tune(precision=[16]), ["tune.precision", "no arm has a number"]),
        (tune(**{"mse_weight.speed.lam": [0.6]}), ["tune.mse_weight.speed.lam", "no arm has a number"]),
        (tune(seeds=[4, 100]), ["tune.seeds: 4", "choose other seeds"]),
        (lambda study: study["compare"].update(planned_seeds=[0, 101]), ["tune.seeds: 101", "choose other seeds"]),
        (tune(batch_size=[16, 32]), ["tune.batch_size", "equal training images"]),
        (
            lambda study: (
                tune(**{"mse_weight.p2.gamma": [0.5, 1]})(study),
                study["arms"].update(m={"match": "uni05"}),
            ),
            ["tune.mse_weight.p2.gamma: uni05 is matched", "keys of train only"],
        ),
        (tune(until=300), ["tune.until: 300", "use 256"]),
        (lambda study: study.pop("compare"), ["tune: ", "add the section compare"]),
        (lambda study: study["arms"].update(uni05_tuned={}), ["arms.uni05: ", "uni05_tuned"]),
        (lambda study: study["compare"].update(also=[{"baseline": "uni05", "candidate": "under05"}]), ["already"]),
        (lambda study: study["compare"].update(also=[{"baseline": "uni05", "candidate": "other"}]), ["other", "arms"]),
        (lambda study: study["compare"].update(also=[{"baseline": "uni05", "candidate": "uni05"}]), ["itself"]),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(tmp_path, change, words):
    with pytest.raises(StudyError) as error:
        read(tmp_path, change)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_trials_are_ordinary_runs_of_the_arms_that_have_the_key(tmp_path):
    experiment = read(tmp_path, tune(learning_rate=[2e-3, 6e-3], until=256, **GAMMA))
    trials = layout.trials(experiment)
    assert [len(experiment.grid(arm)) for arm in ("uni05", "under05")] == [2, 4]
    assert len({trial.directory for trial in trials}) == len(trials) == (2 + 4) * 2 * 2
    assert {trial.step for trial in trials} == {128, 256} and {trial.seed for trial in trials} == {100, 101}
    own = {directory.parents[1] for *_, directory in layout.checkpoints(experiment)}
    at_own = {trial.directory.parents[1] for trial in trials if trial.values["learning_rate"] == 2e-3}
    assert own <= at_own and len(at_own - own) == 1  # the trial at gamma 1
    run = experiment.run("under05", {"learning_rate": 6e-3, "timesteps.p2.gamma": 1})
    assert (run.train.learning_rate, run.scheme.timesteps.p2.gamma) == (6e-3, 1)


def test_trials_are_neither_orphans_nor_results_that_fix_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = read(tmp_path)
    for trial in layout.trials(experiment):
        trial.directory.mkdir(parents=True)
        (trial.directory / "metrics.csv").touch()
    assert orphans([experiment]) == []
    record_plan(experiment)
    changed = read(tmp_path, lambda study: study["compare"].update(margin="5%"))
    assert plan_in_force(changed).margin == 5
    assert plan_in_force(changed.model_copy(update={"tune": None})).margin == 2


def test_an_edit_of_the_trial_seeds_does_not_reopen_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = read(tmp_path)
    record_plan(experiment)
    *_, directory = next(iter(layout.checkpoints(experiment)))
    directory.mkdir(parents=True)
    (directory / "metrics.csv").touch()
    edited = read(tmp_path, lambda study: (study.update(seeds=[7, 8]), study["tune"].update(seeds=[0, 1, 2, 3, 4])))
    assert plan_in_force(edited) == current_plan(experiment) != current_plan(edited)


def test_the_budget_of_trials_counts_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cost = trial_budget(read(tmp_path, tune(until=256)), Rates(100, 10), 1)
    runs, checkpoints = 2 * 3 * 2, 2 * 3 * 2 * 2
    assert (cost.runs, cost.checkpoints, cost.images) == (runs, checkpoints, runs * 256 * 32)
    assert (cost.samples, cost.jobs) == (2 * checkpoints * 128, 2 * checkpoints + 1)  # two averages
    matched = read(tmp_path, lambda study: study["arms"].update(matched05={"match": "uni05"}))
    assert trial_budget(matched, Rates(100, 10), 1).runs == 18


# The tuned study


def test_the_tuned_study_has_both_values_of_each_arm_and_states_the_trials(tmp_path):
    experiment = read(tmp_path)
    trials = quadratic({"uni05": 6e-3, "under05": 2e-3}, failed={("under05", 6e-3, 100)})
    record = tuned_record(experiment, trials)
    path = tmp_path / "fair16_tuned.yaml"
    text = tuned_study(experiment, trials, record)
    assert save_study(text, path, overwrite=False).endswith("is written.")
    tuned = load_experiment(path)
    assert tuned.tune is None and tuned.tuned == record and list(tuned.arms) == ["uni05", "under05", "uni05_tuned"]
    assert (tuned.seeds, tuned.steps, tuned.evaluate) == (experiment.seeds, experiment.steps, experiment.evaluate)
    for arm in experiment.arms:
        assert tuned.run(arm) == experiment.run(arm)
    assert tuned.run("uni05_tuned") == experiment.run("uni05", {"learning_rate": 6e-3})
    plan = current_plan(tuned)
    assert plan.pair == ("uni05_tuned", "under05") and plan.pairs == [plan.pair, ("uni05", "under05")]
    assert set(plan.runs) == set(tuned.arms) and plan.tuned.arms["uni05"].add == {"learning_rate": 0.018}
    assert "#   under05, learning_rate 0.006: diverged at step 3, " in text and "148.4, 164 (best)" in text

    assert save_study(text, path, overwrite=False).endswith("is up to date.")
    path.write_text(text.replace("seeds: [0, 1, 2, 3, 4]", "seeds: [0]"))
    with pytest.raises(StudyError, match="add --overwrite to replace"):
        save_study(text, path, overwrite=False)
    assert load_experiment(path).seeds == (0,)
    assert save_study(text, path, overwrite=True).endswith("is written.") and path.read_text() == text

    for old, new, words in (
        ("train: {learning_rate: 0.006}", "train: {learning_rate: 0.005}", "learning_rate of uni05_tuned is 0.005"),
        ("seeds: [0, 1, 2, 3, 4]", "seeds: [0, 100]", "tuned.seeds: 100"),
        ("arm: uni05_tuned", "arm: other", "there is no arm other"),
    ):
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        with pytest.raises(StudyError, match=words):
            load_experiment(path)


def test_arms_at_their_best_values_are_not_doubled(tmp_path):
    experiment = read(tmp_path)
    trials = quadratic({"uni05": 2e-3, "under05": 2e-3})
    content = parse(tuned_study(experiment, trials, tuned_record(experiment, trials)))
    assert list(content["arms"]) == ["uni05", "under05"] and "also" not in content["compare"]
    failing = quadratic({"uni05": 2e-3}, failed={("uni05", rate, 100) for rate in GRID})
    with pytest.raises(StudyError, match="uni05 has a failed trial at all its values"):
        tuned_study(experiment, failing, tuned_record(experiment, failing))


def test_a_study_file_keeps_its_content_when_it_is_written_again():
    for path in sorted((ROOT / "experiments").glob("*.yaml")):
        content = parse(path.read_text())
        assert parse(to_text(content)) == content
    assert to_text({"keep": True, "rate": 7e-4, "steps": 8, "text": "null"}) == (
        "{keep: true, rate: 0.0007, steps: 8, text: 'null'}\n"
    )


# The verdict and the figure


def tuned_verdict(factor, untuned_factor, own=False):
    """The verdict on a study whose candidate has `factor` times the FD of the baseline, and untuned another factor."""
    values, add = {"learning_rate": 6e-3}, {"learning_rate": 0.018}
    arms = {"old": TunedArm(arm="base" if not own else "old", values=values, add=add)}
    arms["new"] = TunedArm(arm="cand" if not own else "new", values=values)
    if own:
        arms = {best.arm.replace("old", "base").replace("new", "cand"): best for best in arms.values()}
        arms = {arm: best.model_copy(update={"arm": arm}) for arm, best in arms.items()}
    plan = PLAN.model_copy(
        update={
            "also": () if own else (Pair(baseline="old", candidate="new"),),
            "tuned": Tuned(study="fair16", seeds=(100, 101), until=384, arms=arms),
        }
    )
    tuned = table_of(curves(5, 1.0, noise=0.01), curves(5, factor, seed=1, noise=0.01))
    untuned = table_of(curves(5, 1.2, seed=2, noise=0.01), curves(5, 1.2 * untuned_factor, seed=3, noise=0.01))
    untuned["arm"] = untuned["arm"].map({"base": "old", "cand": "new"})
    return verdict_on(pd.concat([tuned] if own else [tuned, untuned], ignore_index=True), plan)


@pytest.mark.parametrize(
    ("factor", "untuned", "words"),
    [
        (0.8, 1.25, "At the values of fair16 the result is another one: new is slower than old: "),
        (0.8, 0.8, "At the values of fair16 the result is the same: new is faster than old: "),
        (
            0.998,
            1.002,
            "At the values of fair16 the difference has the other sign: new and old are the same within 2%: ",
        ),
    ],
)
def test_the_verdict_states_whether_tuning_changes_the_result(factor, untuned, words):
    verdict = tuned_verdict(factor, untuned)
    primary, secondary = verdict.comparisons
    assert (primary.role, secondary.role, secondary.baseline) == ("primary", "secondary", "old")
    assert secondary.p_holm == secondary.average.p_value and math.isnan(primary.p_holm)
    assert words in verdict.answer
    edge = "The best learning_rate of old, 0.006, is at the edge of the grid: add 0.018 to tune.learning_rate in "
    assert edge in verdict.answer and "of new, " not in verdict.answer
    page = to_markdown(verdict)
    assert "| `new` (against `old`) |" in page and "| `cand` |" in page
    assert "| `old` | learning_rate 0.006 | `base` | learning_rate 0.018 |" in page
    assert len(verdict.sensitivity) == len({row.endpoint for row in verdict.sensitivity})  # of the primary pair alone


def test_the_verdict_states_that_the_values_of_the_study_are_the_best():
    verdict = tuned_verdict(0.8, 0.8, own=True)
    assert len(verdict.comparisons) == 1
    assert "The values of fair16 are the best of its trials in both arms, so tuning changes nothing." in verdict.answer


@pytest.mark.parametrize("keys", [{}, GAMMA])
def test_the_figure_shows_trials_best_values_and_edges(tmp_path, keys):
    experiment = read(tmp_path, tune(**keys))
    trials = quadratic({"uni05": 6e-3, "under05": 2e-3}, failed={("under05", 7e-4, 100)})
    for key, values in keys.items():
        doubled = [trials.assign(**{key: value, "level": trials["level"] + value}) for value in values]
        trials = pd.concat(doubled, ignore_index=True).drop_duplicates(["arm", "learning_rate", "seed", key])
        trials.loc[trials["arm"] == "uni05", key] = math.nan
        trials = trials.drop_duplicates(["arm", "learning_rate", "seed", key])
        trials["best"] &= trials[key].isna() | (trials[key] == values[0])
    record = tuned_record(experiment, trials)
    figure = _draw(experiment, current_plan(experiment), trials, record)
    axes = [ax for ax in figure.axes if ax.get_xlabel()]
    assert [ax.get_xlabel() for ax in axes] == ["learning_rate", *keys]
    circles = [line.get_xdata().tolist() for line in axes[0].lines if line.get_markersize() == 15]
    assert circles == [[6e-3], [2e-3]] and axes[0].get_xscale() == "log"
    assert "add 0.018 to tune.learning_rate" in " ".join(figure.get_supxlabel().split())
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_tuning(experiment, current_plan(experiment), trials, record, [path])
    assert paths[0].read_bytes() == paths[1].read_bytes()


# The command and the workflow


@pytest.mark.slow
def test_a_larger_grid_runs_only_the_new_trials(tmp_path):
    project = tiny_project(tmp_path / "study")
    section = {"learning_rate": [2e-3], "seeds": [100], "until": 4}
    edit(project, lambda study: study.update(tune=section, probe=None, tracking=False))
    study = project / "experiments/openmoji.yaml"

    def run(*options):
        command = [sys.executable, "-m", "convergence", "tune", "openmoji", *options]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = re.findall(r"^Job \d+: (.*)$", done.stdout + done.stderr, re.M)
        return done.stdout, sorted(set(listed))

    assert "under05, learning_rate 0.002, seed 100: results/openmoji/under05-" in run("--dry-run")[0]
    assert "experiments/openmoji_tuned.yaml is written." in run("--cores", "2")[0]
    tuned = load_experiment(project / "experiments/openmoji_tuned.yaml")
    assert list(tuned.arms) == ["uni05", "under05"] and tuned.tuned.arms["uni05"].values == {"learning_rate": 0.002}
    assert run("--dry-run")[1] == []

    edit(project, lambda study: study["tune"].update(learning_rate=[1e-3, 2e-3]))
    runs = [f"{arm}-{load_experiment(study).run(arm, {'learning_rate': 1e-3}).hash8}" for arm in ("uni05", "under05")]
    assert run("--dry-run")[1] == [
        *(f"Evaluate openmoji {run} seed 100 at step 4" for run in sorted(runs)),
        "Select the best values of each arm of openmoji",
        *(f"Train openmoji {run} seed 100 to step 4" for run in sorted(runs)),
    ]
    # The figure of the study needs no trial.
    assert not any("seed 100" in job for job in jobs(project))
