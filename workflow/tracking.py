"""MLflow tracking of studies by one process beside the workflow; nothing else imports mlflow or waits for it.

    python -m workflow.tracking follow experiments/a.yaml

At its end it prints where each study is in MLflow's UI. It forwards what training and evaluation leave under
`results/`. What was forwarded before, it asks the store: a follower that was killed repeats nothing and loses nothing.

A study is an MLflow experiment: a parent run named like the study, below it a run per arm and seed. The step
of every metric is the number of training images seen. The experiment's description is the answer; its saved view
`Arms` compares the arms.
"""

import argparse
import csv
import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from diffusion import StudyError
from diffusion.config import TRAIN_VERSION, Choice, Experiment, RunConfig, Scheme, load_experiment
from diffusion.files import read_json
from diffusion.weights import INCEPTION
from workflow import layout
from workflow.answers import answer, plain, sections
from workflow.tables import HIGHER_IS_BETTER, markdown_table

logger = logging.getLogger("workflow.tracking")

PASS_SECONDS = 10
LOCK_SECONDS = 10
UI = "http://127.0.0.1:5000"  # of `make ui`, which serves a store that is no server itself
BATCH_METRICS = 1000  # MLflow takes no more at once
ADVICE = {
    "follow": "the next start forwards the rest",
    "sync": "start that server, or mend MLFLOW_TRACKING_URI, then make track again",
}
BUSY = {
    "follow": "this one leaves it to that",
    "sync": "it forwards them; once it has ended, make track forwards what is left",
}
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


