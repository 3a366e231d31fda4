"""Effects in words: numbers with their units and intervals, as reports print them."""

from collections.abc import Callable

import numpy as np

from convergence.analysis.effects import Effect, Scale, Unit

UNKNOWN = "unknown"


def effect_text(effect: Effect, context: str = "") -> str:
    """Returns an effect with its interval: "-6.0% (-7.1 to -4.9)", "0.70 (0.61 to 0.80)" or "+0.012 (...)".

    Args:
        effect: the effect.
        context: words between the estimate and its interval, such as "on average".
    """
    return interval_text(effect.estimate, effect.low, effect.high, effect.unit, context)


def interval_text(estimate: float, low: float, high: float, unit: Unit, context: str = "") -> str:
    """Returns an estimate with its interval in a printed unit; "unknown" if neither estimate nor bounds are known."""
    text = NUMBERS[unit]
    no_low, no_high = not low > (0 if unit == "factor" else -np.inf), not high < np.inf  # also for NaN
    if no_low and no_high:
        interval = "no interval"
    elif no_high:
        interval = f"{text(low)} or more"
    elif no_low:
        interval = f"{text(high)} or less"
    else:
        interval = f"{text(low)} to {text(high)}"
    if np.isnan(estimate):
        return " ".join([UNKNOWN if no_low and no_high else interval, context]).rstrip()
    return " ".join(filter(None, [number_text(estimate, unit), context, f"({interval})"]))


def number_text(value: float, unit: Unit) -> str:
    """Returns one number in a printed unit: "-6.0%", "0.70" or "+0.012"."""
    return NUMBERS[unit](value) + ("%" if unit == "percent" else "")


def margin_text(margin: float, scale: Scale) -> str:
    """Returns a margin of equivalence, such as "2%"."""
    return f"{margin:g}%" if scale == "ratio" else f"{margin:g}"


def size_text(value: float, scale: Scale) -> str:
    """Returns the size, without sign, of a difference in level or of a standard deviation of such differences."""
    return f"{100 * np.expm1(value):.2g}%" if scale == "ratio" else f"{value:.2g}"


def count_text(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 seed", "2 seeds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _signed(digits: str) -> Callable[[float], str]:
    # Adding 0 turns -0.0 into 0.0: a number that rounds to zero has no sign of its own.
    return lambda value: format(float(format(value, digits)) + 0.0, f"+{digits}")


NUMBERS: dict[Unit, Callable[[float], str]] = {
    "percent": _signed(".1f"),
    "difference": _signed(".3g"),
    "factor": lambda value: f"{value:.2f}",
}
