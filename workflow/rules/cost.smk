# What a training step of each arm costs, if nothing else runs on the machine.


rule cost:
    input:
        unpack(lambda wildcards: dataset_files(EXPERIMENTS[wildcards.study])),
    output:
        layout.RESULTS / "{study}/cost.csv",
    log:
        layout.RESULTS / "{study}/cost.log",
    conda:
        "../../environment.yml"
    # All cores of this machine, so that Snakemake runs no other job at the same time; on a cluster, a node of its own.
    threads: cores_of_cost
    resources:
        gpu=lambda wildcards: gpus_for(EXPERIMENTS[wildcards.study]),
        jobs_per_gpu=lambda wildcards: min(jobs_per_gpu(EXPERIMENTS[wildcards.study]), 1),
        processes=lambda wildcards: EXPERIMENTS[wildcards.study].processes,
        slurm_extra="--exclusive",
        runtime=minutes(cost_request),
        mem_mb=megabytes(cost_request),
    params:
        runs=lambda wildcards: run_settings(wildcards.study),
    message:
        "Time the training steps of {wildcards.study}"
    script:
        "../scripts/cost.py"
