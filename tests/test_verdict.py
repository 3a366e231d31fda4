import html
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from metric_tables import PLAN, curves, known_costs, study, verdict_on
from test_mechanism import EQUAL, probes

from convergence.analysis.comparison import effects_table
from convergence.analysis.power import cautious_sd, seeds_needed
from convergence.analysis.results import Noise
from convergence.analysis.verdict import adjust, judge, read_verdict, to_markdown, write_verdict
from convergence.analysis.wording import effect_text
from convergence.errors import StudyError
from convergence.figures.curves import _draw_curves, fid_curves
from convergence.pages import to_html
from diffusion.errors import FileError


def markdown_of(metrics, plan=PLAN):
    return to_markdown(verdict_on(metrics, plan))


# The answer


def test_the_answer_has_the_outcome_and_its_numbers():
    arms = study(curves(5, 1.0, noise=0.01), curves(5, 0.8, seed=1, noise=0.01))
    verdict = verdict_on(arms, costs=known_costs(base=2.0, cand=3.0))
    (comparison,) = verdict.comparisons
    assert verdict.question == "Does cand converge in fewer training images than base, by FD (lite0)?"
    assert verdict.outcome == comparison.outcome == "faster"
    average, images = comparison.average, comparison.images
    hours = [1.5 * value for value in (images.estimate, images.low, images.high)]
    assert verdict.answer.startswith(
        f"cand is faster than base: it needs {images.estimate:.2f} times the images ({images.low:.2f} to "
        f"{images.high:.2f}) and {hours[0]:.2f} times the hours ({hours[1]:.2f} to {hours[2]:.2f}) to reach FD "
        f"{comparison.primary_threshold:.4g}; FD {average.estimate:+.1f}% on average "
        f"({average.low:+.1f} to {average.high:+.1f}). "
    )
    assert not set("*`\n") & set(verdict.answer) and "detect" not in verdict.answer
    assert f"| {comparison.primary_threshold:.4g} (primary) |" in to_markdown(verdict)
    assert f"| {effect_text(comparison.hours)} |" in to_markdown(verdict)
    assert to_markdown(verdict).split("\n\n")[2].startswith("**Answer.** **cand is faster than base**: it needs")


def test_the_verdict_has_a_table_of_costs():
    metrics, costs = study(curves(3, 1.0), curves(3, 0.8, seed=1)), known_costs(base=2.0, cand=3.0)
    text = to_markdown(verdict_on(metrics, costs=costs))
    assert "| arm | seconds per 1000 images | divided by those of `base` | rounds | device |" in text
    assert "| `cand` | 3 (3 to 3) | 1.500 (1.500 to 1.500) | 4 | a CPU |" in text
    assert "## Cost\n\nNot measured, so hours are not compared.\n" in to_markdown(verdict_on(metrics))
    assert verdict_on(metrics, None, costs=costs).costs == tuple(costs.values())


def test_few_seeds_state_what_cannot_be_concluded():
    one, two, three = (verdict_on(study(curves(n, 1.0, noise=0), curves(n, 0.5, seed=1))) for n in (1, 2, 3))
    assert one.outcome == "undecided" and "so nothing can be concluded" in one.answer
    assert two.outcome == "faster" and "confirm with more seeds" in two.answer
    assert "**Answer.** cand is faster" in to_markdown(two)  # not in bold
    assert "confirm" not in three.answer and "**Answer.** **cand is faster" in to_markdown(three)
    for verdict in (one, two, three):
        assert not re.search(r"\b(nan|inf)\b", to_markdown(verdict))


def test_an_undecided_answer_says_what_the_seeds_can_detect():
    noisy = study(curves(3, 1.0), curves(3, 1.0, seed=1))
    assert "At this noise, 3 seeds detect a difference of " in verdict_on(noisy).answer
    two = verdict_on(noisy[noisy["seed"] < 2])
    assert two.outcome == "undecided" and "detect a difference" not in two.answer and "confirm" not in two.answer


