# All checkpoints with the same seed are sampled from the same latents, and compared with the dataset in the same job.


# A Snakemake checkpoint, like `dataset` and for the same reason.
checkpoint reference:
    input:
        unpack(lambda wildcards: dataset_files(REFERENCES[wildcards.reference][0])),
    output:
        layout.REFERENCES / "{reference}.npz",
    log:
        layout.REFERENCES / "{reference}.log",
    conda:
        "../../environment.yml"
    threads: threads_of_reference
    resources:
        gpu=lambda wildcards: gpus_for(REFERENCES[wildcards.reference][0]),
        jobs_per_gpu=lambda wildcards: jobs_per_gpu(REFERENCES[wildcards.reference][0]),
        torch_threads=threads_of_reference,
        runtime=minutes(reference_request),
        mem_mb=megabytes(reference_request),
    params:
        evaluate=lambda wildcards: reference_settings(*REFERENCES[wildcards.reference]),
        features=lambda wildcards: REFERENCES[wildcards.reference][1],
        held_out=lambda wildcards: REFERENCES[wildcards.reference][0].dataset.held_out,
    message:
        "Reference features {wildcards.reference}"
    script:
        "../scripts/reference.py"


rule evaluate:
    input:
        unpack(lambda wildcards: dataset_files(experiment_of(wildcards))),
        weights=layout.STEP / "weights.safetensors",
        provenance=layout.STEP / "provenance.json",
        references=references_of,
    output:
        metrics=layout.STEP / "metrics.csv",
        # How much each sample changes each metric: [rows of metrics.csv, samples].
        influences=layout.STEP / "influences.npy",
        preview=layout.STEP / "preview.png",
        # Outputs cannot depend on wildcards: all selected studies keep their samples, or none does.
        samples=[layout.STEP / "samples.npy"] if any(e.sample.keep for e in EXPERIMENTS.values()) else [],
    log:
        layout.STEP / "evaluate.log",
    conda:
        "../../environment.yml"
    threads: threads_of
    resources:
        gpu=gpus_of,
        jobs_per_gpu=lambda wildcards: jobs_per_gpu(experiment_of(wildcards)),
        torch_threads=threads_of,
        runtime=minutes(evaluate_request),
        mem_mb=megabytes(evaluate_request),
    params:
        sample=lambda wildcards: sample_settings(experiment_of(wildcards)),
        evaluate=lambda wildcards: experiment_of(wildcards).evaluate.canonical(),
        held_out=lambda wildcards: experiment_of(wildcards).dataset.held_out,
        # Not read: results of another version are made again.
        version=EVALUATE_VERSION,
    message:
        "Evaluate {wildcards.study} {wildcards.arm} seed {wildcards.seed} at step {wildcards.step}"
    script:
        "../scripts/evaluate.py"
