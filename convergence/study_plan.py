"""Records the plan of a study in `results/<study>/plan.json`.

The plan contains the choices that decide the verdict. An analysis that is chosen after the results are known can be
chosen to give the wanted result. Therefore, the plan can change only until the first checkpoint of the study is
evaluated.
"""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from convergence import layout
from convergence.schema import DEFAULT_MARGIN, Experiment, Pair
from convergence.tables import DIFFERENCES
from convergence.tuning import Tuned
from diffusion.averages import average_name
from diffusion.errors import FileError
from diffusion.files import atomic_write
from diffusion.section import Section


class StudyPlan(Section):
    """The choices that decide the verdict of a study: arms, features, metric, thresholds, margin and seeds."""

    baseline: str
    candidates: tuple[str, ...]
    candidate: str
    """Candidate of the primary comparison. The comparisons of the other candidates are secondary."""
    also: tuple[Pair, ...] = ()
    """Further pairs of arms, whose comparisons are secondary."""
    features: str
    metric: str
    """Metric of the primary comparison."""
    ema: str | None = None
    """Average of the weights in the primary comparison; None: the first one of each arm."""
    endpoint: Literal["average over training images"] = "average over training images"
    thresholds: tuple[float, ...] | None
    """Values of the primary metric that runs must reach; None: a fixed rule chooses a value from the runs."""
    margin: float | None
    """Margin of equivalence: in percent if the primary metric is compared by ratios, otherwise in units of the \
metric."""
    seeds: tuple[int, ...] | None
    """Planned seeds, whose runs decide the verdict; None: all seeds."""
    last_step: int | None
    """Step of the last planned checkpoint; None: the last step that all runs have."""
    tuned: Tuned | None = None
    """Trials that the arms follow from."""
    runs: dict[str, str] = {}
    """Name of each compared arm -> hash of the settings of its runs."""
    evaluation: str = ""
    """Hash of the settings with which checkpoints are sampled and evaluated."""
    after_results: bool = False
    """Whether the plan was recorded after the first checkpoint had been evaluated."""

    @property
    def scale(self) -> Literal["ratio", "difference"]:
        """Scale on which the primary metric is compared: ratios or differences of its values."""
        return "difference" if self.metric in DIFFERENCES else "ratio"

    @property
    def pair(self) -> tuple[str, str]:
        """(baseline, candidate) of the primary comparison."""
        return self.baseline, self.candidate

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(baseline, candidate) of every comparison."""
        candidates = [(self.baseline, candidate) for candidate in self.candidates]
        return candidates + [(pair.baseline, pair.candidate) for pair in self.also]


def current_plan(experiment: Experiment) -> StudyPlan | None:
    """Returns the plan in the present study file, even if another plan is recorded.

    The result is None if the study has no section `compare`.
    """
    compare = experiment.compare
    if compare is None:
        return None
    margin = compare.margin
    if compare.primary.metric not in DIFFERENCES:
        margin = str(margin or DEFAULT_MARGIN).removesuffix("%")
    plan = StudyPlan(
        baseline=compare.baseline,
        candidates=compare.candidates,
        also=compare.also,
        candidate=compare.primary.candidate,
        features=experiment.evaluate.features[0],
        metric=compare.primary.metric,
        ema=average_name(experiment.evaluate.ema[0]) if experiment.evaluate.ema else None,
        thresholds=compare.thresholds,
        margin=None if margin is None else float(margin),
        seeds=compare.planned_seeds or experiment.seeds,
        last_step=experiment.steps[-1],
        tuned=experiment.tuned,
        evaluation=_evaluation(experiment),
    )
    arms = dict.fromkeys(arm for pair in plan.pairs for arm in pair)
    return plan.model_copy(update={"runs": {arm: experiment.run(arm).hash8 for arm in arms}})


def plan_in_force(experiment: Experiment) -> StudyPlan | None:
    """Returns the plan that decides the verdict; None if the study has no section `compare`.

    Until the first checkpoint of the study is evaluated, this is the plan in the study file. Afterwards, this is the
    recorded plan. If results exist but no plan is recorded, the plan in the study file is returned with `after_results`
    set.

    Raises:
        FileError: the recorded plan is damaged.
    """
    plan, path = current_plan(experiment), layout.plan_path(experiment.name)
    if plan is None or not _has_results(experiment):
        return plan
    if not path.exists():
        return plan.model_copy(update={"after_results": True})
    recorded = _recorded(path)
    if recorded.ema is None and experiment.evaluate.ema:
        # The study measured the first average of each arm. The table now names averages.
        first = average_name(experiment.run(recorded.baseline).train.averages[0])
        return recorded.model_copy(update={"ema": first})
    return recorded


def record_plan(experiment: Experiment) -> None:
    """Writes the plan that `plan_in_force` returns to `results/<study>/plan.json`.

    Until the first checkpoint of the study is evaluated, each call replaces the plan that is recorded in this file.
    """
    if plan := plan_in_force(experiment):
        path = layout.plan_path(experiment.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(plan.model_dump_json(indent=1).encode() + b"\n")


def plan_changes(frozen: StudyPlan, current: StudyPlan) -> tuple[str, ...]:
    """Returns a sentence for each difference between the recorded plan and the plan in the study file.

    One more sentence is returned if the plan was recorded after results existed.
    """
    changes = [
        f"{name} was {_text(planned)} and is {_text(now)} in the study file."
        for name, planned in frozen
        if name != "after_results" and (now := getattr(current, name)) != planned
    ]
    late = "The plan was recorded after results existed: nothing shows that it was made before them."
    return tuple([late, *changes] if frozen.after_results else changes)


def _evaluation(experiment: Experiment) -> str:
    """Returns a hash of the settings of sampling and metrics.

    The keys `sample.keep` and `evaluate.weights` are left out, because they do not change any value.
    """
    sample = experiment.sample.model_copy(update={"keep": False}).canonical()
    evaluate = experiment.evaluate.model_copy(update={"weights": {}}).canonical()
    return hashlib.sha256((sample + evaluate).encode()).hexdigest()[:8]


def _has_results(experiment: Experiment) -> bool:
    """Returns whether a checkpoint is evaluated. Trials do not count, because the verdict does not use their seeds.

    Seeds of a recorded plan always count, so that an edit of `tune.seeds` does not reopen the plan.
    """
    trials = {f"seed{seed}" for seed in (experiment.tune.seeds if experiment.tune else ())}
    path = layout.plan_path(experiment.name)
    if trials and path.exists():
        trials -= {f"seed{seed}" for seed in _recorded(path).seeds or ()}
    found = (layout.RESULTS / experiment.name).glob("*/seed*/step*/metrics.csv")
    return any(path.parents[1].name not in trials for path in found)


def _recorded(path: Path) -> StudyPlan:
    """Returns the plan in a file.

    Raises:
        FileError: the file is damaged.
    """
    try:
        return StudyPlan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise FileError(path, f"is not the plan of a study ({error.errors()[0]['msg']})") from None


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {content}" for name, content in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "unset" if value is None else str(value)
