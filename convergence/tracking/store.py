"""Writes a study to MLflow: an MLflow experiment with a parent run for the study, and one run per arm and seed."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from convergence import layout
from convergence.errors import StudyError
from convergence.schema import Experiment
from convergence.tracking.connection import artifact_root, connect, is_elsewhere, is_server
from convergence.tracking.content import (
    LEGEND,
    UI,
    arms_view,
    batches,
    common_config,
    common_params,
    eval_metrics,
    failure,
    finite_number,
    means_table,
    note,
    provenance_tags,
    read_rows,
    run_params,
    run_status,
    train_metrics,
)
from convergence.tracking.problem import masked
from diffusion.errors import FileError
from diffusion.files import read_json

if TYPE_CHECKING:
    from convergence.analysis.verdict import StudyVerdict

# Metrics that show which rows of the log are stored: every row has `progress`.
TRAIN_NAMES = ("progress", "train/loss")


@dataclass
class StoredRun:
    """The content of one run in MLflow, and the files from which the content was sent."""

    id: str
    status: str
    tags: dict[str, str]
    has_dataset: bool
    losses: dict[int, float | None]  # training images -> loss of each stored row of the log; None if it is not finite
    evaluated: dict[tuple[str, int], float]  # (metric, training images) -> value
    sampled: set[int]  # training images of the stored samples
    files: dict[Path, tuple[float, int]] = field(default_factory=dict)  # path -> (modification time, size)

    def is_new(self, path: Path) -> bool:
        """Returns whether a file exists and has changed since the last call with the same path."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        before, self.files[path] = self.files.get(path), (stat.st_mtime, stat.st_size)
        return before != self.files[path]

    def modified_since(self, moment: float | None) -> bool:
        """Returns whether a file of the run was modified at or after a moment, in seconds since the epoch.

        The result is False if the moment is None.
        """
        return moment is not None and any(modified >= moment for modified, _ in self.files.values())


