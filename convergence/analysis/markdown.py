"""The verdict on a study in Markdown: `verdict.md`."""

from collections.abc import Sequence

import numpy as np

from convergence.analysis.mechanism_text import mechanism_section
from convergence.analysis.power import POWER, cautious_sd, detectable, seeds_needed
from convergence.analysis.results import Comparison, Sensitivity, StudyVerdict
from convergence.analysis.wording import (
    count_text,
    effect_text,
    interval_text,
    margin_text,
    size_text,
)
from convergence.errors import StudyError
from convergence.tables import (
    HIGHER_IS_BETTER,
    markdown_code,
    markdown_table,
    markdown_text,
    metric_name,
)
from convergence.tuning import values_text

PLANNED_EFFECTS = (0.01, 0.02, 0.05)
BOLD_FROM_PAIRS = 3
LEVEL = 0.05  # of adjusted p-values
LEGEND = """\
Brackets contain 95% confidence intervals over seeds. A change of FID or FD is in percent of the baseline's: above 0 is
worse. KID, KD (the KID estimator on features other than Inception's), precision, recall, density and coverage show the
change of the metric itself: lower is better for KID and KD, higher for the others. Images and hours are factors, the
candidate's divided by the baseline's: above 1 is slower."""
METHOD = """\
- Seeds are paired: seed k of the candidate with seed k of the baseline. Intervals are 95% t-intervals of the mean
  difference over the planned seeds, computed on logs for FID, FD and images. Only the primary comparison decides, and
  it is not adjusted. Secondary ones show the p-value of the average, adjusted for their number (Holm).
- "Average" is the mean over training images (trapezoidal rule, from the first trained checkpoint to the last common
  one), "at the end" is the last common checkpoint. "The same" means that two one-sided tests at 5% show a change of the
  average within the margin, which is that the 90% interval is within it.
- A run reaches a threshold where its metric, smoothed by isotonic regression so that it never gets worse, crosses it.
  Between checkpoints the log of the metric is linear in the log of images. Unless the study declares thresholds, the
  primary one is the lowest value that every run reaches; the others are at 1/4, 1/2 and 3/4 of the baseline's progress.
- A run that does not reach a threshold is censored, not dropped: it still bounds the factor of its pair. If some pairs
  are unbounded on one side, that end of the interval comes from the sign test (no bound below six seeds). The other end
  comes from the known pairs and the worst values that the unbounded pairs can have.
- A run diverged if its loss, a weight or a sample is not finite. It collapsed if, at its last checkpoint, its mse is
  above that of an untrained net or its samples are nearly equal. Such a run reaches no threshold, and its pair is left
  out of averages. The arm with more such runs is never better, and the arms are not the same then.
- Hours are images multiplied by the cost of an arm, measured alone on the machine that trains. Their interval contains
  the noise of the images over seeds and that of the cost over rounds (MOVER, Zou and Donner 2008).
"""
DIRECTIONS = {True: "higher is better", False: "lower is better"}


def to_markdown(verdict: StudyVerdict) -> str:
    """Returns the verdict on a study in Markdown."""
    parts = [f"# Verdict: {markdown_text(verdict.study)}"]
    parts += [f"> **Warning.** {markdown_text(warning)}" for warning in verdict.warnings]
    if verdict.question is None:
        parts.append("This study compares nothing: it has no section `compare`.")
    else:
        parts.append(f"**Question.** {markdown_text(verdict.question)}")
        parts.append(f"**Answer.** {_answer(verdict)}")
        parts += [*_plan(verdict), *_tuning(verdict)]
    if verdict.comparisons:
        parts += [
            LEGEND,
            *_comparisons(verdict.comparisons),
            *_sensitivity(verdict),
            *_cost(verdict),
            *mechanism_section(verdict.mechanism),
        ]
    runs = [f"- {markdown_code(run.arm)} seed {run.seed}: {markdown_text(run.reason)}" for run in verdict.failed]
    parts += ["## Diverged and collapsed runs", "\n".join(runs) or "None."]
    if verdict.comparisons:
        parts += ["## How this was computed", METHOD.rstrip()]
    return "\n\n".join(parts) + "\n"


def _answer(verdict: StudyVerdict) -> str:
    """Returns the answer, with its conclusion in bold unless too few pairs support it."""
    answer, primary = verdict.answer or "", verdict.primary
    if primary is None or primary.average.pairs < BOLD_FROM_PAIRS:
        return markdown_text(answer)
    lead = primary.headline
    return f"**{markdown_text(lead)}**{markdown_text(answer.removeprefix(lead))}"


