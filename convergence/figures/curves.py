"""The figure of metric curves over training images."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from convergence.analysis.cost import Cost
from convergence.analysis.effects import Effect
from convergence.analysis.intervals import t_interval
from convergence.analysis.results import Comparison
from convergence.analysis.wording import UNKNOWN, effect_text
from convergence.errors import StudyError
from convergence.failures import failed
from convergence.figures.labels import label_ends, label_in_free_place
from convergence.figures.style import (
    LOG_AXIS_FROM_RATIO,
    STYLE,
    Style,
    line_style,
    save_figure,
    set_hour_axis,
    set_image_axis,
    set_log_axis,
)
from convergence.tables import HIGHER_IS_BETTER, SHARES, check_sample_counts, metric_name

EXTERNAL: Style = {"color": "0.72", "linewidth": 1, "markersize": 4}
CROSS: Style = {"marker": "x", "markersize": 10, "markeredgewidth": 2}

PANEL_INCHES = (5.0, 4.0)  # without the labels of the lines, the title and the caption
PANELS_PER_ROW = 3
LETTER_INCHES = 0.085  # of the label of a line
TITLE_CHARACTERS, TITLE_LINE_INCHES = 56, 0.18
CAPTION_CHARACTERS, CAPTION_LINE_INCHES = 72, 0.14
ARROW_CHARACTERS = 28
MARKERS_PER_LINE = 12
# How far the y axis extends beyond the values of trained nets, as a fraction of their span; longer bands are cut.
MAX_EXTENSION = 0.3
AXIS_MARGIN = 0.06


def metric_label(features: str, metric: str, n: int) -> str:
    """Returns the label of a metric, such as "FD (EfficientNet-Lite0), 500 samples"; `n` = 0: without samples."""
    return metric_name(features, metric) + (f", {n:,} samples" if n else "")


def fid_curves(
    metrics: pd.DataFrame,
    paths: list[Path],
    metric: str = "fd",
    comparisons: Sequence[Comparison] = (),
    external_curves: pd.DataFrame | None = None,
    arms: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """Draws one metric over training images, with a panel per study and features, and saves the figure to each path.

    - Lines with a name at the right: means of an arm over its seeds, at the checkpoints where all seeds of the arm have
      a value. The mean is geometric for distances above 0, otherwise arithmetic.
    - Thin lines: single seeds.
    - Bands: with two seeds, their range. With three or more seeds, the 95% t-interval of the mean (of the mean log for
      distances).
    - Error bars: standard errors of single values.
    - Crosses: last values of runs that diverged or collapsed.
    - The y axis shows the values of trained nets. The value of an untrained net outside this range is written at the
      edge of the panel.

    Equal tables give files with equal bytes.

    Args:
        metrics: long table with the columns study, arm, seed, step, images, features, metric, value, stderr, n and
            reason, and one row per arm, seed and step. The untrained net (step 0) has a row in each arm that starts
            from this net. If a value is missing, reason states why: "diverged at step N" or "collapsed at step N" for a
            failed run.
        paths: files to write; the suffix chooses the format ("png", "svg", "pdf").
        metric: "fd", "kid", "precision", "recall", "density" or "coverage".
        comparisons: comparisons of the verdicts, of which only the primary ones are used. The headline of a primary
            comparison is in the title of its panel. An arrow connects the places where the baseline and the candidate
            reach the primary threshold.
        external_curves: table like `metrics`, with curves from other people. These curves are drawn in grey in the
            panel of the same study and features.
        arms: study -> all arms of the study. The order of the arms fixes their styles. By default, it is the order of
            the rows.

    Raises:
        StudyError: no row has this metric, or the values of one panel are of different numbers of samples.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_curves(metrics, metric, comparisons, external_curves, arms), paths)


