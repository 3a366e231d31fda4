import html
import json
import re

import numpy as np
import pandas as pd
import pytest
from metric_tables import COMPARE, curves, study
from PIL import Image
from test_mechanism import probes

from convergence.analysis.comparison import compare_study, speedup_table
from convergence.analysis.verdict import judge, read_verdict, to_markdown, write_verdict
from convergence.figures.curves import _draw_curves, fid_curves
from convergence.figures.forest import _draw, draw_forest
from convergence.pages import to_html
from convergence.tables import PROBE_COLUMNS
from diffusion.errors import FileError

NO_PROBES = pd.DataFrame(columns=PROBE_COLUMNS)


def verdict_on(metrics, compare=COMPARE, **options):
    return judge(metrics, NO_PROBES, "small", compare, **options)


def markdown_of(metrics, compare=COMPARE):
    return to_markdown(verdict_on(metrics, compare))


# The answer


@pytest.mark.parametrize(
    ("factor", "outcome", "expected"),
    [
        (0.8, "faster", "cand is faster than base in FD (lite0): -"),
        (1.2, "slower", "cand is slower than base in FD (lite0): +"),
        (1.0, "no difference shown", "No difference shown between cand and base in FD (lite0): "),
    ],
)
def test_the_answer_has_the_outcome_and_its_numbers(factor, outcome, expected):
    verdict = verdict_on(study(curves(5, 1.0, noise=0.01), curves(5, factor, seed=1, noise=0.01)))
    (comparison,) = verdict.comparisons
    average = comparison.average
    assert verdict.question == "Does cand converge in fewer training images than base?"
    assert verdict.outcome == comparison.outcome == outcome and verdict.answer.startswith(expected)
    assert "5 paired seeds" in verdict.answer and "3,200 to 12,800 training images" in verdict.answer
    change, low, high = (100 * np.expm1(-bound) for bound in (average.estimate, average.high, average.low))
    assert f"{change:+.1f}% ({low:+.1f}% to {high:+.1f}%)" in verdict.answer
    assert not set("*`\n") & set(verdict.answer)


def test_few_seeds_state_what_cannot_be_concluded():
    for seeds, caution in ((1, "With one seed there is no interval"), (2, "the interval extends 12.7 standard errors")):
        verdict = verdict_on(study(curves(seeds, 1.0), curves(seeds, 0.5)))
        text = to_markdown(verdict)
        assert caution in verdict.answer and "nan" not in text and "inf" not in text
    assert "no interval" in markdown_of(study(curves(1, 1.0), curves(1, 0.5)))
    assert "standard errors" not in verdict_on(study(curves(3, 1.0), curves(3, 0.5))).answer


def test_the_answer_says_what_the_seeds_can_detect():
    noisy = study(curves(3, 1.0), curves(3, 1.0, seed=1))
    assert "At this noise, 3 seeds detect a difference of " in verdict_on(noisy).answer
    assert "detect a difference" not in verdict_on(noisy[noisy["seed"] < 2]).answer


def test_diverged_runs_are_listed_and_unbounded_intervals_say_so():
    base, cand = curves(4, 1.0), curves(4, 0.7)
    cand[3, 2:] = np.nan
    verdict = verdict_on(study(base, cand))
    text = to_markdown(verdict)
    assert "- `cand` seed 3: diverged at step 7" in text and "1 run of cand diverged or collapsed." in verdict.answer
    assert verdict.outcome == "no difference shown" and "or less" in verdict.answer
    assert "| 1 of 4 |" in text and "| 3 seeds of 4 |" in text


def test_secondary_comparisons_are_marked():
    metrics = pd.concat([study(curves(3, 1.0), curves(3, 0.9), metric=metric) for metric in ("kid", "fd")])
    text = markdown_of(metrics)
    assert text.count("**primary**") == 1 and text.count("| secondary |") == 1 and "## Secondary comparisons" in text
    assert text.index("**primary**") < text.index("| secondary |")
    assert "## Secondary comparisons" not in markdown_of(metrics[metrics["metric"] == "fd"])


def test_studies_without_a_result_say_so():
    metrics = study(curves(2, 1.0), curves(2, 0.9))
    nothing = verdict_on(metrics, None)
    assert nothing.answer is nothing.question is nothing.outcome is None
    assert "This study compares nothing" in to_markdown(nothing)
    empty = verdict_on(metrics.assign(value=np.nan))
    assert empty.outcome is None and empty.answer == "No answer: no seed has a value in both arms."
    assert f"**Answer.** {empty.answer}" in to_markdown(empty)
    secondary = verdict_on(metrics.assign(metric="kid"))
    assert secondary.answer == "No answer: no seed has a value of the primary metric in both arms."
    assert "| secondary |" in to_markdown(secondary)
    large = study(curves(2, 1.0, noise=1.0), curves(2, 1.0, noise=1.0, seed=1))
    assert "too many" in markdown_of(large)


def test_other_studies_of_a_table_are_ignored():
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    other = study(curves(3, 1.0), curves(3, 1.5), name="other")
    assert markdown_of(pd.concat([other, metrics])) == markdown_of(metrics)


