"""A verdict in Markdown: `verdict.md`."""

from collections.abc import Iterable, Sequence

import numpy as np

from convergence.analysis.effects import Effect, Quantity
from convergence.analysis.power import POWER, cautious_sd, detectable, seeds_needed
from convergence.analysis.results import Comparison, ProbeEffect, StudyVerdict
from convergence.analysis.wording import change_text, count_text, ratio_text, size_text, speedup_text
from convergence.errors import StudyError
from convergence.tables import ALL, markdown_code, markdown_table, markdown_text

PLANNED_EFFECTS = (0.01, 0.02, 0.05)
LEGEND = """\
Brackets contain 95% confidence intervals over seeds. Changes compare the candidate's metric with the baseline's: lower
is better for FID, FD, KID and KD (KD is the KID estimator on features other than Inception's), higher is better for
precision and recall. A speed-up above 1 means that the candidate reaches the threshold earlier."""
MECHANISM = """\
Measured at every checkpoint, on images and noise that all arms share: the unweighted terms of the loss, and the
gradient of each arm's own weighted loss with its noise scale tr(Sigma) / |g|^2, the batch size in images at which noise
and gradient are equally large. Losses are shown as changes of the candidate's against the baseline's, noise scales as
ratios, both averaged over training images like the metric. Intervals are not corrected for the number of bins."""
METHOD = """\
- Seeds are paired: seed k of the candidate with seed k of the baseline. Intervals are 95% t-intervals of the mean
  difference over seeds, computed on logs for distances and times.
- The primary endpoint is the mean over training images (trapezoidal rule, from the first trained checkpoint to the last
  common one). One comparison, declared in the study, is primary. The others are secondary and not corrected for their
  number.
- A run reaches a threshold where its metric, smoothed by isotonic regression so that it never gets worse, crosses it.
  Between checkpoints the log of the metric is linear in the log of images. Unless the study declares thresholds, they
  are at 1/4, 1/2 and 3/4 of the baseline's progress in level from its first trained checkpoint to its last, and do not
  depend on the candidate.
- A run that does not reach a threshold is censored, not dropped: it still bounds the speed-up of its pair. If some
  pairs are unbounded on one side, that end of the interval comes from the sign test (no bound below six seeds). The
  other end comes from the known pairs and the worst values that the unbounded pairs can have.
- A run diverged if its loss, a weight or a sample is not finite. It collapsed if, at its last checkpoint, its mse is
  above that of an untrained net or its samples are nearly equal. Such a run reaches no threshold, and its pair is left
  out of averages. No verdict favours the arm with more of them.
- Seconds are measured training time, without sampling and evaluation. They are only roughly comparable if jobs shared
  cores or a GPU.
"""


def to_markdown(verdict: StudyVerdict) -> str:
    """Returns the verdict on a study in Markdown."""
    parts = [f"# Verdict: {markdown_text(verdict.study)}"]
    parts += [f"> **Warning.** {markdown_text(warning)}" for warning in verdict.warnings]
    if verdict.question is None:
        parts.append("This study compares nothing: it has no section `compare`.")
    else:
        parts.append(f"**Question.** {markdown_text(verdict.question)}")
        parts.append(f"**Answer.** {markdown_text(verdict.answer or '')}")
    if verdict.comparisons:
        parts += [LEGEND, *_comparisons(verdict.comparisons), *_mechanism(verdict)]
    runs = [f"- {markdown_code(run.arm)} seed {run.seed}: {markdown_text(run.reason)}" for run in verdict.failed]
    parts += ["## Diverged and collapsed runs", "\n".join(runs) or "None."]
    if verdict.comparisons:
        parts += ["## How this was computed", METHOD.rstrip()]
    return "\n\n".join(parts) + "\n"


def _comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    ordered = sorted(comparisons, key=lambda comparison: not comparison.primary)
    secondary = [comparison for comparison in ordered if not comparison.primary]
    parts = [
        f"## Compared with {markdown_code(ordered[0].baseline)}",
        "Speed-ups are those at the middle threshold.",
        _overview(ordered),
        "## Speed-up at each threshold",
        _thresholds(ordered),
        "## Noise and power",
        "Standard deviations over seeds of the average over images: of the runs of one arm, and of the paired "
        "differences. The smallest detectable effect and the seeds that an effect needs are for "
        f"{100 * POWER:.0f}% power. Brackets contain the seeds for a standard deviation at its 80% upper confidence "
        "bound.",
        _noise(ordered),
    ]
    if secondary:
        sentences = "\n".join(f"- {markdown_text(str(comparison))}" for comparison in secondary)
        parts += ["## Secondary comparisons", "Not corrected for their number: treat them as hints.", sentences]
    return parts


def _overview(comparisons: Iterable[Comparison]) -> str:
    axes: tuple[Quantity, Quantity] = ("images", "seconds")
    rows = [
        [
            *_names(comparison),
            "**primary**" if comparison.primary else "secondary",
            *(_change(comparison, comparison.effect(quantity)) for quantity in ("average", "final")),
            *(speedup_text(comparison.effect(axis)) if comparison.thresholds else "–" for axis in axes),
            comparison.outcome,
        ]
        for comparison in comparisons
    ]
    head = ["candidate", "metric", "role", "average", "at the end", "speed-up, images", "speed-up, seconds", "verdict"]
    return markdown_table(head, rows)


