import numpy as np
import pytest

from convergence.analysis.wording import count_text, interval_text, margin_text, size_text


@pytest.mark.parametrize(
    ("estimate", "low", "high", "unit", "text"),
    [
        (-6.04, -7.1, -4.9, "percent", "-6.0% (-7.1 to -4.9)"),
        (-0.04, -7.1, 4.9, "percent", "+0.0% (-7.1 to +4.9)"),  # no -0.0
        (0.0123, -np.inf, 0.02, "difference", "+0.0123 (+0.02 or less)"),
        (0.7, 0.61, 0.8, "factor", "0.70 (0.61 to 0.80)"),
        (0.7, 0.61, np.inf, "factor", "0.70 (0.61 or more)"),
        (0.7, 0.0, np.inf, "factor", "0.70 (no interval)"),
        (np.nan, 0.0, 0.8, "factor", "0.80 or less"),
        (np.nan, 0.0, np.inf, "factor", "unknown"),
        (np.nan, -np.inf, np.inf, "percent", "unknown"),
    ],
)
def test_intervals_in_words(estimate, low, high, unit, text):
    assert interval_text(estimate, low, high, unit) == text


def test_sizes_margins_and_counts_in_words():
    assert (size_text(np.log(1.2), "ratio"), size_text(0.0123, "difference")) == ("20%", "0.012")
    assert (margin_text(2.0, "ratio"), margin_text(0.001, "difference")) == ("2%", "0.001")
    assert (count_text(1, "seed"), count_text(2, "seed")) == ("1 seed", "2 seeds")
