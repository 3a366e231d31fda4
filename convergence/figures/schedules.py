"""The figure of the schedules: how often each arm of a study draws each timestep, and with which loss weights."""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from convergence.figures.style import STYLE, Style, draw_legend, line_style, save_figure, set_log_axis
from diffusion.build import noise_schedule, run_tables
from diffusion.config import RunConfig
from diffusion.paths import NoisePath
from diffusion.schemes import Tables

TENTHS = 10
TIME = "t  (0: least noise)"
VB_TITLE = "Weight of the vb"  # always on a log axis: a match can need large weights where t is hardly drawn
WIDTH_INCHES = 12.0
CURVES_INCHES = 6.0
ARM_INCHES = 0.27
LINE_INCHES = 0.16
CAPTION_CHARACTERS = 165
LINE_WIDTHS = (3.2, 1.5)  # of the first and the last arm: the first of two equal curves stays visible below the last
MARKERS_PER_LINE = 5
LOG_AXIS_FROM_RATIO = 20
LOG_AXIS_REACH = 1e3
SHARES_RANGE = (1 / 8, 8)  # of a share over that of uniform draws, which are white
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue (ITU-R BT.709)


class Curves(NamedTuple):
    """Curves of one arm over the timesteps t, each float64 [T]: how often t is drawn, and the loss weights at t."""

    draws: np.ndarray
    """T p_t, where p_t is the probability of t. The mean is 1; uniform draws have 1 everywhere."""
    weight: np.ndarray
    """w_t, the weight of the MSE; NaN where t is never drawn, because no weight acts there."""
    vb_weight: np.ndarray
    """Weight of the vb (variational bound); NaN where t is never drawn."""
    product: np.ndarray
    """T p_t w_t, the factor of the expected gradient of the MSE at t. It is 1 for uniform draws with weight 1."""


def curves(tables: Tables) -> Curves:
    """Returns the curves of an arm. `tables` is the density and the loss weights of the arm, on the CPU."""
    draws = len(tables.probabilities) * tables.probabilities.numpy()
    weight, vb_weight = (np.where(draws > 0, w.numpy(), np.nan) for w in (tables.mse_weight, tables.vb_weight))
    return Curves(draws, weight, vb_weight, np.nan_to_num(draws * weight))


def tenths(values: np.ndarray) -> np.ndarray:
    """Returns the share [10] of each tenth of the timesteps in the sum of values [T]. The shares sum to 1.

    The first tenth starts at t = 0.
    """
    tenth = TENTHS * np.arange(len(values)) // len(values)
    return np.bincount(tenth, values, TENTHS) / values.sum()


def draw_schedules(study: str, runs: Mapping[str, RunConfig], paths: list[Path]) -> None:
    """Draws how the arms of a study draw and weight timesteps, and saves the figure to each path.

    - The upper panels show, against t, the density, the weight of the MSE, and their product.
    - The middle panels show, against log SNR, the density, the weight of the vb, and the product of density and weight
      of the MSE. Here a density is per unit of log SNR: p_t / |d log SNR / dt| (Kingma & Gao 2023, arXiv 2303.00848,
      sec. 2). A weight keeps its value at each t.
    - The lower tables show the share of each tenth of the timesteps in the draws, and in the product of density and
      weight of the MSE.

    The weights of the MSE are those of the squared error of epsilon, also if the net predicts something else.

    A learned density is drawn as it is at the start of training. Equal settings give files with equal bytes.

    Args:
        study: name of the study, for the title.
        runs: arm -> settings of its runs, in the order that fixes the styles of the arms.
        paths: files to write; the suffix chooses the format ("png", "svg", "pdf").
    """
    noise_paths = {arm: noise_schedule(run.diffusion) for arm, run in runs.items()}
    tables = {arm: run_tables(run, of_epsilon=True) for arm, run in runs.items()}
    learned = [arm for arm, run in runs.items() if run.scheme.timesteps.learned]
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_figure(study, noise_paths, tables, learned), paths)


