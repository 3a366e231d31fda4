"""The figure of the schedules: which timesteps the arms of a study draw, how they weight them, what both come to."""

import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from convergence.figures.style import STYLE, draw_legend, line_style, save_figure
from diffusion.checkpoints import noise_schedule
from diffusion.config import RunConfig
from diffusion.gaussian import NoiseSchedule
from diffusion.schemes import Tables, scheme_tables

TENTHS = 10
TIME = "t  (0: least noise)"
WIDTH_INCHES = 12.0
CURVES_INCHES = 6.0
ARM_INCHES = 0.27
LINE_INCHES = 0.16
CAPTION_CHARACTERS = 165
LINE_WIDTHS = (3.2, 1.5)  # of the first and the last arm: the lower of two equal curves shows beside the upper
MARKERS_PER_LINE = 5
LOG_AXIS_FROM_RATIO = 20
LOG_AXIS_REACH = 1e3
SHARES_NORM = LogNorm(1 / 8, 8)  # against uniform draws, which are white
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue (ITU-R BT.709)


class Curves(NamedTuple):
    """What one arm draws and weights, over t; each [T] float64."""

    draws: np.ndarray
    """T p_t: 1 is uniform, the mean is 1."""
    weight: np.ndarray
    """w_t of the mse; NaN where t is never drawn, since no weight acts there."""
    product: np.ndarray
    """T p_t w_t: what the expected gradient of the mse at t is multiplied by, against uniform draws unweighted."""


def curves(tables: Tables) -> Curves:
    """The curves of an arm, from its tables on the CPU."""
    draws = len(tables.probabilities) * tables.probabilities.numpy()
    weight = np.where(draws > 0, tables.mse_weight.numpy(), np.nan)
    return Curves(draws, weight, np.nan_to_num(draws * weight))


def tenths(values: np.ndarray) -> np.ndarray:
    """Share of the sum of values [T] that lies in each tenth of the timesteps, [10], from t = 0 on; sums to 1."""
    tenth = TENTHS * np.arange(len(values)) // len(values)
    return np.bincount(tenth, values, TENTHS) / values.sum()


def draw_schedules(runs: Iterable[tuple[str, str, RunConfig]], paths: list[Path]) -> None:
    """Draw how the arms of each study draw and weight timesteps, and save it to each path.

    A study is a block: the density, the weight of the mse and their product against t, the same against log SNR, and
    the share of each tenth of the timesteps in the draws and in the expected weight. Against log SNR a density is one
    per unit of log SNR, p_t / |d log SNR / dt| (Kingma & Gao 2023, arXiv 2303.00848, sec. 2); a weight is the same
    function at other abscissae. A density that is learnt is drawn as it starts. Equal runs give equal bytes.

    Args:
        runs: (study, arm, run), in the order in which arms get their styles.
        paths: where to save; the suffix chooses the format ("png", "svg", "pdf").
    """
    studies: dict[str, tuple[NoiseSchedule, dict[str, Tables]]] = {}
    adaptive = []
    for study, arm, run in runs:
        schedule = noise_schedule(run.diffusion)
        studies.setdefault(study, (schedule, {}))[1][arm] = scheme_tables(schedule, run.scheme, run.match)
        if run.scheme.timesteps.learned:
            adaptive.append((study, arm))
    with matplotlib.rc_context(STYLE):
        save_figure(_draw_figure(studies, adaptive), paths)


