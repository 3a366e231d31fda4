"""The study's figures: metric curves over training images, and the grid of previews of samples."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

from diffusion import StudyError
from diffusion.files import replacing
from workflow.statistics import middle_threshold, t_interval
from workflow.tables import HIGHER_IS_BETTER, SHARES, diverged, metric_name

# Okabe & Ito 2008, "Color Universal Design"; yellow is left out: too pale for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "h", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)))
PUBLISHED = {"color": "0.72", "linewidth": 1, "markersize": 4}
CROSS = {"marker": "x", "markersize": 10, "markeredgewidth": 2}

PANEL_INCHES = (4.4, 4.1)
PANELS_PER_ROW = 3
DPI = 200
CAPTION_CHARACTERS = 58
CAPTION_LINE_INCHES = 0.14
LOG_AXIS_FROM_RATIO = 3
MARKERS_PER_LINE = 12
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "svg.hashsalt": "curves",  # ids in the SVG are random without it
}

CELL_PIXELS = 480
CELL_GAP = 12
GRID_COLUMNS = 6
FONT_PIXELS = 26
EMPTY_CELL = (236, 236, 236)
INK = (0, 0, 0)
PALE_INK = (90, 90, 90)


# --- Curves -------------------------------------------------------------------------------------------------


def metric_label(features: str, metric: str, n: int) -> str:
    """What was measured, and of how much if that is known (not 0), such as "FD (EfficientNet-Lite0), 500 samples"."""
    return metric_name(features, metric) + (f", {n:,} samples" if n else "")


def fid_curves(
    metrics: pd.DataFrame,
    paths: list[Path],
    metric: str = "fd",
    speedups: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
) -> None:
    """Draw one metric over training images, a panel per study and features, and save it to each path.

    An arm is a line: the mean over its seeds (geometric for distances above 0, arithmetic otherwise) where
    all of them have a value. Its seeds are thin lines; the band is their range (two seeds) or the 95%
    t-interval of the mean, of its log for distances (three and more). A diverged run ends in a cross. Equal
    tables give equal bytes.

    Args:
        metrics: long table with columns study, arm, seed, step, images, features, metric, value, n, reason:
            one row per arm, seed and step, the untrained net (step 0) under every arm that starts from it.
            Where the value is missing the reason says why, "diverged at step N" for a diverged run.
        paths: where to save; the suffix chooses the format ("png", "svg", "pdf").
        metric: "fd", "kid", "precision" or "recall".
        speedups: `workflow.statistics.speedup_table`, of which the middle threshold and its crossings are marked.
        published: such a table of curves from elsewhere, drawn in grey where study, features and metric are the same.

    Raises:
        StudyError: no row has this metric, or one panel has unequal numbers of samples.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_curves(metrics, metric, speedups, published), paths)


