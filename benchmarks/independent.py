"""Statistics of two arms, computed from their definitions with code that shares nothing with the analysis."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage")
DIFFERENCES = ("kid", "memorised", *HIGHER_IS_BETTER)
Pairs = list[tuple[float, float]]


def never_rising(levels: list[float]) -> list[float]:
    """Pool adjacent violators: neighbours that rise are replaced by their mean, until none rises."""
    blocks: list[list[float]] = []
    for level in levels:
        blocks.append([level])
        while len(blocks) > 1 and np.mean(blocks[-1]) > np.mean(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    return [float(np.mean(block)) for block in blocks for _ in block]


def arrival(images: list[float], levels: list[float], threshold: float) -> tuple[float, float]:
    """Bounds of the images at which a run reaches a threshold for good."""
    sound = [level for level in levels if not np.isnan(level)]
    fit = never_rising(sound) + [np.inf] * (len(levels) - len(sound))
    late = [k for k, level in enumerate(fit) if level > threshold]
    if not late:
        return 0.0, min(image for image in images if image > 0)
    if late[-1] == len(fit) - 1:
        return images[-1], np.inf
    before, after = late[-1], late[-1] + 1
    share = (fit[before] - threshold) / (fit[before] - fit[after])
    if images[before] == 0:
        exact = share * images[after]
    else:
        exact = np.exp((1 - share) * np.log(images[before]) + share * np.log(images[after]))
    return exact, exact


def average(images: np.ndarray, levels: np.ndarray) -> float:
    """The area under the trapezoids between checkpoints, divided by their range."""
    if len(images) == 1:
        return levels[0]
    return sum((images[1:] - images[:-1]) * (levels[1:] + levels[:-1]) / 2) / (images[-1] - images[0])


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and ends of the t-interval."""
    if len(values) < 2:
        return (values[0] if values else np.nan), -np.inf, np.inf
    mean, error = np.mean(values), np.sqrt(np.var(values, ddof=1) / len(values))
    half = stats.t.isf((1 - confidence) / 2, len(values) - 1) * error
    return mean, mean - half, mean + half


def censored_interval(pairs: Pairs) -> tuple[float, float, float]:
    """Centre and ends of the 95% interval of values of which some are known only up to bounds."""
    if all(low == high for low, high in pairs):
        return interval([low for low, _ in pairs])
    medians = {float(np.median(side)) for side in zip(*pairs, strict=True)}
    mirrored = [(-high, -low) for low, high in pairs]
    return medians.pop() if len(medians) == 1 else np.nan, lower_end(pairs), -lower_end(mirrored)


def lower_end(pairs: Pairs) -> float:
    """The lower end: from the smallest values at worst, or from the sign test if some value has no lower bound."""
    size, dropped = len(pairs), sum(high == np.inf for _, high in pairs)
    if dropped > 12 or size - dropped < 2 or any(low == -np.inf for low, _ in pairs):
        fewer = [rank for rank in range(size) if stats.binom.cdf(rank, size, 0.5) < 0.025]
        return sorted(low for low, _ in pairs)[fewer[-1]] if fewer else -np.inf
    samples = np.sort(np.random.default_rng(0).standard_normal((100_000, size)))[:, : size - dropped]
    pivot = np.quantile(samples.mean(axis=1) / samples.std(axis=1, ddof=1), 0.975)
    worst = [sorted(values)[: size - dropped] for values in product(*(sorted({*pair}) for pair in pairs))]
    return min(np.mean(values) - pivot * np.std(values, ddof=1) for values in worst)


