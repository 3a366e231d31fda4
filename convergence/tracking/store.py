"""A study in MLflow's store: an experiment, a parent run, and a run per arm and seed."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from convergence import layout
from convergence.answers import answer, plain, sections
from convergence.schema import Experiment
from convergence.tracking.content import (
    LEGEND,
    UI,
    arms_view,
    batches,
    common_config,
    common_params,
    eval_metrics,
    finite,
    provenance_tags,
    read_rows,
    run_params,
    run_status,
    standings,
    train_metrics,
)
from diffusion.files import read_json


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
