"""Computes the content that is sent to MLflow, with pure functions of studies and their results."""

import csv
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from convergence.schema import Experiment
from convergence.tables import HIGHER_IS_BETTER, markdown_table
from diffusion.config import TRAIN_VERSION, Choice, RunConfig, Scheme
from diffusion.evaluation.failure import FAILURES
from diffusion.evaluation.weights import INCEPTION

if TYPE_CHECKING:
    from convergence.analysis.verdict import StudyVerdict

logger = logging.getLogger("convergence.tracking")

UI = "http://127.0.0.1:5000"  # address of `make ui`, for a store that is not a server
BATCH_METRICS = 1000  # most metrics that MLflow accepts in one request
LEGEND = 'Steps are training images. The view "Arms" groups the runs by arm, best first.'


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file that may still be written. An incomplete last line is left out."""
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def finite_number(cell: str | None) -> float | None:
    """Returns the number in a cell, or None if the cell is missing, empty, NaN or infinite."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def train_metrics(row: dict[str, str], images: int, last_images: int) -> dict[str, float]:
    """Returns the MLflow metrics of one row of the training log, log.csv.

    Args:
        row: row of log.csv.
        images: training images up to this row.
        last_images: training images of the whole run.

    Returns:
        name -> value. Every row has the metric `progress` (0 to 1). Its newest value in MLflow shows up to which row
        the log was sent. `time_left_s` is the remaining training time in seconds at the speed of this row.
    """
    columns = row.keys() - {"step", "images", "seconds"}
    values = {f"train/{name}": finite_number(row[name]) for name in sorted(columns)} | {
        "progress": images / last_images
    }
    if rate := values.get("train/images_per_second"):
        values["time_left_s"] = max(last_images - images, 0) / rate
    return {name: value for name, value in values.items() if value is not None}


def eval_metrics(rows: Sequence[dict[str, str]]) -> dict[tuple[str, int], float]:
    """Returns (metric, training images) -> value for the finite values in metrics.csv of a checkpoint.

    The names of metrics end with the average of the weights if it is not the first one.
    """
    return {
        (_average_key(row, rows[0]), round(float(row["images"]))): value
        for row in rows
        if (value := finite_number(row["value"])) is not None
    }


def _average_key(row: dict[str, str], first: dict[str, str]) -> str:
    key = metric_key(row["metric"], row["features"])
    return key if row.get("ema") == first.get("ema") else f"{key} {row['ema']}"


def failure(rows: Sequence[dict[str, str]]) -> str | None:
    """Returns why a run failed, according to metrics.csv of one checkpoint; None if the checkpoint did not fail.

    The first average of the weights decides.
    """
    reasons = (row.get("reason") or "" for row in rows if row.get("ema") == rows[0].get("ema"))
    return next((reason for reason in reasons if reason.startswith(FAILURES)), None)


def metric_key(metric: str, features: str) -> str:
    """Returns the name of a metric in MLflow. FID and KID are used as names for Inception features only."""
    names = {"fd": "fid"} if features == INCEPTION else {"kid": "kd"}
    return f"eval/{names.get(metric, metric)} {features}"


