# A run is a chain of segments from checkpoint to checkpoint. Each segment is a job.


localrules:
    initialise,


rule initialise:
    input:
        # A dataset that cannot be prepared is reported before anything else is computed.
        manifest=lambda wildcards: ancient(dataset_files(experiment_of(wildcards))["manifest"]),
    output:
        weights=layout.STEP / "weights.safetensors",
        provenance=layout.STEP / "provenance.json",
    log:
        layout.STEP / "initialise.log",
    wildcard_constraints:
        arm="init-[0-9a-f]{8}",
        step="0",
    conda:
        "../../environment.yml"
    params:
        initial=lambda wildcards: run_of(wildcards).initial.canonical(),
    message:
        "Initialise the net of {wildcards.study}, seed {wildcards.seed}"
    script:
        "../scripts/initialise.py"


rule train:
    input:
        unpack(training_files),
        previous=previous_state,
    output:
        weights=layout.STEP / "weights.safetensors",
        state=layout.STEP / "state.pt",
        provenance=layout.STEP / "provenance.json",
    # log.csv in the directory of the run is not declared: all segments of the run write it.
    log:
        layout.STEP / "train.log",
    wildcard_constraints:
        arm="(?!init-)[a-z0-9_]+-[0-9a-f]{8}",
        step=r"[1-9]\d*",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: threads_of(wildcards) * processes_of(wildcards)
    resources:
        gpu=lambda wildcards: gpus_of(wildcards) * processes_of(wildcards),
        jobs_per_gpu=jobs_per_gpu_of_training,
        # Not a param: another number of processes resumes a run and does not repeat it.
        processes=processes_of,
        runtime=minutes(train_request),
        mem_mb=megabytes(train_request),
    params:
        run=lambda wildcards: run_of(wildcards).canonical(),
    message:
        "Train {wildcards.study} {wildcards.arm} seed {wildcards.seed} to step {wildcards.step}"
    script:
        "../scripts/train.py"