def test_diverged_runs_are_listed_and_unbounded_intervals_say_so():
    base, cand = curves(4, 1.0), curves(4, 0.7)
    cand[3, 2:] = np.nan
    metrics = study(base, cand)
    metrics.loc[2, ["value", "reason"]] = np.nan, "needs 4 images"
    verdict = verdict_on(metrics)
    text = to_markdown(verdict)
    assert text.count("- `cand` seed 3: diverged at step 7") == 1 and len(verdict.failed) == 1
    assert "1 run of cand of 4 diverged or collapsed." in verdict.answer
    assert verdict.warnings == ("base seed 0 has no fd at 1 checkpoint (needs 4 images): they are left out.",)
    assert verdict.outcome == "undecided" and " or more)" in text
    assert "| 1 of 4 |" in text and "| 3 seeds of 4 |" in text


def test_secondary_comparisons_have_p_values_adjusted_for_their_number():
    arms = [("one", 0.97), ("two", 0.99), ("three", 1.0)]
    base = curves(5, 1.0, noise=0.01)
    tables = [
        study(base, curves(5, factor, seed=k, noise=0.01)).replace({"arm": {"cand": arm}})
        for k, (arm, factor) in enumerate([("cand", 0.9), *arms])
    ]
    metrics = pd.concat([tables[0], *(table[table["arm"] != "base"] for table in tables[1:])])
    plan = PLAN.model_copy(update={"candidates": ("cand", *(arm for arm, _ in arms))})
    verdict = verdict_on(metrics, plan)
    primary, *secondary = verdict.comparisons
    assert primary.role == "primary" and np.isnan(primary.p_holm)
    p = sorted(comparison.average.p_value for comparison in secondary)
    # Holm's procedure by its definition: reject in ascending order while p <= level / (number left).
    for level in np.linspace(0.001, 1, 300):
        rejected = next((k for k in range(3) if p[k] > level / (3 - k)), 3)
        assert sum(comparison.p_holm <= level for comparison in secondary) == rejected
    text = to_markdown(verdict)
    assert text.count("**primary**") == 1 and text.count("| secondary |") == 3
    assert text.index("**primary**") < text.index("| secondary |")
    for p_holm, result in ((0.04, "better"), (0.06, "not shown")):
        adjusted = replace(primary, role="secondary", p_holm=p_holm)
        assert f"| {result} | {p_holm} |" in to_markdown(replace(verdict, comparisons=(primary, adjusted)))


@pytest.mark.parametrize(("samples", "larger"), [(0.04, "`sample.images`"), (0.03, "seeds"), (np.nan, "–")])
def test_the_larger_part_of_the_noise_is_named(samples, larger):
    verdict = verdict_on(study(curves(3, 1.0), curves(3, 0.9)))
    primary = replace(verdict.primary, noise=Noise((0.1, 0.1), 0.05, samples))
    text = to_markdown(replace(verdict, comparisons=(primary,)))
    seeds = [seeds_needed(np.log(1.05), sd) for sd in (0.05, cautious_sd(0.05, 3))]
    assert f" | {larger} | " in text and f" | {seeds[0]} ({seeds[1]}) |" in text


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [([0.04, 0.03, 0.9, np.nan], [0.09, 0.09, 0.9, np.nan]), ([0.7, 0.6], [1, 1])],
)
def test_adjusted_p_values_have_the_order_of_the_p_values_and_are_at_most_1(p, adjusted):
    (one,) = verdict_on(study(curves(2, 1.0), curves(2, 0.9))).comparisons
    averages = [replace(one.average, p_value=value) for value in p]
    secondary = [replace(one, role="secondary", effects=(average, *one.effects[1:])) for average in averages]
    assert [comparison.p_holm for comparison in adjust(secondary)] == pytest.approx(adjusted, nan_ok=True)


