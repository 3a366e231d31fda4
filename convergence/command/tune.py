"""`convergence tune`: runs the trials of a study, and writes a study in which each arm has its best values."""

import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import pandas as pd

from convergence import layout
from convergence.analysis.tuning import edges, trial_columns, tuned_record
from convergence.errors import StudyError
from convergence.schema import Experiment
from convergence.study_file import load_experiment, parse, to_text
from convergence.study_plan import StudyPlan, current_plan
from convergence.tables import metric_name, read_table
from convergence.tuning import Tuned, arm_content, values_text
from diffusion.files import atomic_write

SCHEMA = "# yaml-language-server: $schema=../docs/schema.json\n"


def tuned_study(experiment: Experiment, trials: pd.DataFrame, tuned: Tuned) -> str:
    """Returns the text of the study file in which each arm has its best values.

    The arms of the study keep their names and values. An arm whose best values are others has a second arm with the
    suffix `_tuned`. The arms with the best values are compared as the study compares its arms, and the arms with the
    values of the study are compared in `compare.also`.

    Args:
        experiment: the study with the trials.
        trials: its table of trials.
        tuned: the best values of each arm.

    Raises:
        StudyError: an arm has a failed trial at all its values, or the study compares nothing.
    """
    file, plan, content = layout.study_file(experiment.name), current_plan(experiment), parse(experiment.text)
    if plan is None:
        raise StudyError(f"{file}: there is no section compare: add it")
    for arm in experiment.arms:
        if experiment.grid(arm) and arm not in tuned.arms:
            raise StudyError(f"{file}: tune: {arm} has a failed trial at all its values: add other values")
    del content["tune"]
    content["name"] = f"{experiment.name}_tuned"
    for arm, best in tuned.arms.items():
        if best.arm != arm:
            content["arms"][best.arm] = arm_content(experiment.arms[arm], best.values)
    content["compare"] |= _compare(plan, {arm: best.arm for arm, best in tuned.arms.items()})
    content["tuned"] = tuned.model_dump(exclude_defaults=True)
    comments = _comments(experiment, plan, trials)
    return SCHEMA + "".join(f"# {line}\n" for line in comments) + to_text(content)


def _compare(plan: StudyPlan, best: Mapping[str, str]) -> dict[str, Any]:
    """Returns keys of `compare`: the arms with the best values, and in `also` the arms with the values of the study."""
    pairs = [(best.get(baseline, baseline), best.get(candidate, candidate)) for baseline, candidate in plan.pairs]
    pairs = list(dict.fromkeys([*pairs, *plan.pairs]))
    primary, others = pairs[0][0], pairs[len(plan.candidates) :]
    keys = {
        "baseline": primary,
        "candidates": [candidate for _, candidate in pairs[: len(plan.candidates)]],
        "primary": {"candidate": best.get(plan.candidate, plan.candidate), "metric": plan.metric},
    }
    also = [{"baseline": baseline, "candidate": candidate} for baseline, candidate in others]
    return keys | ({"also": also} if also else {})


def _comments(experiment: Experiment, plan: StudyPlan, trials: pd.DataFrame) -> Iterable[str]:
    """Yields the origin of the study and the result of each trial."""
    yield f"Made by `convergence tune {experiment.name}` from {layout.study_file(experiment.name)}."
    seeds, keys = ", ".join(map(str, trials["seed"].unique())), experiment.tuned_keys
    yield f"{metric_name(plan.features, plan.metric)}, averaged over training images, in the trials with seeds {seeds}:"
    for (arm, *numbers), rows in trials.groupby(["arm", *keys], sort=False, dropna=False):
        values = {key: number for key, number in zip(keys, numbers, strict=True) if pd.notna(number)}
        results = rows["average"].map("{:.4g}".format).where(rows["level"].notna(), rows["reason"])
        yield f"  {arm}, {values_text(values)}: {', '.join(results)}{' (best)' if rows['best'].all() else ''}"


