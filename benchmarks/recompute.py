"""Recomputes the numbers of a report from its table of metrics, with code that shares nothing with the analysis.

    python -m benchmarks.recompute reports/openmoji

Prints each number of verdict.json and effects.csv with the recomputed one, and exits with 1 if any differs. The plan is
that of the verdict, which has to equal plan.json if there is one. The mechanism is not recomputed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.independent import HIGHER_IS_BETTER, Arms, average, interval, never_rising

TOLERANCE = 1e-6  # relative; six digits are more than any page prints


def decide(average: str, final: str, images: str, is_same: bool) -> str:
    """The decision table."""
    if average == "not shown":
        if not is_same:
            return "undecided"
        return "the same" if final == images == "not shown" else "the same on average"
    if {"better", "worse"} <= {average, final, images}:
        return "curves cross"
    if images == "not shown":
        return f"{average} on average"
    return {"better": "faster", "worse": "slower"}[average]


def lowest_common_value(arms: Arms) -> float:
    """The lowest value that all runs without failure reach, to four digits, on the side that is easier to reach."""
    ends = [never_rising(list(levels))[-1] for key, (_, levels) in arms.runs.items() if not arms.failed[key]]
    if not ends:
        return np.nan
    value = arms.value(max(ends))
    if value == 0:
        return 0.0
    digit = 10.0 ** (np.floor(np.log10(abs(value))) - 3)
    digits = round(value / digit, 8)  # without rounding errors
    rounded = np.floor(digits) if arms.metric in HIGHER_IS_BETTER else np.ceil(digits)
    return float(f"{rounded * digit:.5g}")


def progress_values(arms: Arms) -> list[float]:
    """The values at 1/4, 1/2 and 3/4 of the baseline's progress in level."""
    sound = [arms.levels["baseline", seed] for seed in arms.seeds if not arms.failed["baseline", seed]]
    if not sound:
        return []
    start, end = np.mean(sound, axis=0)[[0, -1]]
    return [arms.value(start + share * (end - start)) for share in (0.25, 0.5, 0.75)]


def crossing(arms: Arms) -> float:
    """The images where the arm that is better on average last becomes the worse one."""
    sound = [seed for seed in arms.seeds if not arms.failed["baseline", seed] and not arms.failed["candidate", seed]]
    if not sound:
        return np.nan
    difference = np.mean([arms.levels["candidate", s] - arms.levels["baseline", s] for s in sound], axis=0)
    lead = difference if average(arms.images, difference) > 0 else -difference
    for k in range(len(difference) - 2, -1, -1):
        if lead[k] > 0 > lead[k + 1]:
            share = difference[k] / (difference[k] - difference[k + 1])
            return float(arms.images[k] ** (1 - share) * arms.images[k + 1] ** share)
    return np.nan


def in_hours(images: dict[str, Any], baseline: dict[str, float], candidate: dict[str, float]) -> dict[str, Any]:
    """The effect on hours, from that on images and the rows of both arms in cost.csv."""
    seconds = [arm["seconds_per_1000_images"] for arm in (baseline, candidate)]
    hours = images | {
        "quantity": "hours",
        "baseline": images["baseline"] / 1000 * seconds[0] / 3600,
        "candidate": images["candidate"] / 1000 * seconds[1] / 3600,
        **{name: images[name] * seconds[1] / seconds[0] for name in ("estimate", "low", "high")},
    }
    if "per_seed" in images:
        for end, other, sign in (("low", "high", -1), ("high", "low", 1)):
            parts = [images[end], candidate[f"ratio_{end}"], 1 / baseline[f"ratio_{other}"]]
            centres = [images["estimate"], candidate["ratio"], 1 / baseline["ratio"]]
            if np.isnan(images["estimate"]):
                hours[end] = np.prod(parts)
            else:
                with np.errstate(divide="ignore"):
                    distance = np.linalg.norm(np.log(parts) - np.log(centres))
                hours[end] = np.prod(centres) * np.exp(sign * distance)
    more_failed = np.sign(images["failed_candidate"] - images["failed_baseline"])  # such an arm is never better
    is_better, is_worse = hours["high"] < 1 and more_failed <= 0, hours["low"] > 1 and more_failed >= 0
    hours["shown"] = "better" if is_better else "worse" if is_worse else "not shown"
    if "per_seed" in images:
        hours["per_seed"] = [in_hours(seed, baseline, candidate) for seed in images["per_seed"]]
    return hours