def test_an_unbiased_metric_shows_whether_it_agrees():
    fd = study(curves(4, 1.0, noise=0.01), curves(4, 1.1, seed=1, noise=0.01))
    assert "biased upwards, so the true change may be larger" in verdict_on(fd).answer
    assert "biased" not in verdict_on(fd.assign(metric="kid"), PLAN.model_copy(update={"metric": "kid"})).answer
    cases = {1.1: "it agrees", 1.01: "it has the same sign, but does not show the same", 0.9: "it does not agree"}
    for factor, expected in cases.items():
        kid = study(curves(4, 1e-3, noise=0.02), curves(4, 1e-3 * factor, seed=3, noise=0.02), metric="kid")
        answer = verdict_on(pd.concat([fd, kid])).answer
        assert "the unbiased KD changes by " in answer and answer.rstrip(".").endswith(expected)
    several = verdict_on(pd.concat([kid, fd, fd.assign(metric="fd_infinity")]))
    assert several.primary.metric == "fd" and "the unbiased KD changes by " in several.answer
    assert "the unbiased" not in verdict_on(pd.concat([fd, kid.assign(features="other")])).answer


def test_a_secondary_metric_without_common_images_is_reported_alone():
    fd = study(curves(3, 1.0), curves(3, 0.9))
    kid = fd.assign(metric="kid")
    apart = kid[(kid["arm"] == "base") == (kid["step"] <= 200)]
    verdict, without = verdict_on(pd.concat([fd, apart])), verdict_on(fd)
    (warning,) = verdict.warnings
    assert "base and cand share no range of training images with values of KD (lite0), so they cannot be" in warning
    assert repr((verdict.comparisons, verdict.sensitivity)) == repr((without.comparisons, without.sensitivity))
    with pytest.raises(StudyError, match="share no range"):
        verdict_on(apart, PLAN.model_copy(update={"metric": "kid"}))


def test_sensitivity_lists_endpoints_and_counts_those_that_agree():
    base, cand = curves(4, 1.0, noise=0.01), curves(4, 1.1, seed=1, noise=0.01)
    verdict = verdict_on(study(base, cand))
    by_name = {row.endpoint: row for row in verdict.sensitivity}
    assert len(by_name) == 7 and {row.shown for row in verdict.sensitivity} == {"worse"}
    average = verdict.primary.average
    assert by_name["average over images"].estimate == average.estimate
    assert by_name["last checkpoint"].estimate == verdict.primary.final.estimate
    logs, images = np.log(cand / base)[:, 1:], np.array([100.0, 200, 300, 400])
    expected = np.trapezoid(logs, np.log(images), axis=1).mean() / np.log(4)
    np.testing.assert_allclose(by_name["average over log images"].estimate, 100 * np.expm1(expected))
    expected = np.trapezoid(logs[:, 1:], images[1:], axis=1).mean() / 200
    np.testing.assert_allclose(by_name["average over the last half"].estimate, 100 * np.expm1(expected))
    text = to_markdown(verdict)
    assert "Of 7, 0 show better, 7 worse, 0 neither: 7 of 7 agree with the primary endpoint (worse)." in text
    assert "| endpoint | FD (lite0), lower is better |" in text and text.count(", **worse** |") == 7
    shares = to_markdown(
        verdict_on(study(base / 400, cand / 400, "recall"), PLAN.model_copy(update={"metric": "recall"}))
    )
    assert "| endpoint | Recall (lite0), higher is better |" in shares


def test_endpoints_of_late_checkpoints_and_of_failed_runs():
    base, cand = curves(5, 1.0, noise=0.01), curves(5, 0.8, seed=1, noise=0.01)
    late = verdict_on(study(base[:, 3:], cand[:, 3:], steps=(300, 400))).sensitivity
    by_name = {row.endpoint: row for row in late}
    assert by_name["average over the last half"].estimate == by_name["average over images"].estimate
    assert {row.shown for row in verdict_on(study(base, cand)).sensitivity} == {"better"}
    cand[4, 4:] = np.nan
    assert "better" not in {row.shown for row in verdict_on(study(base, cand)).sensitivity}


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
    table, other_table = probes({}), probes({("0-49", "mse"): 2}, name="other")
    both = judge(pd.concat([other, metrics]), pd.concat([other_table, table]), "small", PLAN, tables=EQUAL)
    alone = judge(metrics, table, "small", PLAN, tables=EQUAL)
    assert repr(both) == repr(alone) and alone.mechanism[0].mse_factor == 1