@dataclass
class Tracked:
    """What the store holds of one run, and the files (modification time, size) it was brought up to."""

    id: str
    status: str
    tags: dict[str, str]
    has_dataset: bool
    images: int  # of the newest training row; -1 before the first
    evaluated: dict[tuple[str, int], float]
    sampled: set[int]
    files: dict[Path, tuple[float, int]] = field(default_factory=dict)

    def take_new(self, path: Path) -> bool:
        """Whether the file is there and was not taken in this state before; from now on it was."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        before, self.files[path] = self.files.get(path), (stat.st_mtime, stat.st_size)
        return before != self.files[path]

    def moved_since(self, moment: float | None) -> bool:
        """Whether a file that was taken was written at the moment (seconds since the epoch) or later; None: never."""
        return moment is not None and any(modified >= moment for modified, _ in self.files.values())


class Study:
    """One study in the store. After an error it is made anew, from what the store then says.

    Runs are found again by their tag `run`: `<arm>-<hash8>/seed<k>`, or `study-<hash8>` for what
    the arms share. So an edit gets new runs, and the old ones stay.
    """

    def __init__(self, uri: str, path: Path, experiment: Experiment):
        # Takes seconds: not before the process can be told to stop.
        from mlflow import MlflowClient, entities

        self.client, self.entities, self.path, self.experiment = MlflowClient(uri), entities, path, experiment
        self.common = common_config(experiment)
        self.directories: dict[tuple[str, int], dict[int, Path]] = {}
        for arm, seed, step, directory in layout.checkpoints(experiment):
            self.directories.setdefault((arm, seed), {})[step] = directory
        found = self.client.get_experiment_by_name(experiment.name)
        # A server knows where its artifacts go; a database alone does not.
        root = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION") or Path("mlartifacts").resolve().as_uri()
        place = None if uri.startswith("http") else f"{root.rstrip('/')}/{experiment.name}"
        self.id = found.experiment_id if found else self.client.create_experiment(experiment.name, place)
        # So that the UI opens on training runs, not on traces of language models.
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.sharedViewState.arms": arms_view(experiment),
        }
        self.described = found.tags if found else {}
        self._tag_experiment(tags)
        ui = uri.rstrip("/") if uri.startswith("http") else UI
        self.address = f"{ui}/#/experiments/{self.id}/runs?workflowType=machine_learning&viewStateShareKey=arms"
        runs = [run for run in self.client.search_runs([self.id], max_results=50_000) if "run" in run.data.tags]
        self.stored = {run.data.tags["run"]: run.info.run_id for run in runs}
        self.tracked: dict[str, Tracked] = {}
        # A killed follower may have left runs open whose arm was edited or removed since.
        current = {self._key(arm, seed) for arm, seed in self.directories} | {f"study-{self.common.hash8}"}
        for run in runs:
            if run.info.status == "RUNNING" and run.data.tags["run"] not in current:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def forward(self, since: float | None) -> None:
        """Forward what is new. Runs with files newer than `since` are being trained; with None, none is."""
        started = [(arm, seed) for arm, seed in self.directories if self._directory(arm, seed).is_dir()]
        if not started:
            return
        tags = {"study": self.experiment.name, "role": "study"}
        params = common_params(self.common)
        parent = self._run(f"study-{self.common.hash8}", self.experiment.name, tags, params)
        runs = [self._forward_run(parent, arm, seed, since) for arm, seed in started]
        self._forward_reports(parent)
        arms: dict[str, list] = {}
        for (arm, _), run in zip(started, runs, strict=True):
            arms.setdefault(arm, []).append(run.evaluated)
        told = ""
        with suppress(FileNotFoundError):
            told = sections((layout.REPORTS / "verdict.md").read_text(encoding="utf-8")).get(self.experiment.name, "")
        note = "\n\n".join(filter(None, [told, standings(arms)]))
        self._set_tags(parent, {"mlflow.note.content": note or None})
        self._tag_experiment({"mlflow.note.content": " ".join(filter(None, [plain(answer(told)), LEGEND]))})
        ended = sum(run.status in ("FINISHED", "FAILED") for run in runs)
        moving = any(run.moved_since(since) for run in runs)
        self._set_status(parent, run_status(ended == len(self.directories), moving))

    def _forward_run(self, parent: Tracked, arm: str, seed: int, since: float | None) -> Tracked:
        tags = {"study": self.experiment.name, "role": "run", "mlflow.parentRunId": parent.id}
        params = run_params(self.experiment, arm, seed)
        run = self._run(self._key(arm, seed), f"{arm} seed {seed}", tags, params)
        self._forward_dataset(run)
        directories, batch_size = self.directories[arm, seed], self.experiment.run(arm).train.batch_size
        for step, directory in directories.items():
            self._forward_log(run, directory / "log.csv", max(directories) * batch_size)
            self._forward_evaluation(run, directory / "metrics.csv")
            self._forward_samples(run, directory / "preview.png", step * batch_size)
            if run.take_new(path := directory / "provenance.json"):
                self._set_tags(run, provenance_tags(read_json(path), directory))
        complete = all((directory / "metrics.csv").exists() for directory in directories.values())
        self._set_status(run, run_status(complete, run.moved_since(since), "diverged" in run.tags))
        return run

    def _forward_log(self, run: Tracked, path: Path, last_images: int) -> None:
        if not run.take_new(path):
            return
        rows = []
        for row in read_rows(path):
            images = finite(row.get("images"))
            # A restarted segment writes its rows again.
            if images is not None and images > run.images:
                run.images = round(images)
                values = train_metrics(row, run.images, last_images)
                rows.append(self._metrics(path, {(name, run.images): value for name, value in values.items()}))
        for batch in batches(rows):
            self.client.log_batch(run.id, metrics=batch)

    def _forward_evaluation(self, run: Tracked, path: Path) -> None:
        if run.take_new(path):
            values = eval_metrics(read_rows(path))
            # A checkpoint evaluated anew to another value gets a second point: the table shows the newest.
            new = {at: value for at, value in values.items() if run.evaluated.get(at) != value}
            self.client.log_batch(run.id, metrics=self._metrics(path, new))
            run.evaluated |= new

    def _forward_samples(self, run: Tracked, path: Path, images: int) -> None:
        if run.take_new(path) and images not in run.sampled:
            with Image.open(path) as grid:
                self.client.log_image(run.id, grid, key="samples", step=images)
            run.sampled.add(images)

    def _forward_dataset(self, run: Tracked) -> None:
        directory = layout.dataset_directory(self.experiment.dataset)
        if not run.has_dataset and run.take_new(path := directory / "manifest.json"):
            manifest = read_json(path)
            source = json.dumps({"source": manifest["source"], "licence": manifest.get("licence")})
            profile = json.dumps({"images": manifest.get("count"), "image_size": manifest.get("image_size")})
            digest = manifest["sha256"][:16]
            dataset = self.entities.Dataset(directory.name, digest, "local", source, profile=profile)
            context = self.entities.InputTag("mlflow.data.context", "training")
            self.client.log_inputs(run.id, [self.entities.DatasetInput(dataset, [context])])
            run.has_dataset = True

    def _forward_reports(self, parent: Tracked) -> None:
        """The experiment file, and the reports once they are about this study."""
        files, table = [self.path], layout.REPORTS / "metrics.csv"
        if table.exists() and any(row.get("study") == self.experiment.name for row in read_rows(table)):
            files += [table, table.with_name("speedup.csv"), table.with_name("verdict.md")]
            files += sorted(layout.REPORTS.glob("*.png"))
        for path in files:
            if parent.take_new(path):
                self.client.log_artifact(parent.id, str(path))

    def _run(self, key: str, name: str, tags: dict[str, str], params: dict[str, str]) -> Tracked:
        """The run with this key: as remembered, as stored, or new."""
        if key not in self.tracked:
            if key not in self.stored:
                run = self.client.create_run(self.id, tags={**tags, "run": key}, run_name=name)
                self.stored[key] = run.info.run_id
            self.tracked[key] = self._recall(self.stored[key], params)
        self._set_tags(self.tracked[key], tags)
        return self.tracked[key]

    def _recall(self, run_id: str, params: dict[str, str]) -> Tracked:
        """Ask the store what it holds of a run, and complete its parameters."""
        run = self.client.get_run(run_id)
        missing = [self.entities.Param(*item) for item in params.items() if item[0] not in run.data.params]
        self.client.log_batch(run_id, params=missing)
        names = [name for name in run.data.metrics if name == "progress" or name.startswith("eval/")]
        points = [point for name in names for point in self.client.get_metric_history(run_id, name)]
        points.sort(key=lambda point: point.timestamp)
        pictures = " ".join(file.path for file in self.client.list_artifacts(run_id, "images"))
        return Tracked(
            id=run_id,
            status=run.info.status,
            tags=dict(run.data.tags),
            has_dataset=bool(run.inputs and run.inputs.dataset_inputs),
            images=max((point.step for point in points if point.key == "progress"), default=-1),
            evaluated={(point.key, point.step): point.value for point in points if point.key != "progress"},
            sampled={int(images) for images in re.findall(r"samples.step.(\d+)", pictures)},
        )

    def _set_status(self, run: Tracked, status: str) -> None:
        if status == run.status:
            return
        close = self.client.update_run if status == "RUNNING" else self.client.set_terminated
        close(run.id, status)
        run.status = status

    def _set_tags(self, run: Tracked, tags: dict[str, str | None]) -> None:
        for name in [name for name, value in tags.items() if value is None and name in run.tags]:
            self.client.delete_tag(run.id, name)
            del run.tags[name]
        changed = {name: value for name, value in tags.items() if value is not None and run.tags.get(name) != value}
        if changed:
            self.client.log_batch(run.id, tags=[self.entities.RunTag(*item) for item in changed.items()])
            run.tags |= changed

    def _tag_experiment(self, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            if self.described.get(name) != value:
                self.client.set_experiment_tag(self.id, name, value)
        self.described = {**self.described, **tags}

    def _metrics(self, path: Path, values: dict[tuple[str, int], float]) -> list:
        """MLflow's metrics, dated by the file they come from."""
        written = round(path.stat().st_mtime * 1000)
        return [self.entities.Metric(name, value, written, images) for (name, images), value in values.items()]

    def _directory(self, arm: str, seed: int) -> Path:
        return layout.run_directory(self.experiment.name, arm, self.experiment.run(arm), seed)

    def _key(self, arm: str, seed: int) -> str:
        return self._directory(arm, seed).relative_to(layout.RESULTS / self.experiment.name).as_posix()


