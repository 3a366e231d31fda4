# Why an arm converges as it does: loss and gradient noise of every checkpoint, timestep by timestep.


rule probe:
    input:
        unpack(lambda wildcards: dataset_files(experiment_of(wildcards))),
        weights="results/{study}/{arm}/seed{seed}/step{step}/weights.safetensors",
        provenance="results/{study}/{arm}/seed{seed}/step{step}/provenance.json",
    output:
        "results/{study}/{arm}/seed{seed}/step{step}/probe.csv",
    log:
        "results/{study}/{arm}/seed{seed}/step{step}/probe.log",
    wildcard_constraints:
        arm="(?!init-)[a-z0-9_]+-[0-9a-f]{8}",
    conda:
        "../../environment.yml"
    threads: threads_of
    resources:
        gpu=gpus_of,
        runtime=minutes(probe_request),
        mem_mb=megabytes(probe_request),
    params:
        run=lambda wildcards: run_of(wildcards).canonical(),
        probe=lambda wildcards: experiment_of(wildcards).probe.model_dump(),
    message:
        "Probe {wildcards.study} {wildcards.arm} seed {wildcards.seed} at step {wildcards.step}"
    script:
        "../scripts/probe.py"
