"""The figure of metric curves over training images."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from convergence.analysis.intervals import t_interval
from convergence.analysis.results import Comparison
from convergence.errors import StudyError
from convergence.failures import failed
from convergence.figures.style import (
    LOG_AXIS_FROM_RATIO,
    STYLE,
    Style,
    draw_legend,
    line_style,
    save_figure,
    set_image_axis,
    set_log_axis,
)
from convergence.tables import HIGHER_IS_BETTER, SHARES, check_sample_counts, metric_name

EXTERNAL: Style = {"color": "0.72", "linewidth": 1, "markersize": 4}
CROSS: Style = {"marker": "x", "markersize": 10, "markeredgewidth": 2}

PANEL_INCHES = (4.4, 4.1)
PANELS_PER_ROW = 3
CAPTION_CHARACTERS = 58
CAPTION_LINE_INCHES = 0.14
LEGEND_ROW_INCHES = 0.21
MARKERS_PER_LINE = 12


def metric_label(features: str, metric: str, n: int) -> str:
    """Returns the label of a metric of `n` samples (0: unknown), such as "FD (EfficientNet-Lite0), 500 samples"."""
    return metric_name(features, metric) + (f", {n:,} samples" if n else "")


def fid_curves(
    metrics: pd.DataFrame,
    paths: list[Path],
    metric: str = "fd",
    comparisons: Sequence[Comparison] = (),
    external_curves: pd.DataFrame | None = None,
) -> None:
    """Draws one metric over training images, one panel per study and features, and saves the figure to each path.

    Each arm is a line: the mean over its seeds (geometric for distances above 0, arithmetic otherwise) at the
    checkpoints where all of its seeds have a value. Thin lines are single seeds. The band is the range of two seeds;
    for three and more it is the 95% t-interval of the mean (of the log for distances). Error bars are standard errors
    of single values. A cross marks the last value of a run that diverged or collapsed. Equal tables give equal bytes.

    Args:
        metrics: long table with the columns study, arm, seed, step, images, features, metric, value, stderr, n and
            reason, and one row per arm, seed and step. The untrained net (step 0) is in the table once for each arm
            that starts from it. If a value is missing, reason says why: "diverged at step N" or "collapsed at step N"
            for a failed run.
        paths: where to save; the suffix chooses the format ("png", "svg", "pdf").
        metric: "fd", "kid", "precision" or "recall".
        comparisons: those of the verdicts. The middle threshold of each and the places where runs reach it are marked.
        external_curves: table like `metrics` with curves from other people. They are drawn in grey in the panel of
            the same study and features.

    Raises:
        StudyError: no row has this metric, or the values of one panel are of different numbers of samples.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_curves(metrics, metric, comparisons, external_curves), paths)


