"""The trials of a study: their table, the best values of each arm, and what a verdict states about them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from pydantic import ValidationError

from convergence.analysis.curves import from_level, mean_over_images, to_level
from convergence.analysis.results import Comparison
from convergence.errors import StudyError
from convergence.failures import failed
from convergence.layout import study_file
from convergence.schema import Experiment
from convergence.study_plan import StudyPlan
from convergence.tables import of_average
from convergence.tuning import Tuned, TunedArm, next_value, number_at


def trial_columns(keys: Sequence[str]) -> list[str]:
    """Returns the columns of tuning.csv, given the tuned keys."""
    return ["arm", *keys, "seed", "average", "level", "reason", "best"]


def trials_table(
    metrics: pd.DataFrame, settings: Mapping[str, tuple[str, Mapping[str, float]]], plan: StudyPlan, keys: Sequence[str]
) -> pd.DataFrame:
    """Returns a table with a row per trial and the columns `trial_columns(keys)`.

    The column `average` is the primary metric averaged over the training images that all trials of the arm cover, as in
    the verdict, and `level` is this average on the scale of the comparison, where lower is better. Both are NaN for a
    failed trial, and `reason` states why. `best` marks the best values of each arm.

    Args:
        metrics: the long table of metrics of the trials. Its column `arm` has a label for each arm and its values.
        settings: label -> (arm, tuned values).
        plan: what the study judges by.
        keys: the tuned keys.
    """
    metrics = of_average(metrics, plan.ema)
    rows = metrics[(metrics["features"] == plan.features) & (metrics["metric"] == plan.metric)]
    rows = rows.assign(level=to_level(rows["value"], plan.metric, plan.scale))
    runs = {run: table.sort_values("images") for run, table in rows.groupby(["arm", "seed"], sort=False)}
    levels = {run: table[np.isfinite(table["level"])] for run, table in runs.items() if not failed(table).any()}
    grids = {arm: _common_images(levels, settings, arm) for arm in dict.fromkeys(arm for arm, _ in settings.values())}
    trials = []
    for (label, seed), table in runs.items():
        arm, values = settings[label]
        curve = levels.get((label, seed), table.iloc[:0])
        level = np.array(np.nan)
        if len(curve):
            level = mean_over_images(np.interp(grids[arm], curve["images"], curve["level"]), grids[arm])
        reason = "" if len(curve) else table["reason"].iloc[-1]
        average = from_level(level, plan.metric, plan.scale)
        numbers = {"average": float(average), "level": float(level)}
        trials.append({"arm": arm, **values, "seed": seed, **numbers, "reason": reason})
    table = pd.DataFrame(trials, columns=trial_columns(keys)[:-1])
    best = select(table, keys)
    return table.assign(best=[row.arm in best and best[row.arm] == _values(row, keys) for _, row in table.iterrows()])


def _common_images(
    levels: Mapping[tuple[str, int], pd.DataFrame], settings: Mapping[str, tuple[str, Mapping[str, float]]], arm: str
) -> np.ndarray:
    """Returns the training images [K] at which the trials of an arm are compared: those that all of them cover."""
    known = [table["images"] for (label, _), table in levels.items() if settings[label][0] == arm and len(table)]
    if not known:
        return np.zeros(0)
    first, last = max(images.min() for images in known), min(images.max() for images in known)
    return np.unique([first, last, *(image for images in known for image in images if first < image < last)])


def select(trials: pd.DataFrame, keys: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the best values of each arm: those with the lowest mean level over the seeds.

    Values with a failed trial are never the best. An arm is left out if all its values have one.

    Args:
        trials: table with the columns `arm`, the tuned keys, and `level`, which is NaN for a failed trial. A key that
            an arm does not have is NaN.
        keys: the tuned keys.
    """
    groups = trials.groupby(["arm", *keys], sort=False, dropna=False)["level"]
    means = groups.agg(lambda levels: levels.mean(skipna=False)).dropna().reset_index()
    best = means.loc[means.groupby("arm", sort=False)["level"].idxmin()]
    return {row["arm"]: _values(row, keys) for _, row in best.iterrows()}


