"""Writes the report pages of one study."""

from pathlib import Path

from convergence.jobs import job  # isort: split

from convergence.analysis.verdict import read_verdict, to_markdown
from convergence.pages import cost_page, data_page, provenance_page, to_html
from convergence.tables import read_table
from diffusion.files import atomic_write, read_json

with job(snakemake):
    study, source = snakemake.wildcards.study, snakemake.input
    verdict = read_verdict(Path(source.verdict))
    provenances = [read_json(Path(path)) for path in source.provenances]
    pages = {
        "verdict": to_markdown(verdict),
        "data": data_page(study, read_json(Path(source.manifest))),
        "provenance": provenance_page(study, provenances, snakemake.params.experiment, verdict.warnings),
        "cost": cost_page(study, read_table(source.metrics), verdict.costs),
    }
    for name, markdown in pages.items():
        with atomic_write(Path(snakemake.output[name])) as file:
            file.write(to_html(markdown, f"{name.capitalize()} of {study}").encode())
