"""The verdict in words: `reports/verdict.md`, from the table of `workflow.statistics`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from convergence.analysis.comparison import PAIR, SPEEDUP_COLUMNS, middle_threshold, over_seeds, speedup_table, verdict
from convergence.analysis.mechanism import compare_probes
from convergence.analysis.power import POWER, cautious_sd, detectable, noise_floor, seeds_needed
from convergence.answers import METHOD_TITLE
from convergence.tables import ALL, HIGHER_IS_BETTER, diverged, markdown_table, metric_name, write_table
from diffusion.errors import InputError
from diffusion.files import atomic_write

EFFECTS = (0.01, 0.02, 0.05)
LEGEND = """\
Brackets hold 95% intervals over seeds. A change is that of the candidate's metric against the baseline's: for FD and
KD (the formula of KID in other features than Inception's) less is better, for precision and recall more. A speed-up
above 1 means that the candidate arrives earlier."""
WHY = """\
Measured at every checkpoint, on images and noise that arms share: the unweighted terms of the loss, and each arm's
own gradient, weights included, with its noise scale tr(Sigma) / |g|^2: the batch size, in images, at which noise and
gradient are equally large. Losses are changes of the candidate's against the baseline's, noise scales their ratio,
averaged over training images like the metric; intervals are not corrected for the number of bins."""
METHOD = """\
- Seeds are paired: seed k of the candidate against seed k of the baseline. Intervals are 95% t-intervals of the mean
  difference over seeds, of logs for distances and times.
- The primary endpoint is the average over training images (trapezoids, first trained to last common checkpoint). One
  comparison is primary, declared in the study; the others are secondary, not corrected for their number.
- A threshold is reached where the metric, smoothed so that it never gets worse (isotonic fit of each run), comes to
  it. Between checkpoints its log is linear in the log of images. Unless the study declares them, thresholds lie at
  1/4, 1/2 and 3/4 of the baseline's own way, in logs, from its first trained checkpoint to its last: the candidate
  has no say in them.
- A run that does not reach a threshold is censored, not dropped: of its pair a bound is known. To the side where pairs
  are open the interval ends by the sign test, with fewer than six seeds nowhere; to the other side it rests on the
  known pairs, in the worst place of the open ones.
- A diverged run reaches no threshold; its pair is left out of averages. No verdict favours the arm that diverged more.
- Seconds are training time as measured, without sampling and evaluation. Where jobs shared cores or a GPU they compare
  loosely.
"""


def write_verdict(
    metrics: pd.DataFrame,
    probes: pd.DataFrame,
    comparisons: Mapping[str, Mapping[str, Any] | None],
    speedups: Path,
    verdict: Path,
    forest: Path,
) -> pd.DataFrame:
    """Write the table of speed-ups, which it returns, the verdict in words and the forest plot.

    Args:
        comparisons: as `verdict_text` takes them.
    """
    from convergence.figures.forest import draw_forest

    table = speedup_table(metrics, {study: compare for study, compare in comparisons.items() if compare})
    write_table(table, speedups, SPEEDUP_COLUMNS)
    with atomic_write(verdict) as file:
        file.write(verdict_text(metrics, table, compare_probes(probes, comparisons), comparisons).encode())
    draw_forest(table, [forest])
    return table


def verdict_text(
    metrics: pd.DataFrame,
    table: pd.DataFrame,
    mechanism: pd.DataFrame,
    comparisons: Mapping[str, Mapping[str, Any] | None],
) -> str:
    """The verdict on every study, in Markdown.

    Args:
        metrics: the long table of metrics.
        table: `convergence.analysis.comparison.speedup_table` of it.
        mechanism: `convergence.analysis.mechanism.changes` of the probes.
        comparisons: study -> its `comparison`; None where nothing is compared.
    """
    parts = ["# Verdict", LEGEND]
    for study, compare in comparisons.items():
        of_study = table[table["study"] == study]
        parts.append(f"## {study}")
        if compare is None:
            parts.append("This study compares nothing: it has no section `compare`.")
        elif of_study.empty:
            parts.append("No seed has a value in both arms: nothing can be said.")
        else:
            parts += _study(metrics[metrics["study"] == study], of_study, compare)
            parts += _why(mechanism[mechanism["study"] == study], compare)
            parts.append(_diverged(metrics[metrics["study"] == study]))
    return "\n\n".join([*parts, f"## {METHOD_TITLE}", METHOD])


def _study(metrics: pd.DataFrame, table: pd.DataFrame, compare: Mapping[str, Any]) -> list[str]:
    groups = [group for _, group in table.groupby(PAIR, sort=False)]
    primary = [group for group in groups if group["primary"].any()]
    secondary = [group for group in groups if not group["primary"].any()]
    candidate = compare["primary"]["candidate"]
    parts = [f"**Question.** Does `{candidate}` converge in fewer training images than `{compare['baseline']}`?"]
    parts += [f"**Answer.** {sentence(group)} {_reach(group)}".rstrip() for group in primary]
    if not primary:
        parts.append("**Answer.** None: the primary metric has no value in both arms.")
    parts += [_comparisons(primary + secondary), _thresholds(primary + secondary), _noise_floor(primary + secondary)]
    if secondary:
        told = "\n".join(f"- {sentence(group)}" for group in secondary)
        parts.append(f"### Secondary\n\nNot corrected for their number: read them as hints.\n\n{told}")
    return parts


def sentence(table: pd.DataFrame) -> str:
    """The verdict on one comparison, with its numbers: average advantage, speed-up at the middle threshold, seeds."""
    average, threshold = over_seeds(table, "average"), middle_threshold(table)
    baseline, candidate, name = (
        average["baseline"],
        average["candidate"],
        metric_name(average["features"], average["metric"]),
    )
    told = verdict(average)
    if told == "no difference shown":
        text = f"**No difference shown** between `{candidate}` and `{baseline}` in {name}"
    else:
        text = f"**`{candidate}` is {told}** than `{baseline}` in {name}"
    images = f"{average['first_images']:,.0f} to {average['last_images']:,.0f} training images"
    if average["pairs"]:
        text += f": {_change(average)} on average over {images}, {_count(average['pairs'], 'paired seed')}."
    else:
        text += f": over {images} no pair of runs is without divergence."
    if not np.isnan(threshold):
        speedup = _speedup(over_seeds(table, "images", threshold))
        why = ", since too few runs arrive" if speedup == "unknown" else ""
        text += f" Speed-up in images to {name} {threshold:.4g}: {speedup}{why}."
    return text + _warning(average)


def _warning(average: pd.Series) -> str:
    """What the number of seeds and divergences forbid to conclude."""
    text = ""
    if average["pairs"] == 1:
        text += " **One seed: there is no interval, and nothing can be concluded.**"
    if average["pairs"] == 2:
        text += " **Two seeds** can hardly conclude: the interval reaches 12.7 standard errors to either side"
        text += "." if verdict(average) == "no difference shown" else ", so confirm this with more."
    for arm, lost in (("baseline", average["diverged_baseline"]), ("candidate", average["diverged_candidate"])):
        if lost:
            text += f" {_count(lost, 'run')} of `{average[arm]}` diverged."
    return text


def _reach(table: pd.DataFrame) -> str:
    """What so many seeds could have shown."""
    average, noise = over_seeds(table, "average"), noise_floor(table)
    if average["pairs"] < 3:  # two pairs hardly know their own spread
        return ""
    smallest = effect_size(detectable(noise.paired, average["pairs"]), average["scale"])
    return (
        f"With this noise, {_count(average['pairs'], 'seed')} would show a difference of {smallest} in "
        f"{100 * POWER:.0f}% of such studies."
    )


def _comparisons(groups: list[pd.DataFrame]) -> str:
    rows = []
    for group in groups:
        average, threshold = over_seeds(group, "average"), middle_threshold(group)
        speedups = [
            "–" if np.isnan(threshold) else _speedup(over_seeds(group, axis, threshold))
            for axis in ("images", "seconds")
        ]
        role = "**primary**" if average["primary"] else "secondary"
        rows.append([
            *_names(average), role, _change(average), _change(over_seeds(group, "final")), *speedups, verdict(average),
        ])  # fmt: skip
    head = ["candidate", "metric", "role", "average", "at the end", "speed-up, images", "speed-up, seconds", "verdict"]
    baseline = groups[0]["baseline"].iloc[0]
    return f"### Against `{baseline}`\n\nSpeed-ups are at the middle threshold.\n\n{markdown_table(head, rows)}"


def _thresholds(groups: list[pd.DataFrame]) -> str:
    rows = []
    for group in groups:
        for threshold in group["threshold"].dropna().unique():
            images = over_seeds(group, "images", threshold)
            times = group[(group["quantity"] == "images") & (group["threshold"] == threshold) & group["seed"].notna()]
            arrivals = [_arrivals(times[of], images[of]) for of in ("of_baseline", "of_candidate")]
            censored = f"{images['censored']} of {images['pairs']}"
            speedups = [_speedup(over_seeds(group, axis, threshold)) for axis in ("images", "seconds")]
            rows.append([*_names(images), f"{threshold:.4g}", *arrivals, *speedups, censored])
    head = ["candidate", "metric", "threshold", "baseline arrives, images", "candidate arrives, images"]
    head += ["speed-up, images", "speed-up, seconds", "censored pairs"]
    return f"### Speed-up at each threshold\n\n{markdown_table(head, rows)}"


def _noise_floor(groups: list[pd.DataFrame]) -> str:
    rows = []
    for group in groups:
        average, noise = over_seeds(group, "average"), noise_floor(group)
        pairs, scale = average["pairs"], average["scale"]
        if np.isnan(noise.paired):
            rows.append([*_names(average), pairs, *["–"] * (3 + len(EFFECTS))])
            continue
        floor = [effect_size(of, scale) for of in (noise.between, noise.paired, detectable(noise.paired, pairs))]
        cautious = cautious_sd(noise.paired, pairs)
        seeds = [
            f"{_seeds(effect, noise.paired)} ({_seeds(effect, cautious)})" if scale == "log" else "–"
            for effect in EFFECTS
        ]
        rows.append([*_names(average), pairs, *floor, *seeds])
    head = ["candidate", "metric", "seeds", "spread of seeds", "of paired differences", "smallest effect shown"]
    head += [f"seeds for {100 * effect:.0f}%" for effect in EFFECTS]
    legend = (
        "### Noise floor\n\nStandard deviations over seeds of the average over images: of the runs of one arm, and of "
        f"paired differences. The smallest effect shown, and the seeds that an effect takes, are for "
        f"{100 * POWER:.0f}% power; in brackets for a spread as large as these seeds still allow (its 80% upper bound)."
    )
    return f"{legend}\n\n{markdown_table(head, rows)}"


def _why(mechanism: pd.DataFrame, compare: Mapping[str, Any]) -> list[str]:
    """Which timesteps profit, and whether the gradient became less noisy."""
    averages = mechanism[(mechanism["quantity"] == "average") & mechanism["seed"].isna()]
    if averages.empty:
        return ["### Why\n\nNot measured: the study has no probes of both arms (`probe`)."]
    parts = [f"### Why\n\n{WHY}"]
    for candidate in compare["candidates"]:
        rows = averages[averages["candidate"] == candidate].set_index(["timesteps", "metric"])
        if rows.empty:
            continue
        timesteps = [name for name in rows.index.unique("timesteps") if name != ALL]
        told = [f"`{candidate}` against `{compare['baseline']}`:"]
        if candidate in compare["matched"]:
            told.append("- Both have the same expected gradient, so they differ by its variance alone.")
        told += [f"- {_profit(rows, timesteps, term)}" for term in ("mse", "vb")]
        told.append(f"- {_noisier(rows)}")
        shown = {"mse": _change, "vb": _change, "noise_scale": _ratio}
        cells = [
            [name, *(tell(rows.loc[name, of]) if (name, of) in rows.index else "–" for of, tell in shown.items())]
            for name in [*timesteps, ALL]
        ]
        parts += ["\n".join(told), markdown_table(["timesteps", "mse", "vb", "noise scale, ratio"], cells)]
    return parts


def _profit(rows: pd.DataFrame, timesteps: list[str], term: str) -> str:
    """In which bins a term of the loss is lower or higher."""
    known = [name for name in timesteps if (name, term) in rows.index]
    lower = [name for name in known if rows.loc[(name, term), "low"] > 0]
    higher = [name for name in known if rows.loc[(name, term), "high"] < 0]
    told = [f"{word} at t {', '.join(of)}" for word, of in (("lower", lower), ("higher", higher)) if of]
    rest = "elsewhere no difference shown" if told else "no difference shown at any t"
    return f"Loss, {term}: {'; '.join([*told, rest] if len(lower) + len(higher) < len(known) else told)}."


def _noisier(rows: pd.DataFrame) -> str:
    """Whether the candidate's gradient is less noisy."""
    if (ALL, "noise_scale") not in rows.index:
        return "Gradient noise: the mean gradient drowns in it, so the noise scale is unknown: raise `probe.images`."
    row = rows.loc[(ALL, "noise_scale")]
    told = "less noisy" if row["low"] > 0 else "noisier" if row["high"] < 0 else "no difference shown"
    return f"Gradient noise: **{told}**, noise scale {_ratio(row)} times that of the baseline."


def _diverged(metrics: pd.DataFrame) -> str:
    runs = metrics[diverged(metrics)][["arm", "seed", "reason"]].drop_duplicates()
    told = [f"- `{run.arm}` seed {run.seed}: {run.reason}" for run in runs.itertuples()]
    return "### Diverged runs\n\n" + ("\n".join(told) or "None.")


# --- Numbers in words ---------------------------------------------------------------------------------------


def _names(row: pd.Series) -> list[str]:
    return [f"`{row['candidate']}`", metric_name(row["features"], row["metric"])]


def _change(row: pd.Series) -> str:
    """The candidate's metric against the baseline's: "+4.4% (-0.5% to +9.5%)", a difference for plain scales."""
    if row["scale"] == "log":
        return _with_interval(row, lambda effect: f"{100 * np.expm1(-effect):+.1f}%", mirrored=True)
    falls = row["metric"] not in HIGHER_IS_BETTER
    return _with_interval(row, lambda effect: f"{-effect if falls else effect:+.3g}", mirrored=falls)


def _ratio(row: pd.Series) -> str:
    """The candidate's value over the baseline's."""
    return _with_interval(row, lambda effect: f"{np.exp(-effect):.3g}", mirrored=True)


def _speedup(row: pd.Series) -> str:
    return _with_interval(row, lambda effect: f"{np.exp(effect):.2f}", mirrored=False)


def _with_interval(row: pd.Series, text: Callable[[float], str], mirrored: bool) -> str:
    low, high = (row["high"], row["low"]) if mirrored else (row["low"], row["high"])
    if np.isnan(row["effect"]) and np.isinf([low, high]).all():
        return "unknown"
    if np.isinf([low, high]).all():
        interval = "no interval"
    elif np.isinf(high):
        interval = f"{text(low)} or more"
    elif np.isinf(low):
        interval = f"{text(high)} or less"
    else:
        interval = f"{text(low)} to {text(high)}"
    return interval if np.isnan(row["effect"]) else f"{text(row['effect'])} ({interval})"


def effect_size(value: float, scale: str) -> str:
    """The size of an effect without sign."""
    return f"{100 * np.expm1(value):.2g}%" if scale == "log" else f"{value:.2g}"


def _seeds(effect: float, sd: float) -> str:
    try:
        return str(seeds_needed(np.log1p(effect), sd))
    except InputError:
        return "too many"


def _arrivals(times: pd.Series, mean: float) -> str:
    if np.isinf(times).any():
        return f"{_count(int(np.isfinite(times.fillna(0)).sum()), 'seed')} of {len(times)}"
    return "before the first checkpoint" if np.isnan(mean) else f"{mean:,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