def _plan(verdict: StudyVerdict) -> list[str]:
    """Returns what was planned before the first result, and what the study file changed after that."""
    plan = verdict.plan
    if plan is None:
        return []
    thresholds = ", ".join(f"{value:g}" for value in plan.thresholds or ()) or "the lowest value that every run reaches"
    seeds = "all" if plan.seeds is None else ", ".join(map(str, plan.seeds))
    metric = markdown_text(metric_name(plan.features, plan.metric))
    margin = "none" if plan.margin is None else margin_text(plan.margin, plan.scale)
    last = "the last common checkpoint" if plan.last_step is None else f"step {plan.last_step:,}"
    metric += f" with the average of the weights {plan.ema}" if plan.ema else ""
    text = f"**Plan.** {metric}, {plan.endpoint}, until {last}; seeds {seeds}; margin {margin}; threshold {thresholds}."
    if verdict.plan_changes:
        text += "\n\n**Changed after results were seen.** The verdict judges by the plan."
        text += "\n\n" + "\n".join(f"- {markdown_text(change)}" for change in verdict.plan_changes)
    return [text]


def _tuning(verdict: StudyVerdict) -> list[str]:
    """Returns the section on the trials that this study follows from."""
    tuned = verdict.plan and verdict.plan.tuned
    if not tuned:
        return []
    rows = [
        [markdown_code(arm), values_text(best.values), markdown_code(best.arm), values_text(best.add) or "–"]
        for arm, best in tuned.arms.items()
    ]
    seeds = ", ".join(map(str, tuned.seeds))
    return [
        "## Tuning",
        f"Trials of {markdown_code(tuned.study)} with the seeds {seeds} until step {tuned.until:,} chose the values of "
        "each arm by the primary endpoint. The verdict does not use these seeds. An arm without the suffix `_tuned` "
        f"has the values of {markdown_code(tuned.study)}.",
        markdown_table(["arm", "best values", "arm with these values", "at the edge of the grid: add"], rows),
    ]


def _comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    ordered = sorted(comparisons, key=lambda comparison: comparison.role != "primary")
    planned = [comparison for comparison in ordered if comparison.role != "replication"]
    parts = [
        f"## Compared with {markdown_code(ordered[0].baseline)}",
        "Images are those to the primary threshold."
        + " An arm in brackets is the baseline of that row." * (len({c.baseline for c in planned}) > 1),
        _overview(planned),
        "## Images to each threshold",
        _thresholds(planned),
        "## Noise and power",
        "Standard deviations over seeds of the average: of the runs of each arm, and of the paired differences. The "
        "part from samples is due to their finite number (infinitesimal jackknife, Efron 1982), the rest is due to the "
        "seeds. The column `increase` names the larger part: more seeds, or more `sample.images`. The smallest "
        f"detectable effect and the seeds that an effect needs are for {100 * POWER:.0f}% power. Brackets contain the "
        "seeds for a standard deviation at its 80% upper confidence bound.",
        _noise(planned),
    ]
    if replications := [comparison for comparison in ordered if comparison.role == "replication"]:
        parts += [
            "## Replication",
            "Seeds that were not planned. They do not enter the verdict.",
            "\n".join(f"- Seeds {', '.join(map(str, c.seeds))}: {markdown_text(str(c))}" for c in replications),
        ]
    return parts


def _overview(comparisons: Sequence[Comparison]) -> str:
    rows = [
        [
            *_names(comparison, comparisons[0]),
            "**primary**" if comparison.role == "primary" else comparison.role,
            *map(effect_text, (comparison.average, comparison.final)),
            *("–" if effect is None else effect_text(effect) for effect in (comparison.images, comparison.hours)),
            _result(comparison),
            "–" if np.isnan(comparison.p_holm) else f"{comparison.p_holm:.2g}",
        ]
        for comparison in comparisons
    ]
    head = ["candidate", "metric", "role", "average", "at the end", "images", "hours", "result", "p (Holm)"]
    return markdown_table(head, rows)


def _result(comparison: Comparison) -> str:
    """Returns the outcome of a primary comparison, or what the adjusted p-value of a secondary comparison shows."""
    if comparison.role != "secondary":
        return comparison.outcome
    return comparison.average.shown if comparison.p_holm <= LEVEL else "not shown"