def save_study(text: str, path: Path, overwrite: bool) -> str:
    """Writes a study file, and returns a sentence about the file.

    Raises:
        StudyError: another file exists and may not be overwritten, or its study has results.
    """
    existing = path.read_text(encoding="utf-8") if path.exists() else None
    if existing == text:
        return f"{path} is up to date."
    if existing is not None and not overwrite:
        raise StudyError(
            f"{path} differs from the study that these trials give, and is left as it is: add --overwrite to replace "
            "it, or move it away"
        )
    if existing is not None and any((layout.RESULTS / path.stem).glob("*/seed*/step*/metrics.csv")):
        raise StudyError(
            f"{layout.RESULTS / path.stem} has results of the present {path}, whose plan cannot change any more: move "
            "this directory and the file away first"
        )
    with atomic_write(path) as file:
        file.write(text.encode())
    return f"{path} is written."


def _snakemake(*arguments: str) -> None:
    """Runs Snakemake in the working directory.

    Raises:
        SystemExit: Snakemake fails or is stopped.
    """
    place = ["--snakefile", str(layout.ROOT / "Snakefile"), "--directory", str(Path.cwd())]
    process = subprocess.Popen([sys.executable, "-m", "snakemake", *place, *arguments])
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, Snakemake stops its jobs and then ends
    try:
        if code := process.wait():
            sys.exit(code)
    finally:
        signal.signal(signal.SIGINT, previous)


@click.command("tune", context_settings={"ignore_unknown_options": True})
@click.argument("study", metavar="STUDY")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF SNAKEMAKE]...")
@click.option("--cores", default="all", metavar="N", help="CPU cores that Snakemake uses.")
@click.option("-n", "--dry-run", is_flag=True, help="List the trials and their jobs, and run nothing.")
@click.option("--overwrite", is_flag=True, help="Replace experiments/STUDY_tuned.yaml if it differs.")
def main(study: str, options: tuple[str, ...], cores: str, dry_run: bool, overwrite: bool) -> None:
    """Choose settings for each arm by trials, and write a study with the best.

    STUDY is a file in experiments/ with a section `tune`. Snakemake runs the trials that have no result yet. Then
    experiments/STUDY_tuned.yaml is written, in which each arm has its best values. Run it like any other study.
    \f

    Raises:
        UsageError: `--config` is given.
        StudyError: there is nothing to tune, an arm fails at all values, or the file of the tuned study differs.
    """
    if "--config" in options or "-C" in options:
        raise click.UsageError("--config is set by this command: put the settings into the study file.")
    experiment = load_experiment(layout.study_file(Path(study).stem))
    name, keys = experiment.name, experiment.tuned_keys
    if not keys:
        raise StudyError(f"{layout.study_file(name)}: there is no section tune: add it, as in experiments/fair16.yaml")
    table = layout.report_directory(name) / "tuning.csv"
    arguments = ["--cores", cores, *options, "--config", f"experiments={name}", "--", str(table)]
    if dry_run:
        for directory, trial in {trial.directory.parent: trial for trial in layout.trials(experiment)}.items():
            click.echo(f"{trial.arm}, {values_text(trial.values)}, seed {trial.seed}: {directory}")
        return _snakemake("--dry-run", *arguments)
    _snakemake(*arguments)
    trials = read_table(table, trial_columns(keys))
    tuned = tuned_record(experiment, trials)
    for arm, best in tuned.arms.items():
        own = f", as in {name}" if best.arm == arm else ""
        click.echo(f"{arm}: the best trials have {values_text(best.values)}{own}.")
    for sentence in edges(tuned):
        click.echo(sentence)
    path = layout.study_file(f"{name}_tuned")
    click.echo(save_study(tuned_study(experiment, trials, tuned), path, overwrite))
    click.echo(f"Run it: {layout.snakemake_command('--cores', 'all', '--config', f'experiments={path.stem}')}")
