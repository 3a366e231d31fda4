"""Draws the curves of all selected studies and a comparison of several studies, and writes the front page."""

from pathlib import Path

from convergence.jobs import job  # isort: split

import pandas as pd

from convergence.analysis.comparison import EFFECT_COLUMNS, effects_table
from convergence.analysis.verdict import read_verdict
from convergence.figures.curves import fid_curves
from convergence.figures.forest import draw_studies
from convergence.pages import front_page
from convergence.tables import of_average, read_curves, read_table, write_table
from diffusion.files import atomic_write

with job(snakemake):
    output, params = snakemake.output, snakemake.params
    metrics = pd.concat([of_average(read_table(path)) for path in snakemake.input.metrics])
    verdicts = [read_verdict(path) for path in snakemake.input.verdicts]
    comparisons = [comparison for verdict in verdicts for comparison in verdict.comparisons]
    # A file of external curves may hold several studies; a panel shows only the file that its study names.
    external = [read_curves(Path(path), study).query("study == @study") for study, path in params.external.items()]
    external_curves = pd.concat(external) if external else None
    paths = [Path(output.curves), Path(output.curves_svg)]
    fid_curves(metrics, paths, comparisons=comparisons, external_curves=external_curves, arms=params.arms)
    if len(verdicts) > 1:
        primary = [verdict.primary for verdict in verdicts if verdict.primary]
        draw_studies(primary, [Path(output.studies)])
        effects = effects_table(primary)
        columns = [column for column in EFFECT_COLUMNS if column != "seed"]
        write_table(effects[effects["seed"].isna()], Path(output.studies_table), columns)
    answers = {verdict.study: verdict.answer for verdict in verdicts}
    with atomic_write(Path(output.front)) as file:
        file.write(front_page(params.introduction, answers).encode())
