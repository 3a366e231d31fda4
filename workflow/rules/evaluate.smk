# Samples against the dataset, by the features of a fixed network.


rule reference:
    input:
        unpack(lambda wildcards: dataset_files(REFERENCES[wildcards.reference][0])),
    output:
        "results/references/{reference}.npz",
    log:
        "results/references/{reference}.log",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: REFERENCES[wildcards.reference][0].train.threads
    resources:
        gpu=lambda wildcards: gpus_for(REFERENCES[wildcards.reference][0]),
        runtime=minutes(reference_request),
        mem_mb=megabytes(reference_request),
    params:
        features=lambda wildcards: REFERENCES[wildcards.reference][1],
        weights=lambda wildcards: weights_of(REFERENCES[wildcards.reference][0]),
        reference=lambda wildcards: reference_of(REFERENCES[wildcards.reference][0]),
    message:
        "Reference features {wildcards.reference}"
    script:
        "../scripts/reference.py"


rule evaluate:
    input:
        unpack(lambda wildcards: dataset_files(experiment_of(wildcards))),
        samples="results/{study}/{arm}/seed{seed}/step{step}/samples.npy",
        digest="results/{study}/{arm}/seed{seed}/step{step}/samples.sha256",
        provenance="results/{study}/{arm}/seed{seed}/step{step}/provenance.json",
        references=references_of,
    output:
        "results/{study}/{arm}/seed{seed}/step{step}/metrics.csv",
    log:
        "results/{study}/{arm}/seed{seed}/step{step}/evaluate.log",
    conda:
        "../../environment.yml"
    threads: threads_of
    resources:
        gpu=gpus_of,
        runtime=minutes(evaluate_request),
        mem_mb=megabytes(evaluate_request),
    params:
        features=lambda wildcards: list(experiment_of(wildcards).evaluate.features),
        weights=lambda wildcards: weights_of(experiment_of(wildcards)),
        reference=lambda wildcards: reference_of(experiment_of(wildcards)),
        metrics=lambda wildcards: list(experiment_of(wildcards).evaluate.metrics),
    message:
        "Evaluate {wildcards.study} {wildcards.arm} seed {wildcards.seed} at step {wildcards.step}"
    script:
        "../scripts/evaluate.py"
