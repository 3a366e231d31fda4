"""Effects in words: changes, ratios and speed-ups with their intervals."""

from collections.abc import Callable

import numpy as np

from convergence.analysis.effects import Effect, Scale, falls_with_advantage, to_change


def change_text(effect: Effect, metric: str, scale: Scale) -> str:
    """Returns the change of the metric with its interval: "+4.4% (-0.5% to +9.5%)", a difference on the plain scale."""

    def text(advantage: float) -> str:
        change = to_change(advantage, metric, scale)
        return f"{100 * change:+.1f}%" if scale == "log" else f"{change:+.3g}"

    return _with_interval(effect, text, falls_with_advantage(metric, scale))


def ratio_text(effect: Effect) -> str:
    """Returns the candidate's value divided by the baseline's, with its interval. The effect is a logarithm."""
    return _with_interval(effect, lambda advantage: f"{np.exp(-advantage):.3g}", mirrored=True)


def speedup_text(effect: Effect) -> str:
    """Returns the baseline's time divided by the candidate's, with its interval."""
    return _with_interval(effect, lambda advantage: f"{np.exp(advantage):.2f}", mirrored=False)


def size_text(value: float, scale: Scale) -> str:
    """Returns the size of an effect or of a standard deviation, without sign."""
    return f"{100 * np.expm1(value):.2g}%" if scale == "log" else f"{value:.2g}"


def count_text(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 seed", "2 seeds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _with_interval(effect: Effect, text: Callable[[float], str], mirrored: bool) -> str:
    low, high = (effect.high, effect.low) if mirrored else (effect.low, effect.high)
    if np.isinf([low, high]).all():
        interval = "no interval"
        if np.isnan(effect.estimate):
            return "unknown"
    elif np.isinf(high):
        interval = f"{text(low)} or more"
    elif np.isinf(low):
        interval = f"{text(high)} or less"
    else:
        interval = f"{text(low)} to {text(high)}"
    return interval if np.isnan(effect.estimate) else f"{text(effect.estimate)} ({interval})"
