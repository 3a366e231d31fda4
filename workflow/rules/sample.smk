# Every checkpoint is sampled from the same latents; the array is dropped after evaluation, unless it is to be kept.


rule sample:
    input:
        weights="results/{study}/{arm}/seed{seed}/step{step}/weights.safetensors",
        provenance="results/{study}/{arm}/seed{seed}/step{step}/provenance.json",
    output:
        samples=droppable("results/{study}/{arm}/seed{seed}/step{step}/samples.npy"),
        digest=droppable("results/{study}/{arm}/seed{seed}/step{step}/samples.sha256"),
        preview="results/{study}/{arm}/seed{seed}/step{step}/preview.png",
    log:
        "results/{study}/{arm}/seed{seed}/step{step}/sample.log",
    conda:
        "../../environment.yml"
    threads: threads_of
    resources:
        gpu=gpus_of,
        runtime=minutes(sample_request),
        mem_mb=megabytes(sample_request),
    params:
        sample=lambda wildcards: experiment_of(wildcards).sample.model_dump_json(exclude={"keep"}),
    message:
        "Sample {wildcards.study} {wildcards.arm} seed {wildcards.seed} at step {wildcards.step}"
    script:
        "../scripts/sample.py"
