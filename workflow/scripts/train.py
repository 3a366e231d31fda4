"""Trains one segment of one run, from one checkpoint to the next."""

from pathlib import Path

from convergence.jobs import job, job_name, wait_for_gpus
from convergence.provenance import check_images, environment, tables_hash, write_provenance
from convergence.train_job import Segment, drop_older_states, train
from diffusion.averages import average_name, weights_files
from diffusion.config import RunConfig
from diffusion.files import read_json, sha256
from diffusion.training.state import summary

with job(snakemake):
    run = RunConfig.model_validate_json(snakemake.params.run)
    origin, tables = environment(), tables_hash(run)  # before training: code and packages may change later
    dataset = read_json(Path(snakemake.input.manifest))
    state = Path(snakemake.output.state)
    if snakemake.input.previous:
        check_images(Path(snakemake.input.previous).parent, Path(snakemake.input.manifest))
        drop_older_states(Path(snakemake.input.previous))
    segment = Segment(
        run=run,
        seed=int(snakemake.wildcards.seed),
        dataset=Path(snakemake.input.images).parent,
        previous=snakemake.input.previous or None,
        directory=state.parent,
        until=int(snakemake.wildcards.step),
        gpus=min(snakemake.resources.gpu, 1),
        threads=run.train.threads,
        log=snakemake.log[0],
        name=job_name(snakemake),
    )
    wait_for_gpus(snakemake)
    train(segment, snakemake.resources.processes)
    since = int(segment.previous.parent.name.removeprefix("step")) if segment.previous else 0
    facts = summary(state, since)
    *earlier, source = facts.pop("sources")
    names = map(average_name, run.train.averages)
    write_provenance(
        Path(snakemake.output.provenance),
        **facts,
        **origin,
        device="cuda" if segment.gpus else "cpu",
        images=facts["step"] * run.train.batch_size,
        mse_images=(facts["step"] - since) * run.train.batch_size,
        processes=snakemake.resources.processes,
        sha256=sha256(Path(snakemake.output.weights)),
        averages={name: sha256(state.with_name(file)) for name, file in weights_files(names).items()},
        config_hash=run.hash8,
        dataset_sha256=dataset["sha256"],
        dataset_images=dataset["count"],
        source_hash=source,
        earlier_source_hashes=earlier,
        tables_hash=tables,
    )
