"""The plan of a study: what its verdict judges by, recorded in `results/<study>/plan.json` before the first result.

An analysis that is chosen after results were seen can be chosen to give the wanted result. So the plan may change until
the first checkpoint of the study is evaluated, and is frozen from then on.
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from convergence import layout
from convergence.schema import DEFAULT_MARGIN, Experiment
from convergence.tables import DIFFERENCES
from diffusion.errors import FileError
from diffusion.files import atomic_write
from diffusion.section import Section


class StudyPlan(Section):
    """What the verdict of a study judges by."""

    baseline: str
    candidates: tuple[str, ...]
    candidate: str
    """Of the primary comparison; the other candidates are secondary."""
    features: str
    metric: str
    """Of the primary comparison."""
    endpoint: Literal["average over training images"] = "average over training images"
    thresholds: tuple[float, ...] | None
    """Values of the primary metric; None: derived from the runs by a fixed rule."""
    margin: float | None
    """Margin of equivalence: in percent if the primary metric is compared by ratios, otherwise a change of it."""
    seeds: tuple[int, ...] | None
    """The planned seeds, which decide; None: all."""
    last_step: int | None
    """Step of the last planned checkpoint; None: the last one that all runs have."""
    after_results: bool = False
    """Whether the plan was recorded after the first checkpoint had been evaluated."""

    @property
    def scale(self) -> Literal["ratio", "difference"]:
        """How the primary metric is compared."""
        return "difference" if self.metric in DIFFERENCES else "ratio"


def current_plan(experiment: Experiment) -> StudyPlan | None:
    """Returns the plan that follows from a study, whatever was recorded; None if the study has no section `compare`."""
    compare = experiment.compare
    if compare is None:
        return None
    margin = compare.margin
    if compare.primary.metric not in DIFFERENCES:
        margin = str(margin or DEFAULT_MARGIN).removesuffix("%")
    return StudyPlan(
        baseline=compare.baseline,
        candidates=compare.candidates,
        candidate=compare.primary.candidate,
        features=experiment.evaluate.features[0],
        metric=compare.primary.metric,
        thresholds=compare.thresholds,
        margin=None if margin is None else float(margin),
        seeds=compare.planned_seeds or experiment.seeds,
        last_step=experiment.steps[-1],
    )


def frozen_plan(experiment: Experiment) -> StudyPlan | None:
    """Returns the plan that the verdict judges by: the recorded one if a checkpoint of the study was evaluated.

    Raises:
        FileError: the recorded plan is damaged.
    """
    plan, path = current_plan(experiment), layout.plan_path(experiment.name)
    if plan is None or not _has_results(experiment.name):
        return plan
    if not path.exists():
        return plan.model_copy(update={"after_results": True})
    try:
        return StudyPlan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise FileError(path, f"is not the plan of a study ({error.errors()[0]['msg']})") from None


def freeze_plan(experiment: Experiment) -> None:
    """Records the plan. While no checkpoint of the study is evaluated, this replaces what was recorded before."""
    if plan := frozen_plan(experiment):
        path = layout.plan_path(experiment.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_plan(plan, path)


def write_plan(plan: StudyPlan, path: Path) -> None:
    """Writes a plan as JSON."""
    with atomic_write(path) as file:
        file.write(plan.model_dump_json(indent=1).encode() + b"\n")


def plan_changes(frozen: StudyPlan, current: StudyPlan) -> tuple[str, ...]:
    """Returns a sentence for each difference between the recorded plan and the study file."""
    changes = [
        f"{name} was {_text(planned)} and is {_text(now)} in the study file."
        for name, planned in frozen
        if name != "after_results" and (now := getattr(current, name)) != planned
    ]
    late = "The plan was recorded after results existed: nothing shows that it was made before them."
    return tuple([late, *changes] if frozen.after_results else changes)


def _has_results(study: str) -> bool:
    return any((layout.RESULTS / study).glob("*/seed*/step*/metrics.csv"))


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "unset" if value is None else str(value)
