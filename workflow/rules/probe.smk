# The loss and the gradient noise of every checkpoint, in bins of timesteps.


rule probe:
    input:
        unpack(lambda wildcards: dataset_files(experiment_of(wildcards))),
        weights=layout.STEP / "weights.safetensors",
        provenance=layout.STEP / "provenance.json",
    output:
        layout.STEP / "probe.csv",
    log:
        layout.STEP / "probe.log",
    wildcard_constraints:
        arm="(?!init-)[a-z0-9_]+-[0-9a-f]{8}",
    conda:
        "../../environment.yml"
    threads: threads_of
    resources:
        gpu=gpus_of,
        jobs_per_gpu=jobs_per_gpu_of_probe,
        runtime=minutes(probe_request),
        mem_mb=megabytes(probe_request),
    params:
        run=lambda wildcards: run_of(wildcards).canonical(),
        probe=lambda wildcards: experiment_of(wildcards).probe.canonical(),
        # A checkpoint is probed again after a change of the columns or of the computation.
        version=2,
    message:
        "Probe {wildcards.study} {wildcards.arm} seed {wildcards.seed} at step {wildcards.step}"
    script:
        "../scripts/probe.py"