def _draw_figure(
    study: str, noise_paths: Mapping[str, NoisePath], tables: Mapping[str, Tables], learned: list[str]
) -> Figure:
    """Draws the densities and weights of the arms. The densities of the arms in `learned` change during training."""
    widths = np.linspace(*LINE_WIDTHS, len(tables))
    styles: dict[str, Style] = {
        arm: {**line_style(index), "linewidth": widths[index], "markersize": 5, "zorder": 2 + index / len(tables)}
        for index, arm in enumerate(tables)
    }
    arms = {arm: curves(table) for arm, table in tables.items()}
    caption = _caption(arms, learned)
    timesteps = len(next(iter(arms.values())).draws)
    shares_inches = 0.9 + ARM_INCHES * len(arms)
    height = CURVES_INCHES + shares_inches + 0.6 + LINE_INCHES * caption.count("\n")
    figure = Figure((WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    figure.suptitle(f"{study}: {timesteps:,} timesteps", fontsize=12, weight="bold")
    figure.supxlabel(caption, x=0.02, ha="left", fontsize=9, color="0.25")
    heights = (CURVES_INCHES, shares_inches)
    upper, lower = figure.subfigures(2, squeeze=False, height_ratios=heights)[:, 0]
    _draw_curves(upper, noise_paths, arms, styles)
    shares = {
        "Draws in each tenth of the timesteps, %": [tenths(c.draws) for c in arms.values()],
        "Expected MSE weight in each tenth, %": [tenths(c.product) for c in arms.values()],
    }
    left, right = lower.subplots(1, 2)
    for ax, (title, rows) in zip((left, right), shares.items(), strict=True):
        _draw_shares(ax, np.array(rows), timesteps)
        ax.set_title(title)
    left.set_yticks(np.arange(len(arms)) + 0.5, arms)
    right.set_yticks([])
    return figure


def _draw_curves(
    figure: SubFigure, noise_paths: Mapping[str, NoisePath], arms: Mapping[str, Curves], styles: Mapping[str, Style]
) -> None:
    """Draws the legend and the six panels of curves: three against t, and three against log SNR."""
    handles = [Line2D([], [], label=arm, **styles[arm]) for arm in arms]
    draw_legend(figure, handles, WIDTH_INCHES - 1, "outside upper center")

    log_snr = {arm: np.log(noise_paths[arm].snr.numpy()) for arm in arms}
    per_log_snr = {arm: 1 / (len(values) * np.abs(np.gradient(values))) for arm, values in log_snr.items()}
    timesteps = {arm: np.arange(len(values)) for arm, values in log_snr.items()}
    panels: list[tuple[str, str, Callable[[str, Curves], np.ndarray]]] = [
        ("How often t is drawn", "T p(t)   (uniform: 1)", lambda arm, c: c.draws),
        ("Weight of the MSE", "w(t)", lambda arm, c: c.weight),
        ("Expected weight of the MSE", "T p(t) w(t)", lambda arm, c: c.product),
        ("Draws per unit of log SNR", "p(t) / |d log SNR / dt|", lambda arm, c: c.draws * per_log_snr[arm]),
        (VB_TITLE, "v(t)   (log axis)", lambda arm, c: c.vb_weight),
        ("Expected MSE weight per unit of log SNR", "p(t) w(t) / |d log SNR / dt|",
         lambda arm, c: c.product * per_log_snr[arm]),
    ]  # fmt: skip
    over_t, over_log_snr = figure.subplots(2, 3)
    for ax, (title, y_label, line_of) in zip((*over_t, *over_log_snr), panels, strict=True):
        lines = {arm: line_of(arm, c) for arm, c in arms.items()}
        _draw_lines(ax, timesteps if ax in over_t else log_snr, lines, styles)
        log_from = 0 if title == VB_TITLE else LOG_AXIS_FROM_RATIO
        scale, *limits = axis_limits(list(lines.values()), [c.draws for c in arms.values()], log_from)
        ax.set_ylim(*limits)  # before the scale: autoscaling to a deep tail would overflow
        if scale == "log":
            set_log_axis(ax)
        ax.set_title(title, fontsize=10)
        ax.set_ylabel(y_label)
    for ax in over_t:
        ax.set_xlabel(TIME)
    for ax in over_log_snr:
        ax.set_xlabel("log SNR  (left: least noise)")
        ax.invert_xaxis()


def _draw_lines(
    ax: Axes, x: Mapping[str, np.ndarray], lines: Mapping[str, np.ndarray], styles: Mapping[str, Style]
) -> None:
    for index, (arm, y) in enumerate(lines.items()):
        every = -(-len(y) // MARKERS_PER_LINE)
        # The markers of equal curves are next to each other.
        first = int(every * (index + 0.5) / len(lines))
        ax.plot(x[arm], y, markevery=(first, every), markeredgecolor="white", markeredgewidth=0.7, **styles[arm])
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["top"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True))


def axis_limits(
    lines: list[np.ndarray], draws: list[np.ndarray], log_from: float = LOG_AXIS_FROM_RATIO
) -> tuple[str, float, float]:
    """Chooses the scale ("linear" or "log") and the limits of a y axis that shows several curves [T].

    The typical value of a curve is its median over the timesteps that the arm draws. The axis is logarithmic if the
    largest value of all curves is more than `log_from` times the smallest typical value: on a linear axis, this typical
    value would look like 0. A log axis extends at most a factor of 1,000 beyond the typical values, because densities
    can have tails of any depth.

    Args:
        lines: curve [T] of each arm; zeros and NaN are ignored.
        draws: T p_t [T] of each arm, where p_t is the probability of t.
        log_from: ratio above which the axis is logarithmic; 0: always.

    Returns:
        scale, lower limit and upper limit.
    """
    drawn = [(line[line > 0], p[line > 0]) for line, p in zip(lines, draws, strict=True) if (line > 0).any()]
    if not drawn:
        return "linear", 0.0, 1.0
    typical = [np.quantile(line, 0.5, weights=p, method="inverted_cdf") for line, p in drawn]
    lowest, highest = min(line.min() for line, _ in drawn), max(line.max() for line, _ in drawn)
    if highest <= log_from * min(typical):
        return "linear", 0.0, 1.08 * highest
    lowest, highest = max(lowest, min(typical) / LOG_AXIS_REACH), min(highest, max(typical) * LOG_AXIS_REACH)
    return "log", lowest / 1.5, highest * 1.5


def _draw_shares(ax: Axes, shares: np.ndarray, timesteps: int) -> None:
    """Draws shares [arms, 10] as a table. Its colours compare the shares with those of uniform draws."""
    times_uniform = np.maximum(TENTHS * shares, SHARES_RANGE[0])
    cells = ax.pcolormesh(times_uniform, cmap="PuOr_r", norm=LogNorm(*SHARES_RANGE), edgecolors="white")
    colours = cells.to_rgba(times_uniform)[..., :3]
    for (row, tenth), share in np.ndenumerate(shares):
        ink = "black" if colours[row, tenth] @ LUMINANCE > 0.4 else "white"
        ax.text(tenth + 0.5, row + 0.5, _percent(share), ha="center", va="center", fontsize=8.5, color=ink)
    ax.invert_yaxis()
    ax.set_xticks(range(TENTHS + 1), [str(-(-timesteps * tenth // TENTHS)) for tenth in range(TENTHS + 1)])
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(TIME)
    ax.spines[:].set_visible(False)


def _percent(share: float) -> str:
    return "<0.1" if 0 < share < 0.0005 else f"{100 * share:.1f}"


def _caption(arms: Mapping[str, Curves], learned: list[str]) -> str:
    """Describes the draws in the first tenth of the timesteps, equal curves, and proportional expected weights."""
    by_share: dict[str, list[str]] = {}
    for arm, arm_curves in arms.items():
        by_share.setdefault(_percent(tenths(arm_curves.draws)[0]), []).append(arm)
    shares = "; ".join(f"{share}% in {_listed(names)}" for share, names in by_share.items())
    timesteps = len(next(iter(arms.values())).draws)
    sentences = [f"Draws with t < {-(-timesteps // TENTHS)}: {shares}."]

    equal = [
        f"{name} of {_listed(group)}"
        for name, field in (
            ("draws", "draws"),
            ("MSE weight", "weight"),
            ("vb weight", "vb_weight"),
            ("expected MSE weight", "product"),
        )
        for group in _equal({arm: getattr(arm_curves, field) for arm, arm_curves in arms.items()})
    ]
    if equal:
        sentences.append(f"Equal curves, which overlap: {'; '.join(equal)}.")
    totals = {arm: arm_curves.product.sum() for arm, arm_curves in arms.items()}
    for first, *others in _equal({arm: arm_curves.product / totals[arm] for arm, arm_curves in arms.items()}):
        factors = {arm: f"{totals[arm] / totals[first]:.3g}" for arm in others}
        if scaled := [f"{arm} = {factor} × {first}" for arm, factor in factors.items() if factor != "1"]:
            sentences.append(f"Expected weights of the MSE that are proportional at every t: {_listed(scaled)}.")
    if learned:
        sentences.append(
            f"The density of {_listed(learned)} is learned during training; the figure shows its initial values."
        )
    sentences.append("Colours of the tables: purple for less than uniform draws, orange for more.")
    return "\n".join(textwrap.fill(sentence, CAPTION_CHARACTERS) for sentence in sentences)


def _equal(lines: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Returns each group of two or more arms whose curves are equal up to rounding."""
    groups: list[list[str]] = []
    for arm, line in lines.items():
        same = (g for g in groups if np.allclose(line, lines[g[0]], rtol=1e-9, atol=0, equal_nan=True))
        if group := next(same, None):
            group.append(arm)
        else:
            groups.append([arm])
    return [group for group in groups if len(group) > 1]


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