def _thresholds(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        for threshold in comparison.thresholds:
            images = comparison.effect("images", threshold)
            name = f"{threshold:.4g}" + (" (primary)" if threshold == comparison.primary_threshold else "")
            baseline = _time([effect.baseline for effect in images.per_seed], images.baseline)
            candidate = _time([effect.candidate for effect in images.per_seed], images.candidate)
            censored = f"{images.censored} of {images.pairs}"
            rows.append([*_names(comparison, comparisons[0]), name, baseline, candidate, effect_text(images), censored])
    head = ["candidate", "metric", "threshold", "images, baseline", "images, candidate", "factor", "censored pairs"]
    return markdown_table(head, rows)


def _time(times: list[float], mean: float) -> str:
    """Returns the images at which an arm reaches a threshold: the geometric mean over seeds, or how many reach it."""
    arrived = sum(not np.isinf(time) for time in times)
    if arrived < len(times):
        return f"{count_text(arrived, 'seed')} of {len(times)}"
    return "before the first checkpoint" if np.isnan(mean) else f"{mean:,.0f}"


def _noise(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        names = _names(comparison, comparisons[0])
        noise, pairs, scale = comparison.noise, comparison.average.pairs, comparison.scale
        if np.isnan(noise.paired):
            rows.append([*names, pairs, *["–"] * (7 + len(PLANNED_EFFECTS))])
            continue
        sizes = [size_text(sd, scale) for sd in (*noise.between, noise.paired)]
        parts = ["–"] * 3
        if not np.isnan(noise.samples):
            larger = "`sample.images`" if noise.samples > noise.seeds else "seeds"
            parts = [size_text(noise.seeds, scale), size_text(noise.samples, scale), larger]
        cautious = cautious_sd(noise.paired, pairs)
        seeds = [
            f"{_seeds(effect, noise.paired)} ({_seeds(effect, cautious)})" if scale == "ratio" else "–"
            for effect in PLANNED_EFFECTS
        ]
        smallest = size_text(detectable(noise.paired, pairs), scale)
        rows.append([*names, pairs, *sizes, *parts, smallest, *seeds])
    head = ["candidate", "metric", "pairs", "sd, baseline", "sd, candidate", "sd of paired differences", "from seeds"]
    effects = [f"seeds for {100 * effect:.0f}%" for effect in PLANNED_EFFECTS]
    return markdown_table([*head, "from samples", "increase", "smallest detectable effect", *effects], rows)


def _seeds(effect: float, sd: float) -> str:
    try:
        return str(seeds_needed(float(np.log1p(effect)), sd))
    except StudyError:
        return "too many"


def _sensitivity(verdict: StudyVerdict) -> list[str]:
    """Returns the section on the primary comparison by each endpoint and metric, and how many of these agree."""
    rows, primary = verdict.sensitivity, verdict.primary
    if not rows or primary is None:
        return []
    columns = list(dict.fromkeys((row.features, row.metric) for row in rows))
    cells: dict[str, dict[tuple[str, str], Sensitivity]] = {}
    for row in rows:
        # The thresholds of different metrics differ, but are at the same fractions of the baseline's progress.
        cells.setdefault(row.endpoint, {})[row.features, row.metric] = row
    head = [
        "endpoint",
        *(f"{markdown_text(metric_name(*column))}, {DIRECTIONS[column[1] in HIGHER_IS_BETTER]}" for column in columns),
    ]
    table = [
        [endpoint, *(_cell(of_columns[column]) if column in of_columns else "–" for column in columns)]
        for endpoint, of_columns in cells.items()
    ]
    shown = [row.shown for row in rows]
    and_averages = ", and with other averages of the weights" if any("," in row.endpoint for row in rows) else ""
    counts = f"{shown.count('better')} show better, {shown.count('worse')} worse, {shown.count('not shown')} neither"
    same = f"{shown.count(primary.average.shown)} of {len(rows)} agree with the primary endpoint"
    return [
        "## Sensitivity",
        f"The primary comparison by other endpoints and metrics{and_averages}, not adjusted. Of {len(rows)}, {counts}: "
        f"{same} ({primary.average.shown}).",
        markdown_table(head, table),
    ]


def _cost(verdict: StudyVerdict) -> list[str]:
    """Returns the section on the training cost of each arm."""
    if not verdict.costs or verdict.plan is None:
        return ["## Cost", "Not measured, so hours are not compared."]
    rows = [[markdown_code(cost.arm), *cost.cells, cost.rounds, markdown_text(cost.device)] for cost in verdict.costs]
    baseline = markdown_code(verdict.plan.baseline)
    head = ["arm", "seconds per 1000 images", f"divided by those of {baseline}", "rounds", "device"]
    return [
        "## Cost",
        "Training steps, timed alone and in turns. Brackets contain 95% t-intervals over rounds, which cover neither "
        "other machines nor other times.",
        markdown_table(head, rows),
    ]


def _cell(row: Sensitivity) -> str:
    text = interval_text(row.estimate, row.low, row.high, row.unit)
    return text if row.shown == "not shown" else f"{text}, **{row.shown}**"


def _names(comparison: Comparison, first: Comparison) -> list[str]:
    """Returns the candidate and the metric, and the baseline if it is not that of the first comparison."""
    other = "" if comparison.baseline == first.baseline else f" (against {markdown_code(comparison.baseline)})"
    return [markdown_code(comparison.candidate) + other, markdown_text(comparison.metric_name)]