def test_every_row_of_a_markdown_table_has_equal_cells():
    text = markdown_of(study(curves(3, 1.0), curves(3, 0.9)))
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 3
    for block in tables:
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("arm", ["a|b", "![i](http://x.org/i.png)", "`c`", "<img src=x>", "*_a_*"])
def test_names_are_shown_as_text(arm):
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    metrics.loc[metrics["arm"] == "cand", "arm"] = arm
    metrics["features"] = f"{arm}features"
    compare = COMPARE | {"candidates": [arm], "primary": {"candidate": arm, "metric": "fd"}}
    page = to_html(markdown_of(metrics, compare | {"features": f"{arm}features"}), "Verdict")
    cells = re.findall(r"<td>(?:<code>)?(.*?)(?:</code>)?</td>", page)
    assert cells.count(html.escape(arm)) == 5 and cells.count(f"FD ({html.escape(arm)}features)") == 5
    assert f"</strong> {html.escape(arm)} is faster than base in FD ({html.escape(arm)}features)" in page
    assert not re.search("<(img|a|em)[ >]", page)


# Files


@pytest.mark.parametrize("compare", [COMPARE, None])
def test_a_verdict_survives_its_file(tmp_path, compare):
    base, cand = curves(4, 1.0), curves(4, 0.7)
    cand[3, 2:] = np.nan
    cand[2] *= 0.2  # reaches every threshold before the first trained checkpoint
    metrics = study(base, cand)
    compare = compare and compare | {"matched": ["cand"]}
    verdict = judge(metrics, probes({}), "small", compare, ["The code has changed: train again."])
    write_verdict(verdict, tmp_path)
    written = read_verdict(tmp_path / "verdict.json")
    assert to_markdown(written) == to_markdown(verdict) == (tmp_path / "verdict.md").read_text()
    assert repr(written) == repr(verdict)
    json.loads((tmp_path / "verdict.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    speedup_table(written.comparisons).to_csv(tmp_path / "again.csv", index=False)
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "speedup.csv").read_text()
    if compare:
        times = written.comparisons[0].effect("images").per_seed
        assert times[3].candidate == np.inf and np.isnan(times[2].candidate)


def test_warnings_come_first():
    verdict = verdict_on(study(curves(3, 1.0), curves(3, 0.9)), warnings=["First.", "Second."])
    title, first, second, question, *_ = to_markdown(verdict).split("\n\n")
    assert title == "# Verdict: small" and "First." in first and "Second." in second and "Question" in question
    assert "Warning" in to_markdown(verdict_on(study(curves(2, 1.0), curves(2, 0.9)), None, warnings=["First."]))


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"study": "a", "verdict": "faster"}'])
def test_a_file_that_is_not_a_verdict_is_rejected(tmp_path, content):
    path = tmp_path / "verdict.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FileError, match="verdict.json: "):
        read_verdict(path)


# Figures


def test_forest_shows_estimates_intervals_and_seeds(tmp_path):
    base, cand = curves(4, 1.0), curves(4, 0.9)
    cand[0] *= 1.6  # never reaches a threshold
    comparisons = compare_study(study(base, cand), COMPARE)
    left, right = _draw(comparisons).axes
    squares = [line.get_xdata()[0] for ax in (left, right) for line in ax.lines if line.get_marker() == "s"]
    estimates = [effect.estimate for effect in comparisons[0].effects]
    np.testing.assert_allclose(squares, [*(100 * -np.expm1(-np.array(estimates[:2]))), *estimates[2:]])
    assert sum(line.get_marker() == "o" and len(line.get_xdata()) == 3 for line in right.lines) >= 2
    assert [text.get_text() for text in left.get_yticklabels()] == ["average", "at the end"]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_forest(comparisons, [path])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    draw_forest([], [tmp_path / "empty.png"])
    assert min(Image.open(tmp_path / "empty.png").size) > 100


def test_forest_keeps_its_panels_if_every_seed_is_censored(tmp_path):
    base, cand = curves(2, 1.0), 3 * curves(2, 1.0)  # the candidate never reaches a threshold
    figure = _draw(compare_study(study(base, cand), COMPARE))
    figure.savefig(tmp_path / "a.png")
    assert all(ax.get_position().width > 0.25 for ax in figure.axes)


def test_curves_mark_the_middle_threshold_and_its_crossings(tmp_path):
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    (comparison,) = compare_study(metrics, COMPARE)
    middle = comparison.middle_threshold
    (ax, *_) = _draw_curves(metrics, "fd", [comparison]).axes
    ticks = [line for line in ax.lines if line.get_marker() == "|"]
    seeds = comparison.effect("images").per_seed
    times = [[seed.baseline for seed in seeds], [seed.candidate for seed in seeds]]
    np.testing.assert_allclose([line.get_xdata() for line in ticks], times)
    np.testing.assert_allclose([line.get_ydata() for line in ticks], middle)
    assert f"threshold {middle:.4g}" in " ".join(text.get_text() for text in ax.texts).replace("\n", " ")
    write_verdict(verdict_on(metrics), tmp_path)
    written = read_verdict(tmp_path / "verdict.json").comparisons
    for name, comparisons in (("a.png", [comparison]), ("b.png", written), ("plain.png", [])):
        fid_curves(metrics, [tmp_path / name], comparisons=comparisons)
    curves_png = (tmp_path / "a.png").read_bytes()
    assert curves_png == (tmp_path / "b.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_a_comparison_without_thresholds_marks_none():
    base = curves(3, 1.0)
    base[:, 2:] = np.nan  # every run of the baseline diverges
    metrics = study(base, curves(3, 0.9))
    (comparison,) = compare_study(metrics, COMPARE)
    (ax, *_) = _draw_curves(metrics, "fd", [comparison]).axes
    assert not comparison.thresholds and "threshold" not in " ".join(text.get_text() for text in ax.texts)