def follow(
    uri: str, experiments: dict[Path, Experiment], stopped: Callable[[], bool], advice: str = ADVICE["follow"]
) -> set[Path]:
    """Pass over the studies until stopped, and once more then: what was written before the stop is forwarded.

    An error ends the pass of its study alone and is told once, with an advice; the next pass asks the store anew.

    Returns:
        The files of the studies that the last pass could not forward.
    """
    began = time.time()
    studies: dict[Path, Study] = {}
    failing: set[Path] = set()
    while True:
        stopping = stopped()
        for path, experiment in experiments.items():
            try:
                studies[path] = studies.get(path) or Study(uri, path, experiment)
                studies[path].forward(None if stopping else began)
                failing.discard(path)
            except Exception as error:  # whatever becomes of the store, the study goes on
                studies.pop(path, None)
                if path not in failing:
                    reason = " ".join(str(error).split())[:200]
                    logger.warning("%s is not tracked in %s (%s): %s", path, uri, reason, advice)
                failing.add(path)
        if stopping:
            with suppress(BrokenPipeError):  # who started this may be gone
                for of in studies.values():
                    print(f"{of.experiment.name}: {of.address}", flush=True)
            return failing
        next_pass = time.monotonic() + PASS_SECONDS
        while time.monotonic() < next_pass and not stopped():
            time.sleep(1)


def main(arguments: list[str] | None = None) -> int:
    """What `python -m workflow.tracking` does; returns its exit code.

    That is 1 for a wrong experiment file, and where `sync` could not forward a study. What befalls the store is no
    failure of `follow`, which works beside a study.
    """
    parser = argparse.ArgumentParser(prog="python -m workflow.tracking", description="Forward studies to MLflow.")
    parser.add_argument("command", choices=["follow", "sync"], help="follow: until told to stop; sync: one pass")
    parser.add_argument("experiments", nargs="+", type=_file, help="studies, by name or file")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="the process that started this one")
    options = parser.parse_args(arguments)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))

    def stopped() -> bool:
        # The system gives an orphan another parent.
        return options.command == "sync" or bool(received) or os.getppid() != options.parent_pid

    _be_quiet_and_quick()
    try:
        experiments = {path: load_experiment(path) for path in options.experiments}
        layout.RESULTS.mkdir(exist_ok=True)
        # A follower whose parent was just killed needs a moment to let go.
        with FileLock(layout.RESULTS / ".tracking.lock", timeout=LOCK_SECONDS):
            failed = bool(follow(options.uri, experiments, stopped, ADVICE[options.command]))
    except StudyError as error:
        logger.error("%s", error)
        return 1
    except Timeout:
        failed = True
        logger.warning("another process already tracks the studies of %s: %s", Path.cwd(), BUSY[options.command])
    return int(failed and options.command == "sync")


def _file(text: str) -> Path:
    """The experiment file of a study, from its name or path."""
    return Path(text) if text.endswith(".yaml") else Path("experiments", f"{text}.yaml")


def _be_quiet_and_quick() -> None:
    """Training has the cores, and a request that fails is made again at the next pass anyway."""
    os.nice(10)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s tracking: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
