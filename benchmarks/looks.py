"""False alarms of studies in which seeds are added one at a time, and someone looks at the verdict each time.

    python -m benchmarks.looks [--studies 20000]

There is no difference between the arms. Under the first rule, whoever
looks claims a difference as soon as the 95% interval of the averaged level excludes none. Under the second rule, that
of the verdict, nothing is claimed before the planned seeds are complete; they decide, and later seeds are a
replication.
"""

import argparse
import sys

import numpy as np

from benchmarks.simulation import NOISES, effects, outcomes, simulate
from convergence.analysis.curves import mean_over_images
from convergence.analysis.intervals import t_interval

PLANS = (2, 3, 5, 10)
NOISE = NOISES["5%, paired"]
CHUNK = 1000
CLAIMS = ["faster", "slower", "better on average", "worse on average", "curves cross"]


def claims(rng: np.random.Generator, studies: int) -> np.ndarray:
    """Simulate whether each rule claims a difference in the averaged level, [planned seeds, rules, studies]."""
    levels, images = simulate(rng, studies, max(PLANS), 1.0, NOISE)
    averages = mean_over_images(levels[:, :, 1] - levels[:, :, 0], images)
    intervals = [t_interval(averages[:, :seeds]) for seeds in range(2, max(PLANS) + 1)]
    excludes = np.array([(low > 0) | (high < 0) for _, low, high in intervals])
    return np.array(
        [
            (excludes[: seeds - 1].any(axis=0), np.isin(outcomes(effects(levels[:, :seeds], images)), CLAIMS))
            for seeds in PLANS
        ]
    )


def rates(rng: np.random.Generator, studies: int) -> np.ndarray:
    """Simulate the share of studies with a false alarm, [planned seeds, rules]."""
    chunks = [claims(rng, min(CHUNK, studies - first)) for first in range(0, studies, CHUNK)]
    return np.concatenate(chunks, axis=-1).mean(axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.looks", description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=20_000, help="simulated studies")
    studies = parser.parse_args().studies
    sys.stdout.write("| seeds | a claim as soon as the interval excludes 0, % | a claim at the planned seeds, % |\n")
    sys.stdout.write("| --- | --- | --- |\n")
    for seeds, (first, second) in zip(PLANS, rates(np.random.default_rng(0), studies), strict=True):
        sys.stdout.write(f"| {seeds} | {100 * first:.1f} | {100 * second:.1f} |\n")


if __name__ == "__main__":
    main()
