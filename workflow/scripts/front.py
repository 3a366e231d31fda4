"""Write the front page of the report on the selected studies."""

from pathlib import Path

from convergence.analysis.verdict import read_verdict
from convergence.jobs import job
from convergence.pages import front_page
from diffusion.files import atomic_write

with job(snakemake):
    verdicts = [read_verdict(Path(path)) for path in snakemake.input]
    answers = {verdict.study: verdict.answer for verdict in verdicts}
    with atomic_write(Path(snakemake.output[0])) as file:
        file.write(front_page(snakemake.params.introduction, answers).encode())
