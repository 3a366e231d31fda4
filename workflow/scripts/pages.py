"""Write the pages of the report."""

from pathlib import Path

from convergence.jobs import job
from convergence.pages import cost_page, data_page, front_page, provenance_page, to_html
from convergence.tables import read_table
from diffusion.files import atomic_write, read_json

with job(snakemake):
    studies = snakemake.params.studies
    pages = {
        "verdict": Path(snakemake.input.verdict).read_text(encoding="utf-8"),
        "data": data_page({study: read_json(Path(of["manifest"])) for study, of in studies.items()}),
        "provenance": provenance_page(
            {study: [read_json(Path(path)) for path in of["provenances"]] for study, of in studies.items()},
            {study: of["experiment"] for study, of in studies.items()},
        ),
        "cost": cost_page(read_table(snakemake.input.metrics)),
    }
    with atomic_write(Path(snakemake.output.front)) as file:
        file.write(front_page(snakemake.params.introduction, pages["verdict"]).encode())
    for name, markdown in pages.items():
        with atomic_write(Path(snakemake.output[name])) as file:
            file.write(to_html(markdown, name.capitalize()).encode())