def _draw_curves(
    metrics: pd.DataFrame, metric: str, speedups: pd.DataFrame | None = None, published: pd.DataFrame | None = None
) -> Figure:
    rows = metrics[metrics["metric"] == metric]
    rows = rows.assign(value=rows["value"].astype(float), reason=rows["reason"].astype(object).fillna(""))
    if rows.empty:
        raise StudyError(
            f"The table of metrics has no row of '{metric}': add it to evaluate.metrics and run the same command again"
        )
    panels = list(rows.groupby(["study", "features"], sort=False))
    styles = {arm: line_style(index) for index, arm in enumerate(rows["arm"].unique())}
    published = metrics.iloc[:0] if published is None else published[published["metric"] == metric]

    columns = min(len(panels), PANELS_PER_ROW)
    lines = -(-len(panels) // columns)
    figure = Figure(layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    caption_lines = max(
        _draw_panel(ax, panel, study, features, metric, styles, speedups, published)
        for ax, ((study, features), panel) in zip(axes, panels, strict=False)
    )
    width = PANEL_INCHES[0] * columns
    figure.set_size_inches(width, (PANEL_INCHES[1] + CAPTION_LINE_INCHES * caption_lines) * lines)

    handles = [Line2D([], [], label=arm, linewidth=1.8, markersize=6, **style) for arm, style in styles.items()]
    if diverged(rows).any():
        handles.append(Line2D([], [], color="0.3", linestyle="", **CROSS, label="run diverged"))
    draw_legend(figure, handles, width, "outside lower center")
    return figure


def draw_legend(figure: FigureBase, handles: list[Line2D], width: float, loc: str) -> None:
    """A legend over a figure of this width in inches: in as few rows as hold its labels."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(width / (0.65 + 0.08 * longest)))  # inches of a handle and of a letter
    rows = -(-len(handles) // fitting)
    figure.legend(
        handles=handles, loc=loc, ncols=-(-len(handles) // rows), frameon=False, handlelength=3, columnspacing=1.2
    )


def line_style(index: int) -> dict[str, object]:
    """Colour, marker and dashes of arm `index`: in grey, marker and dashes still tell arms apart."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def _draw_panel(
    ax: Axes,
    panel: pd.DataFrame,
    study: str,
    features: str,
    metric: str,
    styles: Mapping[str, Mapping[str, object]],
    speedups: pd.DataFrame | None,
    published: pd.DataFrame,
) -> int:
    """Draw one study in one kind of features; returns the lines of its caption.

    Raises:
        StudyError: values come from unequal numbers of samples.
    """
    measured = panel[panel["value"].notna()]
    counts = sorted({int(n) for n in measured["n"]})
    if len(counts) > 1:
        raise StudyError(
            f"Study '{study}' has {metric} of {counts[0]:,} and of {counts[-1]:,} samples, and its bias "
            "depends on that number: delete the metrics.csv of the checkpoints with the other number and run the same "
            "command again; in a table of your own keep one n per study"
        )
    values = {
        arm: rows.pivot(index="images", columns="seed", values="value")
        for arm, rows in panel.groupby("arm", sort=False)
    }
    ratios = metric not in SHARES and bool((measured["value"] > 0).all())
    elsewhere = published.query("study == @study and features == @features and images <= @panel.images.max()")
    for (arm, _), run in elsewhere.groupby(["arm", "seed"], sort=False):
        style = styles.get(arm, line_style(len(styles))) | PUBLISHED
        ax.plot(run["images"], run["value"], zorder=1, **style)
    for arm, of_seeds in values.items():
        _draw_arm(ax, of_seeds, styles[arm], ratios)
    for (arm, seed), _ in panel[diverged(panel)].groupby(["arm", "seed"]):
        last = values[arm][seed].dropna().tail(1)
        ax.plot(last.index, last, color=styles[arm]["color"], linestyle="", zorder=5, **CROSS)

    ax.set_title(study)
    direction = "higher is better →" if metric in HIGHER_IS_BETTER else "← lower is better"  # rotated: down, up
    ax.set_ylabel(f"{metric_label(features, metric, max(counts, default=0))}\n{direction}")
    if ratios and len(measured) and measured["value"].max() > LOG_AXIS_FROM_RATIO * measured["value"].min():
        set_log_axis(ax)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    set_image_axis(ax, panel)
    if measured.empty:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no run has a value", transform=ax.transAxes, ha="center", color="0.3")
    sentences = _caption(panel, values, ratios)
    if len(elsewhere):
        sentences.append(f"Grey: published runs, {elsewhere['n'].max():,} samples, with the marks of their arms.")
    if speedups is not None:
        sentences += _mark_crossings(ax, speedups.query("study == @study and features == @features"), metric, styles)
    caption = "\n".join(textwrap.fill(sentence, CAPTION_CHARACTERS) for sentence in sentences)
    ax.annotate(
        caption,
        xy=(0, 0),
        xycoords=("axes fraction", ax.xaxis.label),  # hung on the label, it clears ticks of any height
        xytext=(0, -5),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="0.25",
    )
    return caption.count("\n") + 1


def _draw_arm(ax: Axes, of_seeds: pd.DataFrame, style: Mapping[str, object], ratios: bool) -> None:
    """The lines of one arm; `of_seeds` holds a row per number of training images and a column per seed."""
    if of_seeds.shape[1] > 1:
        for seed in of_seeds:
            line = of_seeds[seed].dropna()
            ax.plot(line.index, line, color=style["color"], linewidth=0.6, alpha=0.5, marker=".", markersize=3)
    complete = of_seeds.dropna()
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
    if len(complete) == 1:  # a band one checkpoint wide cannot be seen
        ax.vlines(complete.index, low, high, color=style["color"], linewidth=1.2)
    ax.fill_between(complete.index, low, high, color=style["color"], alpha=0.14, linewidth=0)


def _mark_crossings(
    ax: Axes, speedups: pd.DataFrame, metric: str, styles: Mapping[str, Mapping[str, object]]
) -> list[str]:
    """Mark the middle threshold of each comparison and where runs, smoothed, cross it; returns that in words."""
    marked = {}
    for (baseline, candidate), rows in speedups[speedups["metric"] == metric].groupby(["baseline", "candidate"]):
        threshold = middle_threshold(rows)
        runs = rows[(rows["quantity"] == "images") & (rows["threshold"] == threshold) & rows["seed"].notna()]
        for arm, times in ((baseline, runs["of_baseline"]), (candidate, runs["of_candidate"])):
            marked[f"{threshold:.4g}"] = None
            seen = times[np.isfinite(times)]
            ax.plot(seen, np.full(len(seen), threshold), "|", markersize=13, color=styles[arm]["color"], zorder=5)
        ax.axhline(threshold, color="0.4", linewidth=0.7, linestyle=":")
    return [f"Dotted: threshold {', '.join(marked)}; ticks: where each seed, smoothed, crosses it."] if marked else []


def _mean_and_band(values: np.ndarray, ratios: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper edge ([K] each) of values [K, S] over the S seeds; by logs for ratios."""
    scaled = np.log(values) if ratios else values
    mean, low, high = t_interval(scaled)
    if values.shape[1] < 3:
        low, high = scaled.min(axis=1), scaled.max(axis=1)
    return tuple(np.exp(edge) if ratios else edge for edge in (mean, low, high))


def _caption(panel: pd.DataFrame, values: Mapping[str, pd.DataFrame], ratios: bool) -> list[str]:
    """What the lines and the band are, and which runs lack values, in words."""
    arms_by_seeds: dict[int, list[str]] = {}
    for arm, of_seeds in values.items():
        arms_by_seeds.setdefault(of_seeds.shape[1], []).append(arm)
    sentences = []
    for seeds, arms in sorted(arms_by_seeds.items()):
        whose = f" of {', '.join(arms)}" if len(arms_by_seeds) > 1 else ""
        sentences.append(_band_in_words(seeds, whose, ratios))
    if max(arms_by_seeds) > 1 and len(values) > 1:
        sentences.append("Seeds are paired: arms may differ though bands overlap.")
    if any(of_seeds.shape[1] > 1 and of_seeds.isna().any(axis=None) for of_seeds in values.values()):
        sentences.append("A mean is drawn where every seed of its arm has a value.")
    missing = panel[panel["value"].isna() & (panel["reason"] != "")]
    for reason, rows in missing.groupby("reason", sort=False):
        runs = rows[["arm", "seed"]].drop_duplicates().itertuples(index=False)
        sentences.append(f"No value, {reason}: {', '.join(f'{arm} seed {seed}' for arm, seed in runs)}.")
    return sentences


def _band_in_words(seeds: int, whose: str, ratios: bool) -> str:
    if seeds == 1:
        return f"One seed{whose}: no interval."
    mean = "geometric mean" if ratios else "mean"
    band = "their range" if seeds == 2 else f"95% t-interval of the mean{' of the log' if ratios else ''}"
    return f"Line: {mean} of {seeds} seeds{whose} (thin); band: {band}."


def set_log_axis(ax: Axes) -> None:
    """Make the y axis of what is drawn already logarithmic, with ticks at round numbers however short it is."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def set_image_axis(ax: Axes, panel: pd.DataFrame) -> None:
    """Training images below and, where one batch size holds for all, optimiser steps above."""
    last = panel["images"].max() or 1
    ax.set_xlim(-0.03 * last, 1.04 * last)
    ax.set_xlabel("training images")
    trained = panel[panel["step"] > 0]
    batch_sizes = (trained["images"] / trained["step"]).unique()
    shown = [ax]
    if len(batch_sizes) == 1 and batch_sizes[0] > 1:  # curves from elsewhere may know images alone
        (batch_size,) = batch_sizes
        steps = ax.secondary_xaxis("top", functions=(lambda x: x / batch_size, lambda step: step * batch_size))
        steps.set_xlabel("optimiser steps")
        shown.append(steps)
    else:
        ax.spines["top"].set_visible(False)
    for axis in shown:
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True))
        axis.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(count: float) -> str:
    """A count to three digits: 500, 3.2k, 1.25M."""
    count = float(f"{count:.3g}")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


