"""What is logged to MLflow, as pure functions of results and studies."""

import csv
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from convergence.schema import Experiment
from convergence.tables import HIGHER_IS_BETTER, markdown_table
from diffusion.config import TRAIN_VERSION, Choice, RunConfig, Scheme
from diffusion.evaluation.weights import INCEPTION

logger = logging.getLogger("convergence.tracking.follow")
UI = "http://127.0.0.1:5000"  # of `make ui`, which serves a store that is no server itself
BATCH_METRICS = 1000  # MLflow takes no more at once
LEGEND = 'Steps are training images seen. The view "Arms" groups the runs by arm, the best one first.'


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file that may be growing: a last line without its newline is left for later."""
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def finite(cell: str | None) -> float | None:
    """The number in a cell, or None where there is nothing to plot: empty, missing, NaN or infinite."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def train_metrics(row: dict[str, str], images: int, last_images: int) -> dict[str, float]:
    """Metrics of a row of log.csv, at `images` of the `last_images` that the study trains for.

    `progress` (0 to 1) is in every row: the newest one in the store tells how far a run was forwarded.
    `time_left_s` is of training alone, at the row's rate.
    """
    columns = row.keys() - {"step", "images", "seconds"}
    values = {f"train/{name}": finite(row[name]) for name in sorted(columns)} | {"progress": images / last_images}
    if rate := values.get("train/images_per_second"):
        values["time_left_s"] = max(last_images - images, 0) / rate
    return {name: value for name, value in values.items() if value is not None}


def eval_metrics(rows: Iterable[dict[str, str]]) -> dict[tuple[str, int], float]:
    """(metric, images) -> value of a checkpoint's metrics.csv."""
    return {
        (metric_key(row["metric"], row["features"]), round(float(row["images"]))): value
        for row in rows
        if (value := finite(row["value"])) is not None
    }


def metric_key(metric: str, features: str) -> str:
    """What a metric of samples is called in the store: only Inception's features give `eval/fid` and `eval/kid`."""
    names = {"fd": "fid"} if features == INCEPTION else {"kid": "kd"}
    return f"eval/{names.get(metric, metric)} {features}"


def arms_view(experiment: Experiment) -> str:
    """The saved view `Arms` as MLflow's UI keeps it: runs by arm, by the mean of the first metric, best first."""
    evaluate = experiment.evaluate
    metrics = [(metric, features) for features in evaluate.features for metric in evaluate.metrics]
    columns = [f"metrics.`{metric_key(*of)}`" for of in metrics] + ["metrics.`train/loss`"]
    state = {
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "arm"}]},
        "orderByKey": columns[0],
        "orderByAsc": metrics[0][0] not in HIGHER_IS_BETTER,
        "selectedColumns": columns,
    }
    return json.dumps({"name": "Arms", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def provenance_tags(provenance: dict[str, Any], directory: Path) -> dict[str, str | None]:
    """Tags of a run whose newest checkpoint lies in `directory`; None: this tag must be absent."""
    names = ("git_commit", "git_dirty", "host", "device", "config_hash", "diverged")
    versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())
    tags = {name: _text(provenance.get(name)) for name in names}
    return tags | {"versions": versions, "checkpoint": (directory / "weights.safetensors").as_posix()}


def common_config(experiment: Experiment) -> RunConfig:
    """What the arms of a study share; the plain scheme stands for theirs."""
    sections = {name: getattr(experiment, name) for name in ("dataset", "model", "diffusion", "train")}
    return RunConfig(**sections, scheme=Scheme(), train_version=TRAIN_VERSION)


def common_params(run: RunConfig) -> dict[str, str]:
    """`section.key` -> value, without the scheme."""
    sections = run.model_dump(mode="json", include={"dataset", "model", "diffusion", "train"}, exclude_none=True)
    return {f"{section}.{key}": _text(value) for section, keys in sections.items() for key, value in keys.items()}


def run_params(experiment: Experiment, arm: str, seed: int) -> dict[str, str]:
    """Parameters of one run; `arm` is what the table of runs is to be grouped by."""
    run, match = experiment.run(arm), experiment.arms[arm].match
    scheme = {name: _describe(value) if isinstance(value, Choice) else _text(value) for name, value in run.scheme}
    scheme["importance_corrected"] = _text(run.scheme.corrected)
    matched = {"mse_weight": f"matched to {match}", "vb_weight": f"matched to {match}"} if match else {}
    return {"arm": arm, "seed": str(seed)} | scheme | matched | common_params(run)


def standings(arms: dict[str, list[dict[tuple[str, int], float]]]) -> str:
    """Markdown table of each metric's mean over seeds, at the newest checkpoint that all runs have; "" before one.

    Args:
        arms: per arm, the evaluations of its runs: (metric, images) -> value.
    """
    shared = sorted(set.intersection(*(set(run) for runs in arms.values() for run in runs)))
    newest = dict(shared)  # of a metric's points, the one with most images is last
    if not newest:
        return ""
    names = [f"{name.removeprefix('eval/')}, {images:,} images" for name, images in newest.items()]
    means = {arm: [fmean(run[at] for run in runs) for at in newest.items()] for arm, runs in arms.items()}
    rows = [[arm, *(f"{value:.4g}" for value in values)] for arm, values in means.items()]
    return markdown_table(["mean over seeds", *names], rows)


def run_status(complete: bool, moving: bool, diverged: bool = False) -> str:
    """MLflow's status: a run that is neither complete nor moving was stopped."""
    return "FAILED" if diverged else "FINISHED" if complete else "RUNNING" if moving else "KILLED"


def batches(rows: Iterable[list], limit: int = BATCH_METRICS) -> Iterator[list]:
    """Rows joined into lists of at most `limit`; none is cut, for a batch is stored whole or not at all."""
    batch: list = []
    for row in rows:
        if batch and len(batch) + len(row) > limit:
            yield batch
            batch = []
        batch = batch + row
    if batch:
        yield batch


def _describe(choice: Choice) -> str:
    name, parameters = choice.chosen
    inner = ", ".join(f"{key} {value:g}" for key, value in parameters.items())
    return f"{name} ({inner})" if inner else name


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