def compare(
    rows: pd.DataFrame, plan: dict[str, Any], candidate: str, role: str, costs: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """All numbers of a comparison, named as in verdict.json."""
    arms = Arms(rows, plan["baseline"], candidate)
    is_main = (rows["features"].iloc[0], arms.metric) == (plan["features"], plan["metric"])
    margin = plan["margin"] if is_main else None
    if margin is None and arms.is_ratio:
        margin = 2.0
    if is_main and plan["thresholds"]:
        values = sorted(set(plan["thresholds"]), key=lambda value: -arms.level(np.float64(value)))
        primary = values[(len(values) - 1) // 2]
    else:
        primary = lowest_common_value(arms)
        values = sorted({*progress_values(arms), primary}, key=lambda value: -arms.level(np.float64(value)))
        values = [value for value in values if not np.isnan(value)]
    means = {key: average(arms.images, levels) for key, levels in arms.levels.items()}
    a = arms.of_level("average", means)
    e = arms.of_level("final", {key: levels[-1] for key, levels in arms.levels.items()})
    times = [arms.of_images(value) for value in values]
    s = next((effect for effect in times if effect["threshold"] == primary), None)
    if s and {plan["baseline"], candidate} <= costs.keys():
        times.append(in_hours(s, costs[plan["baseline"]], costs[candidate]))
    pairs = [(means["baseline", seed], means["candidate", seed]) for seed in arms.seeds]
    known = np.array([pair for pair in pairs if not np.isnan(sum(pair))]).reshape(-1, 2)
    ends = arms.printed(*interval(list(known[:, 1] - known[:, 0]), 0.9))
    is_same = margin is not None and -margin <= ends["low"] and ends["high"] <= margin
    is_level = a["failed_baseline"] == a["failed_candidate"]
    outcome = decide(a["shown"], e["shown"], s["shown"] if s else "not shown", is_same and is_level)
    gaps = [abs(arms.levels["baseline", seed] - arms.levels["candidate", seed]).max() for seed in arms.seeds]
    if max(gaps) < 1e-9:
        outcome = "identical"
    several = len(known) > 1
    sds = known.std(axis=0, ddof=1) if several else [np.nan, np.nan]
    return {
        "features": rows["features"].iloc[0],
        "metric": arms.metric,
        "baseline": plan["baseline"],
        "candidate": candidate,
        "role": role,
        "scale": "ratio" if arms.is_ratio else "difference",
        "first_images": arms.first,
        "last_images": arms.last,
        "seeds": arms.seeds,
        "effects": [a, e, *times],
        "primary_threshold": primary,
        "margin": margin,
        "average_90": [ends["low"], ends["high"]],
        "within_margin": is_same,
        "outcome": outcome,
        "cross_images": crossing(arms),
        "noise": {
            "between": list(sds),
            "paired": np.std(known[:, 1] - known[:, 0], ddof=1) if several else np.nan,
        },
    }


def study(metrics: pd.DataFrame, plan: dict[str, Any], costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """All comparisons of a study, and the sensitivity of the primary one."""
    is_planned = metrics["seed"].isin(plan["seeds"] or metrics["seed"])
    planned, later = metrics[is_planned], metrics[~is_planned]
    if plan["last_step"] is not None:
        planned = planned[planned["step"] <= plan["last_step"]]
    pairs = [(plan["baseline"], candidate) for candidate in plan["candidates"]]
    pairs += [(pair["baseline"], pair["candidate"]) for pair in plan.get("also", [])]
    comparisons = []
    for (features, metric), rows in planned.groupby(["features", "metric"], sort=False):
        for baseline, candidate in pairs:
            compared = (features, metric, baseline, candidate)
            is_primary = compared == (plan["features"], plan["metric"], plan["baseline"], plan["candidate"])
            if has_pairs(rows, baseline, candidate):
                role = "primary" if is_primary else "secondary"
                comparisons.append(compare(rows, plan | {"baseline": baseline}, candidate, role, costs))
    secondary = [c for c in comparisons if c["role"] == "secondary" and not np.isnan(c["effects"][0]["p_value"])]
    secondary.sort(key=lambda c: c["effects"][0]["p_value"])
    for comparison in comparisons:
        comparison["p_holm"] = np.nan
    for place, comparison in enumerate(secondary):
        steps = [(len(secondary) - k) * secondary[k]["effects"][0]["p_value"] for k in range(place + 1)]
        comparison["p_holm"] = min(1.0, max(steps))
    if plan["seeds"] and plan["last_step"] is not None:
        ends = metrics[metrics["step"] == plan["last_step"]]
        evaluated = {*zip(ends["arm"], ends["seed"], strict=True)}
        if not {*product((plan["baseline"], plan["candidate"]), plan["seeds"])} <= evaluated:
            for comparison in comparisons:
                if comparison["role"] == "primary":
                    comparison["outcome"] = "interim"
    later = later[(later["features"] == plan["features"]) & (later["metric"] == plan["metric"])]
    if has_pairs(later, plan["baseline"], plan["candidate"]):
        comparisons.append(compare(later, plan, plan["candidate"], "replication", costs) | {"p_holm": np.nan})
    return {"comparisons": comparisons, "sensitivity": sensitivity(planned, plan)}


def of_averages(metrics: pd.DataFrame, plan: dict[str, Any], costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The comparisons with the primary average of the weights, and two endpoints with each other average."""
    if "ema" not in metrics:
        return study(metrics, plan, costs)
    tables = dict(list(metrics.groupby("ema", sort=False)))
    found = study(tables.pop(plan["ema"]), plan, costs)
    for name, table in tables.items():
        rows = study(table, plan, costs)["sensitivity"]
        kept = [row for row in rows if row["endpoint"] in ("average over images", "last checkpoint")]
        found["sensitivity"] += [row | {"endpoint": f"{row['endpoint']}, {name}"} for row in kept]
    return found


def has_pairs(rows: pd.DataFrame, baseline: str, candidate: str) -> bool:
    """Whether a seed has values of both arms after the start of training."""
    seeds = [{*rows.loc[(rows["arm"] == arm) & (rows["images"] > 0), "seed"]} for arm in (baseline, candidate)]
    return bool(seeds[0] & seeds[1])


def sensitivity(planned: pd.DataFrame, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The primary comparison by other endpoints, in every metric."""
    found = []
    for (features, metric), rows in planned.groupby(["features", "metric"], sort=False):
        if not has_pairs(rows, plan["baseline"], plan["candidate"]):
            continue
        arms = Arms(rows, plan["baseline"], plan["candidate"])
        images, half = arms.images, arms.images[-1] / 2
        late = np.array([max(half, images[0]), *images[images > half]]) if half >= images[0] else images
        endpoints = {
            "average over images": {key: average(images, levels) for key, levels in arms.levels.items()},
            "average over log images": {key: average(np.log(images), levels) for key, levels in arms.levels.items()},
            "average over the last half": {
                key: average(late, np.interp(late, images, levels)) for key, levels in arms.levels.items()
            },
            "last checkpoint": {key: levels[-1] for key, levels in arms.levels.items()},
        }
        effects = {name: arms.of_level(name, levels) for name, levels in endpoints.items()}
        for share, value in zip((25, 50, 75), progress_values(arms), strict=False):
            effects[f"images to {share}% of the progress"] = arms.of_images(value)
        kept = ("unit", "estimate", "low", "high", "shown")
        names = {"features": features, "metric": metric}
        found += [{"endpoint": name, **names, **{key: effect[key] for key in kept}} for name, effect in effects.items()]
    return found


def differences(recorded: Any, recomputed: Any, path: str) -> Iterator[tuple[str, Any, Any, float]]:
    """Each number and word of the recomputed data with the recorded one, and their relative difference."""
    if isinstance(recomputed, dict):
        for key, value in recomputed.items():
            yield from differences(recorded.get(key, "missing"), value, f"{path} {key}")
    elif isinstance(recomputed, list):
        if len(recorded) != len(recomputed):
            yield f"{path} length", len(recorded), len(recomputed), np.inf
        for index, (theirs, ours) in enumerate(zip(recorded, recomputed, strict=False)):
            name = ours.get("quantity") or ours.get("endpoint") if isinstance(ours, dict) else None
            yield from differences(theirs, ours, f"{path}[{name or index}]")
    elif isinstance(recomputed, str | bool | None):
        yield path, recorded, recomputed, 0.0 if recorded == recomputed else np.inf
    else:
        theirs, ours = float("nan" if recorded in (None, "missing") else recorded), float(recomputed)
        both = np.isnan([theirs, ours])
        is_equal = theirs == ours or (both.all() and recorded not in (None, "missing"))
        yield (
            path,
            theirs,
            ours,
            0.0 if is_equal else np.inf if both.any() else abs(theirs - ours) / max(abs(ours), 1e-3),
        )


def name_of(comparison: dict[str, Any]) -> str:
    return " ".join(comparison[key] for key in ("role", "features", "metric", "baseline", "candidate"))


def table_rows(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of effects.csv that a comparison gives, by name."""
    shared = {key: comparison[key] for key in ("p_holm", "first_images", "last_images", "baseline")}
    rows = {}
    for effect in comparison["effects"]:
        for part in (*effect["per_seed"], effect):
            numbers = {key: value for key, value in part.items() if key not in ("per_seed", "seed", "threshold")}
            arms = {f"of_{arm}": numbers.pop(arm) for arm in ("baseline", "candidate")}
            place = effect["quantity"], effect.get("threshold", np.nan), part.get("seed", "all")
            rows[row_name(comparison, *place)] = shared | numbers | arms
    return rows


def recorded_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of effects.csv by the same names."""
    rows = pd.read_csv(path, dtype={"seed": "Int64"}).to_dict("records")
    places = [(row["quantity"], row["threshold"], "all" if pd.isna(row["seed"]) else row["seed"]) for row in rows]
    return {row_name(row, *place): row for row, place in zip(rows, places, strict=True)}


def row_name(row: dict[str, Any], quantity: str, threshold: float, seed: int | str) -> str:
    return f"{name_of(row)} {quantity} {threshold:.6g} seed {seed}"


def check(directory: Path, metrics: Path) -> Iterator[tuple[str, Any, Any, float]]:
    """Each recorded number of a report with the recomputed one, and their relative difference."""
    verdict = json.loads((directory / "verdict.json").read_text())
    table = pd.read_csv(metrics, dtype={"study": str, "arm": str})
    table = table[table["study"] == verdict["study"]]
    table = pd.DataFrame({"reason": "", "seed": 0} | dict(table.items()))
    plan, path = verdict["plan"], directory / "cost.csv"
    if (directory / "plan.json").exists():
        yield from differences(json.loads((directory / "plan.json").read_text()), plan, "plan.json")
    costs = pd.read_csv(path, dtype={"arm": str}).set_index("arm").to_dict("index") if path.exists() else {}
    found = of_averages(table, plan, costs)
    names = {name_of(comparison): comparison for comparison in verdict["comparisons"]}
    recomputed = {name_of(comparison): comparison for comparison in found["comparisons"]}
    yield from differences(sorted(names), sorted(recomputed), "verdict.json comparisons")
    yield from differences(names, recomputed, "verdict.json")
    primary = [c["outcome"] for c in found["comparisons"] if c["role"] == "primary"]
    yield from differences(verdict["outcome"], primary[0] if primary else None, "verdict.json outcome")
    yield from differences(verdict["sensitivity"], found["sensitivity"], "verdict.json sensitivity")
    rows = {name: row for comparison in found["comparisons"] for name, row in table_rows(comparison).items()}
    recorded = recorded_rows(directory / "effects.csv")
    yield from differences(sorted(recorded), sorted(rows), "effects.csv rows")
    yield from differences(recorded, rows, "effects.csv")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="directory with verdict.json, effects.csv and metrics.csv")
    parser.add_argument("--metrics", type=Path, help="the table of metrics, if it is not metrics.csv in the directory")
    args = parser.parse_args()
    wrong = total = 0
    for name, recorded, recomputed, difference in check(args.report, args.metrics or args.report / "metrics.csv"):
        is_wrong = difference > TOLERANCE
        wrong, total = wrong + is_wrong, total + 1
        sys.stdout.write(f"{name}: {recorded}, {recomputed}, {difference:.1g}{' DIFFERS' if is_wrong else ''}\n")
    sys.stdout.write(f"{total} numbers, {wrong} differ\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