# --- Samples ------------------------------------------------------------------------------------------------


def preview_grid(
    cells: Iterable[tuple[str, str, int, int, int, str]], metrics: pd.DataFrame
) -> tuple[dict[str, dict[int, Path | None]], dict[int, int]]:
    """What `samples_grid` takes, grids and steps: a row per arm of each study, without what diverged.

    Args:
        cells: (study, arm, seed, step, training images, its preview) of every checkpoint to be shown.
        metrics: the long table of metrics, which tells what diverged.

    Returns:
        The grids, and the steps of those numbers of images that are one step in all arms.
    """
    cells, keys = list(cells), ["study", "arm", "seed", "step"]
    without_samples = set(metrics.loc[diverged(metrics), keys].itertuples(index=False, name=None))
    several = len({study for study, *_ in cells}) > 1
    grids: dict[str, dict[int, Path | None]] = defaultdict(dict)
    steps: dict[int, set[int]] = defaultdict(set)
    for study, arm, seed, step, images, preview in cells:
        shown = (study, arm, seed, step) not in without_samples
        grids[f"{study} {arm}" if several else arm][images] = Path(preview) if shown else None
        steps[images].add(step)
    return grids, {images: s.pop() for images, s in steps.items() if len(s) == 1}


def samples_grid(grids: Mapping[str, Mapping[int, Path | None]], destination: Path, steps: Mapping[int, int]) -> None:
    """Save one PNG of previews: a row per arm, a column per checkpoint (six at most, from first to last).

    Small images are enlarged by a whole factor without smoothing, large ones reduced by a whole factor.

    Args:
        grids: arm -> training images -> its preview; None where there is none, as after a divergence.
        destination: the PNG.
        steps: training images -> optimiser step, for the headings; a column without one names images only.

    Raises:
        StudyError: a preview cannot be read.
    """
    columns = sorted({images for row in grids.values() for images in row})
    chosen = np.linspace(0, len(columns) - 1, min(len(columns), GRID_COLUMNS)).round().astype(int)
    columns = [columns[index] for index in chosen]
    cells = {
        (arm, images): _load_cell(path)
        for arm, row in grids.items()
        for images, path in row.items()
        if images in columns and path is not None
    }
    width = max((cell.width for cell in cells.values()), default=CELL_PIXELS)
    height = max((cell.height for cell in cells.values()), default=CELL_PIXELS // 2)
    margin = 2 * FONT_PIXELS

    size = (margin + len(columns) * (width + CELL_GAP), 2 * margin + len(grids) * (height + CELL_GAP))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, images in enumerate(columns):
        heading = f"{_short(images)} images" + (f" (step {steps[images]:,})" if images in steps else "")
        _write(page, heading, (margin + column * (width + CELL_GAP) + width // 2, margin // 2), width)
    for row, arm in enumerate(grids):
        top = margin + row * (height + CELL_GAP)
        _write(page, arm, (margin // 2, top + height // 2), height, upwards=True)
        for column, images in enumerate(columns):
            left = margin + column * (width + CELL_GAP)
            if cell := cells.get((arm, images)):
                page.paste(cell, (left, top))
            else:
                draw.rectangle((left, top, left + width - 1, top + height - 1), fill=EMPTY_CELL)
                _write(page, "no samples", (left + width // 2, top + height // 2), width, PALE_INK)
    caption = "Every cell starts from the same latents, in the same order."
    _write(page, caption, (size[0] // 2, size[1] - margin // 2), size[0], PALE_INK)
    _save_png(page, destination)


def _load_cell(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except OSError as error:
        raise StudyError(
            f"The preview {path} cannot be read ({error}): delete it and run the same command again"
        ) from error
    if image.width > CELL_PIXELS:
        return image.reduce(round(image.width / CELL_PIXELS))
    factor = round(CELL_PIXELS / image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _write(
    page: Image.Image,
    text: str,
    centre: tuple[int, int],
    room: int,
    ink: tuple[int, int, int] = INK,
    upwards: bool = False,
) -> None:
    """Put one line of text around a point, smaller where it would be longer than the room in pixels."""
    file = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    font = ImageFont.truetype(file, FONT_PIXELS)
    if font.getlength(text) > room:
        font = ImageFont.truetype(file, FONT_PIXELS * room / font.getlength(text))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, anchor="mm"))
    label = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(label).text((1 - left, 1 - top), text, fill=255, font=font, anchor="mm")
    if upwards:
        label = label.transpose(Image.Transpose.ROTATE_90)
    page.paste(ink, (centre[0] - label.width // 2, centre[1] - label.height // 2), label)


# --- Files --------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, paths: list[Path]) -> None:
    """Save a figure drawn in `STYLE` to each path, in the format that the suffix names. Equal figures, equal bytes."""
    for path in paths:
        with replacing(path) as file:
            # a date or a version would make equal data differ
            metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
            kind = path.suffix.removeprefix(".")
            figure.savefig(file, format=kind, dpi=DPI, metadata=metadata.get(kind))


def _save_png(image: Image.Image, destination: Path) -> None:
    with replacing(destination) as file:
        image.save(file, format="PNG")
