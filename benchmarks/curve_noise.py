"""Noise of curves with one run per arm, and how many paired seeds a difference of 10% would need at this noise.

    python -m benchmarks.curve_noise reports/published/claim/curves.csv --baseline uni05 --candidate under05

The noise of an arm is its residuals from a power law. The paired difference of the average over images has the standard
deviation of the difference of the two arms' residuals, times a factor of the trapezoidal rule: one for residuals that
are independent between checkpoints, one for an autoregressive process with the correlation of neighbouring checkpoints.
"""

import argparse
import sys

import numpy as np
import pandas as pd

from convergence.analysis.power import seeds_needed

EFFECT = np.log(1.1)


def residuals(images: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Logs of the values [K, arms], minus the power law fitted to each column."""
    design = np.column_stack([np.ones(len(images)), np.log(images)])
    levels = np.log(values)
    return levels - design @ np.linalg.lstsq(design, levels, rcond=None)[0]


def factor(images: np.ndarray, correlation: float) -> float:
    """Standard deviation of the trapezoidal mean of an AR(1) process with standard deviation 1 at each checkpoint."""
    weights = np.trapezoid(np.eye(len(images)), images, axis=1) / (images[-1] - images[0])
    steps = np.arange(len(images))
    return float(np.sqrt(weights @ correlation ** np.abs(np.subtract.outer(steps, steps)) @ weights))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve_noise", description=__doc__.splitlines()[0])
    parser.add_argument("curves", help="CSV with the columns study, arm, images and value")
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--candidate", required=True)
    args = parser.parse_args()
    for study, rows in pd.read_csv(args.curves).groupby("study"):
        table = rows.pivot(index="images", columns="arm", values="value")[[args.baseline, args.candidate]]
        images, noise = table.index.to_numpy(float), residuals(table.index.to_numpy(float), table.to_numpy())
        difference = noise[:, 1] - noise[:, 0]
        sds = np.sqrt((np.column_stack([noise, difference]) ** 2).sum(axis=0) / (len(images) - 2))
        neighbours = float(np.corrcoef(difference[:-1], difference[1:])[0, 1])
        sys.stdout.write(
            f"{study}: standard deviations {sds[0]:.3f} and {sds[1]:.3f}, correlation of the arms "
            f"{np.corrcoef(noise.T)[0, 1]:+.2f}; of the difference {sds[2]:.3f}, correlation of neighbouring "
            f"checkpoints {neighbours:+.2f}\n"
        )
        for name, correlation in (("independent checkpoints", 0.0), ("correlated checkpoints", neighbours)):
            sd = sds[2] * factor(images, correlation)
            sys.stdout.write(f"  {name}: sd of the average {sd:.3f}, {seeds_needed(EFFECT, sd)} seeds\n")


if __name__ == "__main__":
    main()
