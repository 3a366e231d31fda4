import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_statistics import curves, study

from convergence.analysis.comparison import speedup_table
from convergence.analysis.mechanism import compare_probes
from convergence.analysis.power import noise_floor, seeds_needed
from convergence.analysis.verdict import verdict_text
from convergence.command import plan
from convergence.figures.curves import _draw_curves, fid_curves
from convergence.figures.forest import _draw, draw_forest
from convergence.tables import PROBE_COLUMNS

NO_PROBES = compare_probes(pd.DataFrame(columns=PROBE_COLUMNS), {})

COMPARE = {
    "baseline": "base",
    "candidates": ["cand"],
    "primary": {"candidate": "cand", "metric": "fd"},
    "thresholds": None,
    "features": "lite0",
    "matched": [],
}


def compared(metrics, **changes):
    return speedup_table(metrics, {"small": COMPARE | changes})


def told(metrics, compare=COMPARE):
    table = speedup_table(metrics, {"small": compare} if compare else {})
    return verdict_text(metrics, table, NO_PROBES, {"small": compare})


def answer(text):
    return re.search(r"\*\*Answer\.\*\*.*", text)[0]


# The verdict in words


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.8, "`cand` is faster"), (1.2, "`cand` is slower"), (1.0, "No difference shown")]
)
def test_the_answer_has_the_verdict_and_its_numbers(factor, expected):
    metrics = study(curves(5, 1.0, noise=0.01), curves(5, factor, seed=1, noise=0.01))
    table = compared(metrics)
    average = table[(table["quantity"] == "average") & table["seed"].isna()].iloc[0]
    text = answer(told(metrics))
    assert f"**{expected}" in text and "5 paired seeds" in text and "3,200 to 12,800 training images" in text
    change, low, high = (100 * np.expm1(-average[of]) for of in ("effect", "high", "low"))
    assert f"{change:+.1f}% ({low:+.1f}% to {high:+.1f}%)" in text


def test_few_seeds_say_what_they_cannot_conclude():
    for seeds, warning in ((1, "One seed: there is no interval"), (2, "the interval reaches 12.7 standard errors")):
        text = told(study(curves(seeds, 1.0), curves(seeds, 0.5)))
        assert warning in answer(text) and "nan" not in text and "inf" not in text.replace("info", "")
    assert "no interval" in told(study(curves(1, 1.0), curves(1, 0.5)))
    assert "standard errors" not in answer(told(study(curves(3, 1.0), curves(3, 0.5))))


def test_diverged_runs_are_listed_and_the_open_side_is_told():
    base, cand = curves(4, 1.0), curves(4, 0.7)
    cand[3, 2:] = np.nan
    text = told(study(base, cand))
    assert "`cand` seed 3: diverged at step 7" in text and "1 run of `cand` diverged" in answer(text)
    assert "No difference shown" in answer(text) and "or less" in answer(text)
    assert "1 of 4" in text and "3 seeds of 4" in text


def test_secondary_comparisons_are_marked():
    metrics = pd.concat([study(curves(3, 1.0), curves(3, 0.9), metric=metric) for metric in ("fd", "kid")])
    text = told(metrics)
    assert text.count("**primary**") == 1 and text.count("| secondary |") == 1 and "### Secondary" in text
    assert "### Secondary" not in told(metrics[metrics["metric"] == "fd"])


def test_nothing_to_compare_is_said():
    metrics = study(curves(2, 1.0), curves(2, 0.9))
    assert "compares nothing" in told(metrics, None)
    assert "nothing can be said" in told(metrics.assign(value=np.nan))
    large = study(curves(2, 1.0, noise=1.0), curves(2, 1.0, noise=1.0, seed=1))
    assert "too many" in told(large)


def test_tables_have_equal_rows():
    text = told(study(curves(3, 1.0), curves(3, 0.9)))
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count("|") for line in block.splitlines()}) == 1


# Figures