def _draw_curves(
    metrics: pd.DataFrame,
    metric: str,
    comparisons: Sequence[Comparison] = (),
    external_curves: pd.DataFrame | None = None,
) -> Figure:
    rows = metrics[metrics["metric"] == metric]
    rows = rows.assign(value=rows["value"].astype(float), reason=rows["reason"].astype(object).fillna(""))
    if rows.empty:
        raise StudyError(
            f"The table of metrics has no row of '{metric}': add it to evaluate.metrics and run the same command again"
        )
    check_sample_counts(rows)
    panels = list(rows.groupby(["study", "features"], sort=False))
    styles = {arm: line_style(index) for index, arm in enumerate(rows["arm"].unique())}
    external = metrics.iloc[:0] if external_curves is None else external_curves
    external = external[external["metric"] == metric]

    columns = min(len(panels), PANELS_PER_ROW)
    lines = -(-len(panels) // columns)
    figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    caption_lines = max(
        _draw_panel(ax, panel, study, features, metric, styles, comparisons, external)
        for ax, ((study, features), panel) in zip(axes, panels, strict=False)
    )
    handles = [Line2D([], [], label=arm, linewidth=1.8, markersize=6, **style) for arm, style in styles.items()]
    if kinds := sorted({reason.split()[0] for reason in rows.loc[failed(rows), "reason"]}):
        handles.append(Line2D([], [], color="0.3", linestyle="", **CROSS, label=f"run {' or '.join(kinds)}"))
    width = PANEL_INCHES[0] * columns
    legend_rows = draw_legend(figure, handles, width, "outside lower center")
    height = (PANEL_INCHES[1] + CAPTION_LINE_INCHES * caption_lines) * lines + LEGEND_ROW_INCHES * (legend_rows - 1)
    figure.set_size_inches(width, height)
    return figure


def _draw_panel(
    ax: Axes,
    panel: pd.DataFrame,
    study: str,
    features: str,
    metric: str,
    styles: Mapping[str, Style],
    comparisons: Sequence[Comparison],
    external: pd.DataFrame,
) -> int:
    """Draws one study in one kind of features. Returns the number of lines of its caption."""
    measured = panel[panel["value"].notna()]
    values = {
        arm: rows.pivot(index="images", columns="seed", values="value")
        for arm, rows in panel.groupby("arm", sort=False)
    }
    ratios = metric not in SHARES and bool((measured["value"] > 0).all())
    external = external.query("study == @study and features == @features and images <= @panel.images.max()")
    for (arm, _), run in external.groupby(["arm", "seed"], sort=False):
        style = styles.get(arm, line_style(len(styles))) | EXTERNAL
        ax.plot(run["images"], run["value"], zorder=1, **style)
    for arm, seeds in values.items():
        _draw_arm(ax, seeds, styles[arm], ratios)
    known = measured[measured["stderr"].notna()]
    for arm, rows in known.groupby("arm"):
        _draw_error_bars(ax, rows, styles[arm], single=values[arm].shape[1] == 1)
    for (arm, seed), _ in panel[failed(panel)].groupby(["arm", "seed"]):
        last = values[arm][seed].dropna().tail(1)
        ax.plot(last.index, last, color=styles[arm]["color"], linestyle="", zorder=5, **CROSS)

    ax.set_title(study)
    direction = "higher is better →" if metric in HIGHER_IS_BETTER else "← lower is better"  # rotated: down, up
    label = metric_label(features, metric, int(measured["n"].max()) if len(measured) else 0)
    ax.set_ylabel(f"{label}\n{direction}")
    if ratios and len(measured) and measured["value"].max() > LOG_AXIS_FROM_RATIO * measured["value"].min():
        set_log_axis(ax)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    set_image_axis(ax, panel)
    if measured.empty:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no run has a value", transform=ax.transAxes, ha="center", color="0.3")
    sentences = _caption(panel, values, ratios)
    if len(known):
        sentences.append(
            "Error bars: ± each seed's standard error over other sets of generated images; bars inside a marker are "
            "hidden."
        )
    if len(external):
        n = external["n"].max()
        sentences.append(f"Grey: external curves{f' ({n:,} samples)' if n else ''}, with the markers of their arms.")
    shown = [c for c in comparisons if (c.study, c.features, c.metric) == (study, features, metric) and c.thresholds]
    sentences += _mark_crossings(ax, shown, styles)
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
    return caption.count("\n") + 1


def _draw_arm(ax: Axes, values: pd.DataFrame, style: Style, ratios: bool) -> None:
    """Draws the lines of one arm; `values` has one row per number of training images and one column per seed."""
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


def _draw_error_bars(ax: Axes, rows: pd.DataFrame, style: Style, single: bool) -> None:
    """Draws the standard errors of one arm's values, as faint as its thin lines unless it has a `single` seed."""
    low, high = rows["value"] - rows["stderr"], rows["value"] + rows["stderr"]
    ax.vlines(rows["images"], low, high, color=style["color"], linewidth=1, alpha=1 if single else 0.5)


def _mark_crossings(ax: Axes, comparisons: Sequence[Comparison], styles: Mapping[str, Style]) -> list[str]:
    """Marks the primary threshold of each comparison and where the smoothed runs reach it. Returns their caption."""
    for comparison in comparisons:
        threshold = comparison.primary_threshold
        runs = comparison.effect("images", threshold).per_seed
        for arm, times in (
            (comparison.baseline, [run.baseline for run in runs]),
            (comparison.candidate, [run.candidate for run in runs]),
        ):
            reached = [time for time in times if np.isfinite(time)]
            ax.plot(reached, [threshold] * len(reached), "|", markersize=13, color=styles[arm]["color"], zorder=5)
        ax.axhline(threshold, color="0.4", linewidth=0.7, linestyle=":")
    thresholds = ", ".join(dict.fromkeys(f"{comparison.primary_threshold:.4g}" for comparison in comparisons))
    return [f"Dotted: threshold {thresholds}. Ticks: smoothed runs reach it."] if comparisons else []


def _mean_and_band(values: np.ndarray, ratios: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean, lower and upper edge ([K] each) of values [K, S] over S seeds, computed on logs if `ratios`."""
    scaled = np.log(values) if ratios else values
    mean, low, high = t_interval(scaled)
    if values.shape[1] < 3:
        low, high = scaled.min(axis=1), scaled.max(axis=1)
    return tuple(np.exp(edge) if ratios else edge for edge in (mean, low, high))


def _caption(panel: pd.DataFrame, values: Mapping[str, pd.DataFrame], ratios: bool) -> list[str]:
    """Returns the sentences that explain lines and bands and list the runs that lack values."""
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
        sentences.append(f"No value, {reason}: {', '.join(f'{arm} seed {seed}' for arm, seed in runs)}.")
    return sentences


def _band_caption(seeds: int, names: str, ratios: bool) -> str:
    if seeds == 1:
        return f"One seed{names}: no interval."
    mean = "geometric mean" if ratios else "mean"
    band = "their range" if seeds == 2 else f"95% t-interval of the mean{' of the log' if ratios else ''}"
    return f"Line: {mean} of {seeds} seeds{names} (thin); band: {band}."