def test_probes_that_are_not_planned_are_ignored():
    plan, table = PLAN.model_copy(update={"seeds": (0, 1), "last_step": 200}), probes({})
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    of_plan = table[(table["seed"] < 2) & (table["step"] <= 200)]
    found, expected = (judge(metrics, rows, "small", plan, tables=EQUAL).mechanism for rows in (table, of_plan))
    assert repr(found) == repr(expected) and found[0].checkpoints == 2


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_row_of_a_markdown_table_has_equal_cells(seeds):
    text = markdown_of(study(curves(seeds, 1.0), curves(seeds, 0.9)))
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 4
    for block in tables:
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("arm", ["a|b", "![i](http://x.org/i.png)", "`c`", "<img src=x>", "*_a_*"])
def test_names_are_shown_as_text(arm):
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    metrics.loc[metrics["arm"] == "cand", "arm"] = arm
    metrics["features"] = f"{arm}features"
    plan = PLAN.model_copy(update={"candidates": (arm,), "candidate": arm, "features": f"{arm}features"})
    page = to_html(markdown_of(metrics, plan), "Verdict")
    cells = re.findall(r"<td>(?:<code>)?(.*?)(?:</code>)?</td>", page)
    assert cells.count(html.escape(arm)) == 6 and cells.count(f"FD ({html.escape(arm)}features)") == 6
    assert f"<strong>{html.escape(arm)} is faster than base</strong>" in page
    assert not re.search("<(img|a|em)[ >]", page)


# Files


@pytest.mark.parametrize("plan", [PLAN, None])
def test_a_verdict_survives_its_file(tmp_path, plan):
    base, cand = curves(4, 1.0), curves(4, 0.7)
    cand[3, 2:] = np.nan
    cand[2] *= 0.2  # reaches every threshold before the first trained checkpoint
    metrics = study(base, cand)
    changes, warnings = ["seeds was 0 and is 1 in the study file."], ["The code has changed: train again."]
    verdict = judge(metrics, probes({}), "small", plan, changes, tables=EQUAL, warnings=warnings)
    write_verdict(verdict, tmp_path)
    written = read_verdict(tmp_path / "verdict.json")
    assert to_markdown(written) == to_markdown(verdict) == (tmp_path / "verdict.md").read_text()
    assert repr(written) == repr(verdict)
    assert ("## Mechanism" in to_markdown(verdict)) == (plan is not None)
    json.loads((tmp_path / "verdict.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    effects_table(written.comparisons).to_csv(tmp_path / "again.csv", index=False)
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "effects.csv").read_text()
    if plan:
        times = [images for images in written.primary.effects if images.quantity == "images"][0].per_seed
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


def test_curves_mark_the_primary_threshold_and_its_crossings(tmp_path):
    metrics = study(curves(3, 1.0), curves(3, 0.9))
    (comparison,) = verdict_on(metrics).comparisons
    middle = comparison.primary_threshold
    (ax, *_) = _draw_curves(metrics, "fd", [comparison]).axes
    ticks = [line for line in ax.lines if line.get_marker() == "|"]
    seeds = comparison.images.per_seed
    times = [[seed.baseline for seed in seeds], [seed.candidate for seed in seeds]]
    np.testing.assert_allclose([line.get_xdata() for line in ticks], times)
    np.testing.assert_allclose([line.get_ydata() for line in ticks], middle)
    assert any(text.get_text().startswith(f"FD {middle:.4g}: ") for text in ax.texts)
    write_verdict(verdict_on(metrics), tmp_path)
    written = read_verdict(tmp_path / "verdict.json").comparisons
    for name, comparisons in (("a.png", [comparison]), ("b.png", written), ("plain.png", [])):
        fid_curves(metrics, [tmp_path / name], comparisons=comparisons)
    curves_png = (tmp_path / "a.png").read_bytes()
    assert curves_png == (tmp_path / "b.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_a_comparison_without_thresholds_marks_none():
    base = curves(3, 1.0)
    base[:, 2:] = np.nan  # every run diverges
    metrics = study(base, base)
    (comparison,) = verdict_on(metrics).comparisons
    (ax, *_) = _draw_curves(metrics, "fd", [comparison]).axes
    assert not comparison.thresholds and "threshold" not in " ".join(text.get_text() for text in ax.texts)