class Arms:
    """The runs of two arms in one metric, over the training images that all of them cover."""

    def __init__(self, rows: pd.DataFrame, baseline: str, candidate: str) -> None:
        rows = rows[rows["arm"].isin([baseline, candidate])]
        failures = rows["value"].isna() & rows["reason"].astype(str).str.match("diverged|collapsed")
        rows = rows[np.isfinite(rows["value"]) | failures].sort_values("images")
        self.metric = rows["metric"].iloc[0]
        self.is_ratio = self.metric not in DIFFERENCES and not (rows["value"] <= 0).any()
        runs = {}
        for (arm, seed), run in rows.groupby(["arm", "seed"]):
            if (run["images"] > 0).any():
                runs[arm, seed] = run["images"].to_numpy(), self.level(run["value"].to_numpy())
        self.seeds = sorted(seed for arm, seed in runs if arm == baseline and (candidate, seed) in runs)
        chosen = {(arm, seed): runs[arm, seed] for arm in (baseline, candidate) for seed in self.seeds}
        self.first = max(images[images > 0][0] for images, _ in chosen.values())
        self.last = min(images[-1] for images, _ in chosen.values())
        inside = {image for images, _ in chosen.values() for image in images if self.first <= image <= self.last}
        self.images = np.array(sorted(inside | {self.first, self.last}))
        self.runs, self.levels, self.failed = {}, {}, {}
        for run, (images, levels) in chosen.items():
            kept = images <= self.last
            key = ("candidate" if run[0] == candidate else "baseline"), run[1]
            self.runs[key] = images[kept], levels[kept]
            self.levels[key] = np.interp(self.images, images[kept], levels[kept])
            self.failed[key] = bool(np.isnan(levels[kept]).any())

    def level(self, values: np.ndarray) -> np.ndarray:
        if self.is_ratio:
            return np.log(values)
        return -values if self.metric in HIGHER_IS_BETTER else values

    def value(self, level: float) -> float:
        return float(np.exp(level) if self.is_ratio else -level if self.metric in HIGHER_IS_BETTER else level)

    def of_arm(self, arm: str, numbers: dict) -> list:
        return [numbers[arm, seed] for seed in self.seeds]

    def conclusion(self, low: float, high: float, seeds: list[int]) -> dict[str, Any]:
        """What the interval of a difference in level shows, and the failures: the arm with more is never better."""
        failed = {arm: sum(self.failed[arm, seed] for seed in seeds) for arm in ("baseline", "candidate")}
        shown = "better" if high < 0 else "worse" if low > 0 else "not shown"
        winner, loser = ("candidate", "baseline") if high < 0 else ("baseline", "candidate")
        if failed[winner] > failed[loser]:
            shown = "not shown"
        return {"shown": shown, **{f"failed_{arm}": count for arm, count in failed.items()}}

    def printed(self, estimate: float, low: float, high: float) -> dict[str, float]:
        """The unit of the report: percent for ratios; otherwise the change of the metric itself."""
        if self.is_ratio:
            low = -np.inf if low == -np.inf else 100 * np.expm1(low)
            estimate, high = 100 * np.expm1(estimate), 100 * np.expm1(high)
        elif self.metric in HIGHER_IS_BETTER:
            estimate, low, high = -estimate, -high, -low
        return {"estimate": estimate, "low": low, "high": high}

    def of_level(self, quantity: str, levels: dict[tuple[str, int], float]) -> dict[str, Any]:
        """The effect on a level, from one level per run."""
        pairs = [(levels["baseline", seed], levels["candidate", seed]) for seed in self.seeds]
        known = [(a, b) for a, b in pairs if not np.isnan(a + b)]
        differences = [b - a for a, b in known]
        ends = interval(differences)
        p_value = np.nan
        if len(differences) > 1:
            spread = np.std(differences, ddof=1)
            t = abs(ends[0]) / (spread / np.sqrt(len(differences))) if np.ptp(differences) else np.inf * ends[0] ** 2
            p_value = 1.0 if np.isnan(t) else 2 * stats.t.sf(t, len(differences) - 1)
        means = np.mean(known, axis=0) if known else (np.nan, np.nan)
        kind = {"quantity": quantity, "threshold": np.nan, "unit": "percent" if self.is_ratio else "difference"}
        per_seed = [
            {
                **kind,
                "seed": seed,
                "baseline": self.value(a),
                "candidate": self.value(b),
                **self.printed(*[b - a] * 3),
                **self.conclusion(b - a, b - a, [seed]),
                "p_value": np.nan,
                "pairs": int((a, b) in known),
                "censored": 0,
            }
            for seed, (a, b) in zip(self.seeds, pairs, strict=True)
        ]
        return {
            **kind,
            "baseline": self.value(means[0]),
            "candidate": self.value(means[1]),
            **self.printed(*ends),
            **self.conclusion(*ends[1:], self.seeds),
            "p_value": p_value,
            "pairs": len(known),
            "censored": 0,
            "per_seed": per_seed,
        }

    def of_images(self, threshold: float) -> dict[str, Any]:
        """The effect on the images until a value of the metric."""
        level = self.level(np.float64(threshold))
        times = {key: arrival(*run, level) for key, run in self.runs.items()}
        pairs, per_seed = [], []
        with np.errstate(divide="ignore"):
            for seed in self.seeds:
                base, cand = np.log(times["baseline", seed]), np.log(times["candidate", seed])
                pairs.append((cand[0] - base[1], cand[1] - base[0]))
        kind = {"quantity": "images", "threshold": threshold, "unit": "factor"}
        seen = {key: np.nan if low == 0 else high for key, (low, high) in times.items()}
        for seed, (low, high) in zip(self.seeds, pairs, strict=True):
            per_seed.append(
                {
                    **kind,
                    "seed": seed,
                    "baseline": seen["baseline", seed],
                    "candidate": seen["candidate", seed],
                    "estimate": np.exp(low) if low == high else np.nan,
                    "low": np.exp(low),
                    "high": np.exp(high),
                    **self.conclusion(low, high, [seed]),
                    "p_value": np.nan,
                    "pairs": 1,
                    "censored": int(low < high),
                }
            )
        ends = censored_interval(pairs)
        means = [np.exp(np.mean(np.log(self.of_arm(arm, seen)))) for arm in ("baseline", "candidate")]
        return {
            **kind,
            "baseline": means[0] if np.isfinite(means[0]) else np.nan,
            "candidate": means[1] if np.isfinite(means[1]) else np.nan,
            **dict(zip(("estimate", "low", "high"), map(float, np.exp(ends)), strict=True)),
            **self.conclusion(*ends[1:], self.seeds),
            "p_value": np.nan,
            "pairs": len(pairs),
            "censored": sum(low < high for low, high in pairs),
            "per_seed": per_seed,
        }