def test_forest_shows_estimates_intervals_and_seeds(tmp_path):
    base, cand = curves(4, 1.0), curves(4, 0.9)
    cand[0] *= 1.6  # never arrives
    table = compared(study(base, cand))
    left, right = _draw(table).axes
    squares = [line.get_xdata()[0] for ax in (left, right) for line in ax.lines if line.get_marker() == "s"]
    summary = table[table["seed"].isna()]
    shown = [*(100 * -np.expm1(-summary["effect"][:2])), *summary["effect"][2:]]
    np.testing.assert_allclose(squares, shown)
    assert sum(line.get_marker() == "o" and len(line.get_xdata()) == 3 for line in right.lines) >= 2
    assert [text.get_text() for text in left.get_yticklabels()] == ["average", "at the end"]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_forest(table, [path])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    draw_forest(table.iloc[:0], [tmp_path / "empty.png"])
    assert min(Image.open(tmp_path / "empty.png").size) > 100


def test_forest_keeps_its_panels_where_every_seed_is_censored(tmp_path):
    base, cand = curves(2, 1.0), 3 * curves(2, 1.0)  # the candidate never arrives
    figure = _draw(compared(study(base, cand)))
    figure.savefig(tmp_path / "a.png")
    assert all(ax.get_position().width > 0.25 for ax in figure.axes)


def test_curves_mark_the_middle_threshold_and_its_crossings(tmp_path):
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    table = compared(metrics)
    rows = table[(table["quantity"] == "images") & table["seed"].notna()]
    middle = rows["threshold"].unique()[1]
    (ax, *_) = _draw_curves(metrics, "fd", table).axes
    ticks = [line for line in ax.lines if line.get_marker() == "|"]
    times = rows[rows["threshold"] == middle][["of_baseline", "of_candidate"]].to_numpy().T
    np.testing.assert_allclose([line.get_xdata() for line in ticks], times)
    np.testing.assert_allclose([line.get_ydata() for line in ticks], middle)
    assert f"threshold {middle:.4g}" in " ".join(text.get_text() for text in ax.texts).replace("\n", " ")
    table.to_csv(tmp_path / "speedup.csv", index=False)
    fid_curves(metrics, [tmp_path / "curves.png"], speedups=pd.read_csv(tmp_path / "speedup.csv"))
    fid_curves(metrics, [tmp_path / "plain.png"], speedups=pd.read_csv(tmp_path / "speedup.csv").iloc[:0])
    assert (tmp_path / "curves.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


# The planner


def test_planner_gives_seeds_and_hours(tmp_path, capsys):
    metrics = study(curves(3, 1.0), curves(3, 1.0, seed=1), seconds_per_step=(9.0, 18.0))  # an hour and two
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    choice = [str(tmp_path / "metrics.csv"), "--baseline", "base", "--candidate", "cand", "--effect"]
    plan.main([*choice, "2%"])
    text = capsys.readouterr().out
    seeds = seeds_needed(np.log(1.02), noise_floor(compared(metrics)).paired)
    assert f"  {seeds} seeds, {3.0 * seeds:,.1f} hours" in text
    plan.main([*choice, "0.02"])
    assert capsys.readouterr().out == text


def test_planner_takes_curves_from_anywhere(tmp_path, capsys):
    metrics = study(curves(3, 1.0), curves(3, 1.0, seed=1))
    metrics[["arm", "seed", "images", "value"]].to_csv(tmp_path / "curves.csv", index=False)
    plan.main([str(tmp_path / "curves.csv"), "--baseline", "base", "--candidate", "cand", "--effect", "2%"])
    text = capsys.readouterr().out
    assert "Pilot: 3 pairs, FID," in text and " seeds, if that is the true spread" in text and "ours" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--candidate", "nobody"], "metrics.csv: no arm nobody: name one of base, cand"),
        (["--candidate", "cand", "--metric", "kid"], "--metric kid is not in the table: take one of fd"),
        (["--candidate", "cand", "--effect", "0.0001%"], "more than 10,000 seeds"),
    ],
)
def test_planner_tells_mistakes_in_one_sentence(tmp_path, arguments, said):
    study(curves(3, 1.0), curves(3, 0.9, seed=1)).to_csv(tmp_path / "metrics.csv", index=False)
    with pytest.raises(SystemExit, match=said):
        plan.main([str(tmp_path / "metrics.csv"), "--baseline", "base", "--effect", "1%", *arguments])
    with pytest.raises(SystemExit):
        plan.main([str(tmp_path / "metrics.csv"), "--baseline", "base", "--candidate", "cand", "--effect", "-1"])