class Study:
    """One study in MLflow.

    The tag `run` identifies a run: `<arm>-<hash8>/seed<k>`, or `study-<hash8>` for the parent run. The hash changes if
    an arm is edited. An edited arm therefore gets new runs, and the old runs remain. If a run is trained again, each
    value that differs is added as a second point with a newer time. If the training log differs, the run also gets the
    tag `trained_again`. After an error of MLflow, a new `Study` reads the content of MLflow again.

    Args:
        uri: address of MLflow's tracking store or server.
        path: study file.
        experiment: content of the study file.
    """

    def __init__(self, uri: str, path: Path, experiment: Experiment):
        # Imported here because it takes seconds, during which the process could not react to signals.
        from mlflow import entities

        self.client, self.entities, self.path, self.experiment = connect(uri), entities, path, experiment
        self.common, self.reports = common_config(experiment), layout.report_directory(experiment.name)
        self.directories: dict[tuple[str, int], dict[int, Path]] = {}
        for arm, seed, step, directory in layout.checkpoints(experiment):
            self.directories.setdefault((arm, seed), {})[step] = directory
        self.id, self.label = self._find_experiment(server=is_server(uri))
        # With this kind, the UI opens the table of training runs instead of traces of language models.
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.sharedViewState.arms": arms_view(experiment),
        }
        self._tag_experiment(tags)
        ui = masked(uri, uri).replace("***@", "").rstrip("/") if is_server(uri) else UI
        self.address = f"{ui}/#/experiments/{self.id}/runs?workflowType=machine_learning&viewStateShareKey=arms"
        runs = [run for run in self.client.search_runs([self.id], max_results=50_000) if "run" in run.data.tags]
        self.run_ids = {run.data.tags["run"]: run.info.run_id for run in runs}
        self.runs: dict[str, StoredRun] = {}
        # A killed tracking process may have left runs open whose arm was edited or removed, or whose results were.
        current = {self._key(arm, seed) for arm, seed in self._started()}
        parent = {f"study-{self.common.hash8}"} if current else set()
        for run in runs:
            if run.info.status == "RUNNING" and run.data.tags["run"] not in current | parent:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _find_experiment(self, server: bool) -> tuple[str, str]:
        """Returns the id of MLflow's experiment and its name for messages; creates the experiment if necessary.

        If the project was copied, the artifacts of the copied MLflow experiment are in the original project. In this
        case, the copy gets its own MLflow experiment, whose name contains the directory of the copy.
        """
        name, root = self.experiment.name, artifact_root()
        # A server chooses where artifacts are stored; for a database it must be given.
        location = None if server else f"{root}/{name}"
        stored, label = self.client.get_experiment_by_name(name), name
        if location and stored and is_elsewhere(stored.artifact_location, location):
            label = f"{name} in {root} (the artifacts of the experiment {name} are in {stored.artifact_location})"
            name = f"{name} in {root}"
            stored = self.client.get_experiment_by_name(name)
        self.experiment_tags: dict[str, str] = stored.tags if stored else {}
        return stored.experiment_id if stored else self.client.create_experiment(name, location), label

    def _check_active(self) -> None:
        """Checks that the experiment is not deleted. MLflow itself reports a deletion only when something is written.

        Raises:
            StudyError: the experiment is deleted.
        """
        if self.client.get_experiment(self.id).lifecycle_stage == "deleted":
            raise StudyError(f"the experiment {self.id} of MLflow is deleted")

    def _started(self) -> list[tuple[str, int]]:
        """Returns (arm, seed) of each run that has results."""
        return [(arm, seed) for arm, seed in self.directories if self._directory(arm, seed).is_dir()]

    def forward(self, since: float | None) -> None:
        """Sends everything that has changed since the last call to MLflow.

        Args:
            since: moment in seconds since the epoch. Runs with a file that was modified at or after this moment are
                marked as running. With None, no run is marked as running.
        """
        self._check_active()
        started = self._started()
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
        verdict = self._verdict()
        self._set_tags(parent, {"mlflow.note.content": note(verdict, means_table(arms)) or None})
        answer = verdict.answer if verdict else None
        self._tag_experiment({"mlflow.note.content": " ".join(filter(None, [answer, LEGEND]))})
        ended = sum(run.status in ("FINISHED", "FAILED") for run in runs)
        running = any(run.modified_since(since) for run in runs)
        self._set_status(parent, run_status(ended == len(self.directories), running))

    def _verdict(self) -> "StudyVerdict | None":
        # Imported here for the same reason as mlflow.
        from convergence.analysis.verdict import read_verdict

        with suppress(FileError):  # missing, or of an earlier version until this study writes it again
            return read_verdict(self.reports / "verdict.json")
        return None

    def _forward_run(self, parent: StoredRun, arm: str, seed: int, since: float | None) -> StoredRun:
        tags = {"study": self.experiment.name, "role": "run", "mlflow.parentRunId": parent.id}
        params = run_params(self.experiment, arm, seed)
        run = self._run(self._key(arm, seed), f"{arm} seed {seed}", tags, params)
        self._forward_dataset(run)
        directories, batch_size = self.directories[arm, seed], self.experiment.run(arm).train.batch_size
        self._forward_log(run, self._directory(arm, seed) / "log.csv", max(directories) * batch_size)
        for step, directory in directories.items():
            self._forward_samples(run, directory / "preview.png", step * batch_size)
            if run.is_new(path := directory / "provenance.json"):
                self._set_tags(run, provenance_tags(read_json(path), directory))
        evaluations = [directory / "metrics.csv" for directory in directories.values()]
        self._forward_evaluations(run, evaluations)
        complete = all(path.exists() for path in evaluations)
        self._set_status(run, run_status(complete, run.modified_since(since), "failed" in run.tags))
        return run

    def _forward_log(self, run: StoredRun, path: Path, last_images: int) -> None:
        if not run.is_new(path):
            return
        rows = []
        for row in read_rows(path):
            images = round(finite_number(row.get("images")) or 0)
            if not 0 < images <= last_images:  # `checkpoints` may end earlier than when the run was trained
                continue
            # The file contains the rows of the whole run, and a resumed run writes its last rows again.
            loss = finite_number(row.get("loss"))
            if images in run.losses and run.losses[images] == loss:
                continue
            if images in run.losses:  # as with evaluations, a changed row becomes a second point
                self._set_tags(run, {"trained_again": "true"})
            run.losses[images] = loss
            values = train_metrics(row, images, last_images)
            rows.append(self._metrics(path, {(name, images): value for name, value in values.items()}))
        for batch in batches(rows):
            self.client.log_batch(run.id, metrics=batch)

    def _forward_evaluations(self, run: StoredRun, paths: list[Path]) -> None:
        """Sends the values of all checkpoints except the last ones of a failed run (`convergence.failures`)."""
        if not any([run.is_new(path) for path in paths]):  # a list: `is_new` must see every path
            return
        tables = {path: read_rows(path) for path in paths if path.exists()}
        self._set_tags(run, {"failed": failure(tables.get(paths[-1], []))})
        for path, rows in dropwhile(lambda table: failure(table[1]), reversed(tables.items())):
            values = eval_metrics(rows)
            # A changed value of a checkpoint becomes a second point; the table of runs shows the newest one.
            if new := {point: value for point, value in values.items() if run.evaluated.get(point) != value}:
                self.client.log_batch(run.id, metrics=self._metrics(path, new))
                run.evaluated |= new

    def _forward_samples(self, run: StoredRun, path: Path, images: int) -> None:
        if run.is_new(path) and images not in run.sampled:
            with Image.open(path) as grid:
                self.client.log_image(run.id, grid, key="samples", step=images)
            run.sampled.add(images)

    def _forward_dataset(self, run: StoredRun) -> None:
        directory = layout.dataset_directory(self.experiment.dataset)
        if not run.has_dataset and run.is_new(path := directory / "manifest.json"):
            manifest = read_json(path)
            source = json.dumps({"source": manifest["source"], "licence": manifest.get("licence")})
            profile = json.dumps({"images": manifest.get("count"), "image_size": manifest.get("image_size")})
            digest = manifest["sha256"][:16]
            dataset = self.entities.Dataset(directory.name, digest, "local", source, profile=profile)
            context = self.entities.InputTag("mlflow.data.context", "training")
            self.client.log_inputs(run.id, [self.entities.DatasetInput(dataset, [context])])
            run.has_dataset = True

    def _forward_reports(self, parent: StoredRun) -> None:
        """Sends the study file, and the tables, the verdict and the figures of the study."""
        tables = [
            self.reports / name for name in ("metrics.csv", "cost.csv", "effects.csv", "verdict.json", "verdict.md")
        ]
        for path in [self.path, *tables, *sorted(self.reports.glob("*.png"))]:
            if parent.is_new(path):
                self.client.log_artifact(parent.id, str(path))

    def _run(self, key: str, name: str, tags: dict[str, str], params: dict[str, str]) -> StoredRun:
        """Returns the run with this key; creates the run in MLflow if necessary."""
        if key not in self.runs:
            if key not in self.run_ids:
                run = self.client.create_run(self.id, tags={**tags, "run": key}, run_name=name)
                self.run_ids[key] = run.info.run_id
            self.runs[key] = self._read_run(self.run_ids[key], params)
        self._set_tags(self.runs[key], tags)
        return self.runs[key]

    def _read_run(self, run_id: str, params: dict[str, str]) -> StoredRun:
        """Reads the content of MLflow for one run, and adds missing parameters to MLflow."""
        run = self.client.get_run(run_id)
        missing = [self.entities.Param(*item) for item in params.items() if item[0] not in run.data.params]
        self.client.log_batch(run_id, params=missing)
        names = [name for name in run.data.metrics if name in TRAIN_NAMES or name.startswith("eval/")]
        points = [point for name in names for point in self.client.get_metric_history(run_id, name)]
        points.sort(key=lambda point: point.timestamp)
        written = {point.step: point.timestamp for point in points if point.key == "progress"}
        losses: dict[int, float | None] = dict.fromkeys(written)
        for point in points:
            # An older point belongs to a row that was replaced by one without a finite loss.
            if point.key == "train/loss" and point.timestamp == written.get(point.step):
                losses[point.step] = point.value
        samples = " ".join(file.path for file in self.client.list_artifacts(run_id, "images"))
        return StoredRun(
            id=run_id,
            status=run.info.status,
            tags=dict(run.data.tags),
            has_dataset=bool(run.inputs and run.inputs.dataset_inputs),
            losses=losses,
            evaluated={(point.key, point.step): point.value for point in points if point.key not in TRAIN_NAMES},
            sampled={int(images) for images in re.findall(r"samples.step.(\d+)", samples)},
        )

    def _set_status(self, run: StoredRun, status: str) -> None:
        if status == run.status:
            return
        set_status = self.client.update_run if status == "RUNNING" else self.client.set_terminated
        set_status(run.id, status)
        run.status = status

    def _set_tags(self, run: StoredRun, tags: Mapping[str, str | None]) -> None:
        for name in [name for name, value in tags.items() if value is None and name in run.tags]:
            self.client.delete_tag(run.id, name)
            del run.tags[name]
        changed = {name: value for name, value in tags.items() if value is not None and run.tags.get(name) != value}
        if changed:
            self.client.log_batch(run.id, tags=[self.entities.RunTag(*item) for item in changed.items()])
            run.tags |= changed

    def _tag_experiment(self, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            if self.experiment_tags.get(name) != value:
                self.client.set_experiment_tag(self.id, name, value)
        self.experiment_tags = {**self.experiment_tags, **tags}

    def _metrics(self, path: Path, values: dict[tuple[str, int], float]) -> list:
        """Returns MLflow's metrics, with the modification time of the file that contains the values."""
        written = round(path.stat().st_mtime * 1000)
        return [self.entities.Metric(name, value, written, images) for (name, images), value in values.items()]

    def _directory(self, arm: str, seed: int) -> Path:
        return layout.run_directory(self.experiment.name, arm, self.experiment.run(arm), seed)

    def _key(self, arm: str, seed: int) -> str:
        return self._directory(arm, seed).relative_to(layout.RESULTS / self.experiment.name).as_posix()
