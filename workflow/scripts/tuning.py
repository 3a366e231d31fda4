"""Selects the best values of each arm of one study from its trials, and draws the trials."""

from pathlib import Path

from convergence.jobs import job  # isort: split

from convergence import layout
from convergence.analysis.tuning import trial_columns, trials_table, tuned_record
from convergence.figures.tuning import draw_tuning
from convergence.study_file import load_experiment
from convergence.study_plan import current_plan
from convergence.tables import collect, write_table

with job(snakemake):
    output, params = snakemake.output, snakemake.params
    experiment = load_experiment(layout.STUDIES / f"{snakemake.wildcards.study}.yaml")
    plan, keys = current_plan(experiment), experiment.tuned_keys
    labels = [Path(directory).parents[1].name for *_, directory in params.trials]  # one per arm and values
    settings = {label: (arm, values) for label, (arm, values, *_) in zip(labels, params.trials, strict=True)}
    metrics = collect([Path(path) for path in snakemake.input.metrics], labels, params.rows)
    trials = trials_table(metrics, settings, plan, keys)
    write_table(trials, Path(output.table), trial_columns(keys))
    draw_tuning(experiment, plan, trials, tuned_record(experiment, trials), [Path(output.figure)])