def arms_view(experiment: Experiment) -> str:
    """Returns the saved view `Arms` in the format of MLflow's UI.

    The view groups the runs by arm and shows the mean of each arm, best arm first.
    """
    evaluate = experiment.evaluate
    metrics = [(metric, features) for features in evaluate.features for metric in evaluate.metrics]
    keys = [metric_key(metric, features) for metric, features in metrics]
    columns = [f"metrics.`{key}`" for key in [*keys, "train/loss"]]
    state = {
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "arm"}]},
        "orderByKey": columns[0],
        "orderByAsc": metrics[0][0] not in HIGHER_IS_BETTER,
        "selectedColumns": columns,
    }
    return json.dumps({"name": "Arms", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def provenance_tags(provenance: dict[str, Any], directory: Path) -> dict[str, str | None]:
    """Returns the MLflow tags of a run, from provenance.json of its newest checkpoint.

    Args:
        provenance: content of provenance.json.
        directory: directory of the checkpoint.

    Returns:
        name -> value; None means that the run must not have this tag.
    """
    names = ("git_commit", "git_dirty", "host", "device", "config_hash", "source_hash", "tables_hash")
    versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())
    values = {name: provenance.get(name) for name in names}
    tags = {name: None if value is None else _text(value) for name, value in values.items()}
    return tags | {"versions": versions, "checkpoint": (directory / "weights.safetensors").as_posix()}


def common_config(experiment: Experiment) -> RunConfig:
    """Returns the settings that all arms of a study share, with the default scheme."""
    sections = {name: getattr(experiment, name) for name in ("dataset", "model", "diffusion", "train")}
    return RunConfig(**sections, scheme=Scheme(), train_version=TRAIN_VERSION)


def common_params(run: RunConfig) -> dict[str, str]:
    """Returns all settings of a run except its scheme, as `section.key` -> value."""
    sections = run.model_dump(mode="json", include={"dataset", "model", "diffusion", "train"}, exclude_none=True)
    return {f"{section}.{key}": _text(value) for section, keys in sections.items() for key, value in keys.items()}


def run_params(experiment: Experiment, arm: str, seed: int) -> dict[str, str]:
    """Returns the MLflow parameters of one run. MLflow's table of runs is grouped by the parameter `arm`."""
    run, match = experiment.run(arm), experiment.arms[arm].match
    scheme = {name: _describe(value) if isinstance(value, Choice) else _text(value) for name, value in run.scheme}
    scheme["importance_corrected"] = _text(run.scheme.corrected)
    matched = {"mse_weight": f"matched to {match}", "vb_weight": f"matched to {match}"} if match else {}
    return {"arm": arm, "seed": str(seed)} | scheme | matched | common_params(run)


def means_table(arms: dict[str, list[dict[tuple[str, int], float]]]) -> str:
    """Returns a Markdown table with the mean of each metric over the runs of an arm.

    The values are those of the newest checkpoint that all runs have.

    Args:
        arms: arm -> the values of each of its runs, as (metric, training images) -> value.

    Returns:
        the table, or "" if the runs have no checkpoint in common.
    """
    shared = sorted(set.intersection(*(set(run) for runs in arms.values() for run in runs)))
    newest = dict(shared)  # the last pair of a metric has the most images
    if not newest:
        return ""
    names = [f"{name.removeprefix('eval/')}, {images:,} images" for name, images in newest.items()]
    means = {arm: [fmean(run[point] for run in runs) for point in newest.items()] for arm, runs in arms.items()}
    rows = [[arm, *(f"{value:.4g}" for value in values)] for arm, values in means.items()]
    return markdown_table(["mean over seeds", *names], rows)


def note(verdict: "StudyVerdict | None", means: str) -> str:
    """Returns the note of a study's parent run in MLflow: warnings, question, answer and the table of means.

    The note is Markdown. The other parts of the verdict are in the artifact verdict.md, because MLflow cuts a note at
    8,000 characters.

    Args:
        verdict: verdict of the study; None if there is no verdict yet.
        means: table that `means_table` returned.
    """
    parts = [means]
    if verdict and verdict.question:
        parts = [f"**Question.** {verdict.question}", f"**Answer.** {verdict.answer}", means]
    if verdict:
        parts = [*(f"**Warning.** {warning}" for warning in verdict.warnings), *parts]
    return "\n\n".join(filter(None, parts))


def run_status(complete: bool, running: bool, failed: bool = False) -> str:
    """Returns the MLflow status of a run: FAILED (diverged or collapsed), FINISHED, RUNNING, or otherwise KILLED."""
    if failed:
        return "FAILED"
    if complete:
        return "FINISHED"
    return "RUNNING" if running else "KILLED"


def batches(rows: Iterable[list], limit: int = BATCH_METRICS) -> Iterator[list]:
    """Yields lists of at most `limit` metrics, which are joined from rows of metrics.

    All metrics of a row are in the same list, because MLflow saves a list as a whole.
    """
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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