def _thresholds(comparisons: Iterable[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        for threshold in comparison.thresholds:
            images, seconds = (comparison.effect(axis, threshold) for axis in ("images", "seconds"))
            baseline = _time([effect.baseline for effect in images.per_seed], images.baseline)
            candidate = _time([effect.candidate for effect in images.per_seed], images.candidate)
            speedups = [speedup_text(images), speedup_text(seconds)]
            censored = f"{images.censored} of {images.pairs}"
            rows.append([*_names(comparison), f"{threshold:.4g}", baseline, candidate, *speedups, censored])
    head = ["candidate", "metric", "threshold", "images, baseline", "images, candidate"]
    return markdown_table([*head, "speed-up, images", "speed-up, seconds", "censored pairs"], rows)


def _time(times: list[float], mean: float) -> str:
    """The images at which an arm reaches a threshold: their geometric mean, or how many of its seeds reach it."""
    arrived = sum(not np.isinf(time) for time in times)
    if arrived < len(times):
        return f"{count_text(arrived, 'seed')} of {len(times)}"
    return "before the first checkpoint" if np.isnan(mean) else f"{mean:,.0f}"


def _noise(comparisons: Iterable[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        noise, pairs, scale = comparison.noise, comparison.average.pairs, comparison.scale
        if np.isnan(noise.paired):
            rows.append([*_names(comparison), pairs, *["–"] * (3 + len(PLANNED_EFFECTS))])
            continue
        sizes = [size_text(sd, scale) for sd in (noise.between, noise.paired, detectable(noise.paired, pairs))]
        cautious = cautious_sd(noise.paired, pairs)
        seeds = [
            f"{_seeds(effect, noise.paired)} ({_seeds(effect, cautious)})" if scale == "log" else "–"
            for effect in PLANNED_EFFECTS
        ]
        rows.append([*_names(comparison), pairs, *sizes, *seeds])
    head = ["candidate", "metric", "seeds", "sd of runs", "sd of paired differences", "smallest detectable effect"]
    return markdown_table([*head, *(f"seeds for {100 * effect:.0f}%" for effect in PLANNED_EFFECTS)], rows)


def _seeds(effect: float, sd: float) -> str:
    try:
        return str(seeds_needed(float(np.log1p(effect)), sd))
    except StudyError:
        return "too many"


def _mechanism(verdict: StudyVerdict) -> list[str]:
    """Which timesteps profit, and whether the gradient is less noisy."""
    if not verdict.mechanism:
        return ["## Mechanism", "Not measured: the study has no probes of both arms (section `probe`)."]
    parts = ["## Mechanism", MECHANISM]
    for candidate in dict.fromkeys(probe.candidate for probe in verdict.mechanism):
        probes = {(probe.timesteps, probe.metric): probe for probe in verdict.mechanism if probe.candidate == candidate}
        timesteps = [name for name in dict.fromkeys(name for name, _ in probes) if name != ALL]
        baseline = next(iter(probes.values())).baseline
        sentences = [f"{markdown_code(candidate)} against {markdown_code(baseline)}:\n"]
        if candidate in verdict.matched:
            sentences.append("- Both have the same expected gradient; only its variance differs.")
        sentences += [f"- {_loss(probes, timesteps, term)}" for term in ("mse", "vb")]
        sentences.append(f"- {_gradient_noise(probes.get((ALL, 'noise_scale')))}")
        cells = [[name, *(_cell(probes.get((name, metric))) for metric in ("mse", "vb", "noise_scale"))]
                 for name in [*timesteps, ALL]]  # fmt: skip
        parts += ["\n".join(sentences), markdown_table(["timesteps", "mse", "vb", "noise scale, ratio"], cells)]
    return parts


def _loss(probes: dict[tuple[str, str], ProbeEffect], timesteps: list[str], term: str) -> str:
    """In which bins of timesteps a term of the loss is lower or higher."""
    known = {name: probes[name, term].average for name in timesteps if (name, term) in probes}
    lower = [name for name, average in known.items() if average.low > 0]
    higher = [name for name, average in known.items() if average.high < 0]
    texts = [f"{word} at t {', '.join(names)}" for word, names in (("lower", lower), ("higher", higher)) if names]
    if len(lower) + len(higher) < len(known):
        texts.append("no difference shown elsewhere" if texts else "no difference shown at any t")
    return f"Loss, {term}: {'; '.join(texts)}."


def _gradient_noise(probe: ProbeEffect | None) -> str:
    """Whether the candidate's gradient is less noisy."""
    if probe is None:
        return (
            "Gradient noise: unknown, because the mean gradient is too small compared with its noise: increase "
            "`probe.images`."
        )
    average = probe.average
    text = "less noisy" if average.low > 0 else "noisier" if average.high < 0 else "no difference shown"
    return f"Gradient noise: **{text}**, noise scale {ratio_text(average)} times that of the baseline."


def _cell(probe: ProbeEffect | None) -> str:
    if probe is None:
        return "–"
    if probe.metric == "noise_scale":
        return ratio_text(probe.average)
    return change_text(probe.average, probe.metric, probe.scale)


def _names(comparison: Comparison) -> list[str]:
    return [markdown_code(comparison.candidate), markdown_text(comparison.metric_name)]


def _change(comparison: Comparison, effect: Effect) -> str:
    return change_text(effect, comparison.metric, comparison.scale)