def hour_curves(
    metrics: pd.DataFrame,
    paths: list[Path],
    costs: Iterable[Cost],
    comparisons: Sequence[Comparison] = (),
    arms: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """Draws FD over reference hours, as `fid_curves` draws it over training images, and saves the figure to each path.

    The hours of an arm are its training images multiplied by its cost. The arrow has the factor of hours.

    Args:
        metrics: as for `fid_curves`; of arms with known costs.
        paths: files to write; the suffix chooses the format ("png", "svg", "pdf").
        costs: training cost of each arm.
        comparisons: as for `fid_curves`.
        arms: as for `fid_curves`.

    Raises:
        StudyError: as for `fid_curves`.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_hours(metrics, costs, comparisons, arms), paths)


def _draw_hours(
    metrics: pd.DataFrame,
    costs: Iterable[Cost],
    comparisons: Sequence[Comparison] = (),
    arms: Mapping[str, Iterable[str]] | None = None,
) -> Figure:
    hours = metrics["arm"].map({cost.arm: cost.seconds_per_1000_images / 3.6e6 for cost in costs})
    return _draw_curves(metrics.assign(images=metrics["images"] * hours), "fd", comparisons, None, arms, "hours")


def _draw_curves(
    metrics: pd.DataFrame,
    metric: str,
    comparisons: Sequence[Comparison] = (),
    external_curves: pd.DataFrame | None = None,
    arms: Mapping[str, Iterable[str]] | None = None,
    axis: Literal["images", "hours"] = "images",
) -> Figure:
    # The column `images` has the values of the x axis, also if these are hours.
    rows = metrics[metrics["metric"] == metric]
    rows = rows.assign(value=rows["value"].astype(float), reason=rows["reason"].astype(object).fillna(""))
    if rows.empty:
        raise StudyError(
            f"The table of metrics has no row of '{metric}': add it to evaluate.metrics and run the same command again"
        )
    check_sample_counts(rows)
    panels = list(rows.groupby(["study", "features"], sort=False))
    external = metrics.iloc[:0] if external_curves is None else external_curves
    external = external[external["metric"] == metric]
    primary = {(c.study, c.features): c for c in comparisons if c.role == "primary" and c.metric == metric}

    columns = min(len(panels), PANELS_PER_ROW)
    lines = -(-len(panels) // columns)
    figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    titles, captions = [], []
    for ax, ((study, features), panel) in zip(axes, panels, strict=False):
        order = dict.fromkeys([*(arms or {}).get(study, ()), *panel["arm"]])
        styles = {arm: line_style(place) for place, arm in enumerate(order)}
        comparison = primary.get((study, features))
        others = external.query("study == @study and features == @features and images <= @panel.images.max()")
        captions.append(_draw_panel(ax, panel, styles, comparison, others, axis))
        titles.append(textwrap.fill(f"{study}: {comparison.headline}" if comparison else study, TITLE_CHARACTERS))
        ax.set_title(titles[-1], loc="left", weight="bold")
    width = PANEL_INCHES[0] + LETTER_INCHES * rows["arm"].str.len().max()
    height = PANEL_INCHES[1] + TITLE_LINE_INCHES * _most_lines(titles) + CAPTION_LINE_INCHES * _most_lines(captions)
    figure.set_size_inches(width * columns, height * lines)
    return figure


def _most_lines(texts: list[str]) -> int:
    return max(text.count("\n") + 1 for text in texts)


def _draw_panel(
    ax: Axes,
    panel: pd.DataFrame,
    styles: Mapping[str, Style],
    comparison: Comparison | None,
    external: pd.DataFrame,
    axis: Literal["images", "hours"],
) -> str:
    """Draws the panel of one metric, study and feature extractor. Returns the caption."""
    features, metric = panel[["features", "metric"]].iloc[0]
    measured = panel[panel["value"].notna()]
    ratios = metric not in SHARES and bool((measured["value"] > 0).all())
    sentences = _caption(panel, ratios)
    direction = "higher is better →" if metric in HIGHER_IS_BETTER else "← lower is better"  # rotated: down, up
    label = metric_label(features, metric, int(measured["n"].max()) if len(measured) else 0)
    ax.set_ylabel(f"{label}\n{direction}")
    if axis == "images":
        set_image_axis(ax, panel)
    else:
        set_hour_axis(ax, panel["images"].max())
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    if measured.empty:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no run has a value", transform=ax.transAxes, ha="center", color="0.3")
    else:
        panel = _set_value_axis(ax, panel, ratios)

    for (arm, _), run in external.groupby(["arm", "seed"], sort=False):
        style = styles.get(arm, line_style(len(styles))) | EXTERNAL
        ax.plot(run["images"], run["value"], zorder=1, **style)
    ends = {}
    for arm, rows in panel.groupby("arm", sort=False):
        values = _by_seed(rows)
        line = _draw_arm(ax, values, styles[arm], ratios)
        _draw_error_bars(ax, rows, styles[arm], single=values.shape[1] == 1)
        for seed in rows.loc[failed(rows), "seed"].unique():
            last = values[seed].dropna().tail(1)
            ax.plot(last.index, last, color=styles[arm]["color"], linestyle="", zorder=5, **CROSS)
        if len(of_any_run := values.mean(axis=1).dropna()):
            last = of_any_run.index[-1]
            ends[arm] = (last, line.get(last, of_any_run[last]))
    label_ends(ax, ends, styles)

    if measured["stderr"].notna().any():
        sentences.append(
            "Error bars: ± each seed's standard error over other sets of generated images; bars inside a marker are "
            "hidden."
        )
    if len(external):
        n = external["n"].max()
        sentences.append(f"Grey: external curves{f' ({n:,} samples)' if n else ''}, with the markers of their arms.")
    effect = comparison and (comparison.images if axis == "images" else comparison.hours)
    if comparison and effect:
        _mark_crossings(ax, comparison, effect, styles)
        sentences.append("Ticks: smoothed runs reach the dotted threshold; arrow: from the baseline to the candidate.")
    caption = "\n".join(textwrap.fill(sentence, CAPTION_CHARACTERS) for sentence in sentences)
    ax.annotate(
        caption,
        xy=(0, 0),
        xycoords=("axes fraction", ax.xaxis.label),  # below the label, whatever the height of the tick labels
        xytext=(0, -5),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="0.25",
    )
    return caption


def _by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the values of one arm: a row per number of training images, a column per seed."""
    return rows.pivot(index="images", columns="seed", values="value")


def _set_value_axis(ax: Axes, panel: pd.DataFrame, ratios: bool) -> pd.DataFrame:
    """Sets the y axis to the values of trained nets. Returns the rows to draw.

    The rows of an untrained net are left out if a value of the untrained net is outside of the axis.
    """
    is_trained = panel["step"] > 0
    shown = panel[is_trained] if panel.loc[is_trained, "value"].notna().any() else panel
    values, stderr = shown["value"], shown["stderr"].fillna(0)
    is_log = ratios and values.max() > LOG_AXIS_FROM_RATIO * values.min()
    to_axis, from_axis = (np.log, np.exp) if is_log else (np.asarray, np.asarray)
    bands = [_mean_and_band(_by_seed(rows).dropna().to_numpy(), ratios) for _, rows in shown.groupby("arm")]
    ends = np.concatenate([values - stderr, values + stderr, *(edge for band in bands for edge in band)])
    lowest, highest = to_axis([values.min(), values.max()])
    extension = MAX_EXTENSION * (highest - lowest or 1.0)
    ends = to_axis(ends[(ends > 0) | (not is_log)]).clip(lowest - extension, highest + extension)
    low, high = np.nanmin(ends), np.nanmax(ends)
    margin = AXIS_MARGIN * (high - low or 1.0)
    untrained = panel.loc[~is_trained, "value"].dropna()
    is_above, is_below = untrained.max() > from_axis(high + margin), untrained.min() < from_axis(low - margin)
    ends = from_axis([low - margin * (1 + is_below), high + margin * (1 + is_above)])
    ax.set_ylim(*map(float, ends))
    if is_log:
        set_log_axis(ax)
    if not is_above and not is_below:
        return panel
    value = " to ".join(dict.fromkeys(f"{edge:.3g}" for edge in (untrained.min(), untrained.max())))
    arrow, height = ("↑", 0.985) if is_above else ("↓", 0.015)
    ax.text(
        0.012,
        height,
        f"{arrow} untrained: {value}",
        transform=ax.transAxes,
        va="top" if is_above else "bottom",
        fontsize=8,
        color="0.3",
    )
    return panel[is_trained]


def _draw_arm(ax: Axes, values: pd.DataFrame, style: Style, ratios: bool) -> pd.Series:
    """Draws the lines of one arm from values [images, seeds]. Returns the mean over seeds."""
    if values.shape[1] > 1:
        for seed in values:
            line = values[seed].dropna()
            ax.plot(line.index, line, color=style["color"], linewidth=0.6, alpha=0.5, marker=".", markersize=3)
    complete = values.dropna()
    mean, low, high = _mean_and_band(complete.to_numpy(), ratios)
    every = -(-len(complete) // MARKERS_PER_LINE) or 1
    ax.plot(
        complete.index,
        mean,
        linewidth=1.8,
        markersize=6,
        markevery=every,
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=4,
        **style,
    )
    if len(complete) == 1:  # a band of one checkpoint has no width
        ax.vlines(complete.index, low, high, color=style["color"], linewidth=1.2)
    ax.fill_between(complete.index, low, high, color=style["color"], alpha=0.14, linewidth=0)
    return pd.Series(mean, complete.index)


def _draw_error_bars(ax: Axes, rows: pd.DataFrame, style: Style, single: bool) -> None:
    """Draws the standard errors of one arm's values: faint, like thin lines, unless the arm has a `single` seed."""
    rows = rows[rows["value"].notna() & rows["stderr"].notna()]
    if rows.empty:
        return
    low, high = rows["value"] - rows["stderr"], rows["value"] + rows["stderr"]
    ax.vlines(rows["images"], low, high, color=style["color"], linewidth=1, alpha=1 if single else 0.5)


def _mark_crossings(ax: Axes, comparison: Comparison, effect: Effect, styles: Mapping[str, Style]) -> None:
    """Marks where runs reach the primary threshold, and writes the factor of images or hours, candidate / baseline."""
    threshold = effect.threshold
    ax.axhline(threshold, color="0.4", linewidth=0.7, linestyle=":")
    for arm, times in (
        (comparison.baseline, [run.baseline for run in effect.per_seed]),
        (comparison.candidate, [run.candidate for run in effect.per_seed]),
    ):
        reached = [time for time in times if np.isfinite(time)]
        ax.plot(reached, [threshold] * len(reached), "|", markersize=10, color=styles[arm]["color"], zorder=5)
    factor = effect_text(effect, f"times the {effect.quantity}")
    text = f"{comparison.short_name} {threshold:.4g}" + ("" if factor.startswith(UNKNOWN) else f": {factor}")
    middle = ax.get_xlim()[0]  # of the dotted line that is left of the runs
    if np.isfinite([effect.estimate, effect.baseline, effect.candidate]).all():
        middle = (effect.baseline + effect.candidate) / 2
        arrow = {"arrowstyle": "-|>", "color": "0.1", "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        start, end = (effect.baseline, threshold), (effect.candidate, threshold)
        ax.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=6)
    label_in_free_place(ax, textwrap.fill(text, ARROW_CHARACTERS), (middle, threshold))


def _mean_and_band(values: np.ndarray, ratios: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean, lower and upper edge, each [K], of values [K, S] over S seeds; computed on logs if `ratios`."""
    scaled = np.log(values) if ratios else values
    mean, low, high = t_interval(scaled)
    if values.shape[1] < 3:
        low, high = scaled.min(axis=1), scaled.max(axis=1)
    return tuple(np.exp(edge) if ratios else edge for edge in (mean, low, high))


def _caption(panel: pd.DataFrame, ratios: bool) -> list[str]:
    """Returns the sentences that explain lines and bands and list the runs that lack values."""
    values = {arm: _by_seed(rows) for arm, rows in panel.groupby("arm", sort=False)}
    arms_by_seeds: dict[int, list[str]] = {}
    for arm, seeds in values.items():
        arms_by_seeds.setdefault(seeds.shape[1], []).append(arm)
    sentences = []
    for count, arms in sorted(arms_by_seeds.items()):
        names = f" of {', '.join(arms)}" if len(arms_by_seeds) > 1 else ""
        sentences.append(_band_caption(count, names, ratios))
    if max(arms_by_seeds) > 1 and len(values) > 1:
        sentences.append("Seeds are paired: arms may differ even if bands overlap.")
    if any(seeds.shape[1] > 1 and seeds.isna().any(axis=None) for seeds in values.values()):
        sentences.append("A mean is drawn where all seeds of its arm have a value.")
    missing = panel[panel["value"].isna() & (panel["reason"] != "")]
    for reason, rows in missing.groupby("reason", sort=False):
        runs = rows[["arm", "seed"]].drop_duplicates().itertuples(index=False)
        cause = f"×: run {reason}" if failed(rows).all() else f"No value, {reason}"
        sentences.append(f"{cause}: {', '.join(f'{arm} seed {seed}' for arm, seed in runs)}.")
    return sentences


def _band_caption(seeds: int, names: str, ratios: bool) -> str:
    if seeds == 1:
        return f"One seed{names}: no interval."
    mean = "geometric mean" if ratios else "mean"
    band = "their range" if seeds == 2 else f"95% t-interval of the mean{' of the log' if ratios else ''}"
    return f"Line: {mean} of {seeds} seeds{names} (thin); band: {band}."