def _draw_figure(
    studies: Mapping[str, tuple[NoiseSchedule, Mapping[str, Tables]]], adaptive: Collection[tuple[str, str]]
) -> Figure:
    """The figure of studies, each with its noise schedule and the tables of its arms; the densities of `adaptive`,
    (study, arm), change during training."""
    arms = list(dict.fromkeys(arm for _, tables in studies.values() for arm in tables))
    widths = np.linspace(*LINE_WIDTHS, len(arms))
    styles = {
        arm: {**line_style(index), "linewidth": widths[index], "markersize": 5, "zorder": 2 + index / len(arms)}
        for index, arm in enumerate(arms)
    }
    drawn = {study: {arm: curves(t) for arm, t in tables.items()} for study, (_, tables) in studies.items()}
    captions = {
        study: _caption(of_arms, [arm for of_study, arm in adaptive if of_study == study])
        for study, of_arms in drawn.items()
    }
    heights = [
        CURVES_INCHES + _shares_inches(len(of_arms)) + 0.6 + LINE_INCHES * captions[study].count("\n")
        for study, of_arms in drawn.items()
    ]
    figure = Figure((WIDTH_INCHES, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    blocks = figure.subfigures(len(studies), squeeze=False, height_ratios=heights)[:, 0]
    for block, (study, (schedule, _)) in zip(blocks, studies.items(), strict=True):
        block.suptitle(f"{study}: {schedule.timesteps:,} timesteps", fontsize=12, weight="bold")
        _draw_block(block, schedule, drawn[study], styles)
        block.supxlabel(captions[study], x=0.02, ha="left", fontsize=9, color="0.25")
    return figure


def _shares_inches(arms: int) -> float:
    return 0.9 + ARM_INCHES * arms


def _draw_block(
    block: SubFigure,
    schedule: NoiseSchedule,
    arms: Mapping[str, Curves],
    styles: Mapping[str, Mapping[str, object]],
) -> None:
    """Draw one study: its legend, six panels of curves, two of shares."""
    upper, lower = block.subfigures(2, 1, height_ratios=(CURVES_INCHES, _shares_inches(len(arms))))
    handles = [Line2D([], [], label=arm, **styles[arm]) for arm in arms]
    draw_legend(upper, handles, WIDTH_INCHES - 1, "outside upper center")

    log_snr = np.log(schedule.snr.numpy())
    per_log_snr = 1 / (schedule.timesteps * np.abs(np.gradient(log_snr)))
    panels = [
        ("How often t is drawn", "T p(t)   (1: uniform)", {arm: c.draws for arm, c in arms.items()}),
        ("Weight of the mse", "w(t)", {arm: c.weight for arm, c in arms.items()}),
        ("Expected weight: draws times weight", "T p(t) w(t)", {arm: c.product for arm, c in arms.items()}),
        ("Draws per unit of log SNR", "p(t) / |d log SNR / dt|",
         {arm: c.draws * per_log_snr for arm, c in arms.items()}),
        ("Weight of the mse", "w(t)", {arm: c.weight for arm, c in arms.items()}),
        ("Expected weight per unit of log SNR", "p(t) w(t) / |d log SNR / dt|",
         {arm: c.product * per_log_snr for arm, c in arms.items()}),
    ]  # fmt: skip
    over_t, over_log_snr = upper.subplots(2, 3)
    for ax, (title, y_label, lines) in zip((*over_t, *over_log_snr), panels, strict=True):
        _draw_lines(ax, np.arange(schedule.timesteps) if ax in over_t else log_snr, lines, arms, styles)
        ax.set(title=title, ylabel=y_label)
    for ax in over_t:
        ax.set_xlabel(TIME)
    for ax in over_log_snr:
        ax.set_xlabel("log SNR  (left: least noise)")
        ax.invert_xaxis()

    shares = {
        "Share of the draws in each tenth of the timesteps, %": [tenths(c.draws) for c in arms.values()],
        "Share of the expected weight in each tenth, %": [tenths(c.product) for c in arms.values()],
    }
    left, right = lower.subplots(1, 2)
    for ax, (title, rows) in zip((left, right), shares.items(), strict=True):
        _draw_shares(ax, np.array(rows), schedule.timesteps)
        ax.set_title(title)
    left.set_yticks(np.arange(len(arms)) + 0.5, arms)
    right.set_yticks([])


def _draw_lines(
    ax: Axes,
    x: np.ndarray,
    lines: Mapping[str, np.ndarray],
    arms: Mapping[str, Curves],
    styles: Mapping[str, Mapping[str, object]],
) -> None:
    every = -(-len(x) // MARKERS_PER_LINE)
    for index, (arm, y) in enumerate(lines.items()):
        # markers of equal curves stand beside each other
        first = int(every * (index + 0.5) / len(lines))
        ax.plot(x, y, markevery=(first, every), markeredgecolor="white", markeredgewidth=0.7, **styles[arm])
    scale, low, high = axis_limits(list(lines.values()), [arms[arm].draws for arm in lines])
    ax.set_ylim(low, high)  # before the scale: fitting it to a deep tail would overflow
    ax.set_yscale(scale)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["top"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True))


def axis_limits(lines: list[np.ndarray], draws: list[np.ndarray]) -> tuple[str, float, float]:
    """Scale ("linear" or "log") and limits of an axis that shows all lines [T], each drawn as often as draws [T] say.

    The median over an arm's draws is its typical value. The axis is logarithmic where a linear one would press some
    arm's typical value onto its floor. It then ends a factor of 1,000 beyond the typical values at most, since tails
    of densities run down to any depth.
    """
    drawn = [(line[line > 0], p[line > 0]) for line, p in zip(lines, draws, strict=True) if (line > 0).any()]
    if not drawn:
        return "linear", 0.0, 1.0
    typical = [np.quantile(line, 0.5, weights=p, method="inverted_cdf") for line, p in drawn]
    lowest, highest = min(line.min() for line, _ in drawn), max(line.max() for line, _ in drawn)
    if highest <= LOG_AXIS_FROM_RATIO * min(typical):
        return "linear", 0.0, 1.08 * highest
    lowest, highest = max(lowest, min(typical) / LOG_AXIS_REACH), min(highest, max(typical) * LOG_AXIS_REACH)
    return "log", lowest / 1.5, highest * 1.5


def _draw_shares(ax: Axes, shares: np.ndarray, timesteps: int) -> None:
    """A table of shares [arms, 10], coloured by how they compare with uniform draws."""
    times_uniform = np.maximum(TENTHS * shares, SHARES_NORM.vmin)
    cells = ax.pcolormesh(times_uniform, cmap="PuOr_r", norm=SHARES_NORM, edgecolors="white")
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


def _caption(arms: Mapping[str, Curves], adaptive: list[str]) -> str:
    """What is seen, in words: draws in the first tenth, curves that lie on each other, products in proportion."""
    by_share: dict[str, list[str]] = {}
    for arm, of_arm in arms.items():
        by_share.setdefault(_percent(tenths(of_arm.draws)[0]), []).append(arm)
    shares = "; ".join(f"{share}% in {_listed(names)}" for share, names in by_share.items())
    timesteps = len(next(iter(arms.values())).draws)
    sentences = [f"Draws with t < {-(-timesteps // TENTHS)}: {shares}."]

    equal = [
        f"{name} of {_listed(group)}"
        for name, field in (("draws", "draws"), ("weight", "weight"), ("expected weight", "product"))
        for group in _equal({arm: getattr(of_arm, field) for arm, of_arm in arms.items()})
    ]
    if equal:
        sentences.append(f"Equal curves, one upon the other: {'; '.join(equal)}.")
    totals = {arm: of_arm.product.sum() for arm, of_arm in arms.items()}
    for first, *others in _equal({arm: of_arm.product / totals[arm] for arm, of_arm in arms.items()}):
        factors = {arm: f"{totals[arm] / totals[first]:.3g}" for arm in others}
        if scaled := [f"{arm} = {factor} × {first}" for arm, factor in factors.items() if factor != "1"]:
            sentences.append(f"Expected weights of the mse in proportion, at every t: {_listed(scaled)}.")
    if adaptive:
        sentences.append(f"The density of {_listed(adaptive)} follows the losses: drawn as it starts.")
    return "\n".join(textwrap.fill(sentence, CAPTION_CHARACTERS) for sentence in sentences)


def _equal(lines: Mapping[str, np.ndarray]) -> list[list[str]]:
    """The arms whose lines are equal up to rounding, in groups of two and more."""
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