def tuned_record(experiment: Experiment, trials: pd.DataFrame) -> Tuned:
    """Returns the best values of each arm, without arms that have a failed trial at all values.

    The arm with the best values has the suffix `_tuned`, unless these values are those of the study.

    Args:
        experiment: the study.
        trials: its table of trials.

    Raises:
        StudyError: the study has no section `tune`.
    """
    tune, file, arms = experiment.tune, study_file(experiment.name), {}
    if tune is None:
        raise StudyError(f"{file}: there is no section tune: add it, as in experiments/fair16.yaml")
    for arm, values in select(trials, experiment.tuned_keys).items():
        run = experiment.run(arm)
        is_own = all(number_at(run, key) == value for key, value in values.items())
        name = arm if is_own else f"{arm}_tuned"
        arms[arm] = TunedArm(arm=name, values=values, add=_extensions(experiment, arm, values))
    return Tuned(study=experiment.name, seeds=tune.seeds, until=tune.until, arms=arms)


def tuning_notes(plan: StudyPlan, comparisons: Sequence[Comparison]) -> list[str]:
    """Returns sentences on a tuned study: whether tuning changes the result, and best values at an edge of the grid."""
    tuned = plan.tuned
    primary = next((comparison for comparison in comparisons if comparison.role == "primary"), None)
    if tuned is None or primary is None:
        return []
    own = {result.arm: arm for arm, result in tuned.arms.items()}
    untuned = (own.get(primary.baseline, primary.baseline), own.get(primary.candidate, primary.candidate))
    notes = []
    if untuned == (primary.baseline, primary.candidate):
        notes.append(f"The values of {tuned.study} are the best of its trials in both arms, so tuning changes nothing.")
    elif primary.outcome != "interim":
        same_metric = [c for c in comparisons if (c.features, c.metric) == (primary.features, primary.metric)]
        notes += [_agreement(primary, c, tuned.study) for c in same_metric if (c.baseline, c.candidate) == untuned]
    return notes + edges(tuned)


def edges(tuned: Tuned) -> list[str]:
    """Returns a sentence for each best value at an edge of the grid, with the value to add."""
    return [
        f"The best {key} of {arm}, {result.values[key]:g}, is at the edge of the grid: add {value:g} to tune.{key} in "
        f"{study_file(tuned.study)} and run convergence tune {tuned.study} again."
        for arm, result in tuned.arms.items()
        for key, value in result.add.items()
    ]


def _agreement(primary: Comparison, untuned: Comparison, study: str) -> str:
    """Returns a sentence on whether the comparison at the values of the study agrees with the primary comparison."""
    result = ": ".join(untuned.sentence())
    if untuned.outcome != primary.outcome:
        return f"At the values of {study} the result is another one: {result}."
    if (untuned.average.estimate > 0) != (primary.average.estimate > 0):
        return f"At the values of {study} the difference has the other sign: {result}."
    return f"At the values of {study} the result is the same: {result}."


def _extensions(experiment: Experiment, arm: str, values: Mapping[str, float]) -> dict[str, float]:
    """Returns the value that extends the grid at each best value that is at an edge, if an arm can have this value."""
    found = {}
    for key, best in values.items():
        value = next_value([trial[key] for trial in experiment.grid(arm)], best)
        if value is None:
            continue
        if isinstance(number_at(experiment.run(arm), key), int):
            value = round(value)
        try:
            experiment.run(arm, {**values, key: value})
        except ValidationError:
            continue  # the edge of the grid is the edge of the range of this key
        found[key] = value
    return found


def _values(row: pd.Series, keys: Sequence[str]) -> dict[str, float]:
    return {key: float(row[key]) for key in keys if pd.notna(row[key])}
