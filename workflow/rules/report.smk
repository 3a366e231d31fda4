# One table and its figures.


localrules:
    collect,
    metrics,
    verdict,
    figures,


rule collect:
    input:
        lambda wildcards: checkpoint_files(wildcards.study, "metrics.csv"),
    output:
        "results/{study}/metrics.csv",
    log:
        "results/{study}/collect.log",
    conda:
        "../../environment.yml"
    params:
        arms=lambda wildcards: [arm for arm, *_ in layout.checkpoints(EXPERIMENTS[wildcards.study])],
    message:
        "Collect the metrics of {wildcards.study}"
    script:
        "../scripts/collect.py"


rule metrics:
    input:
        expand("results/{study}/metrics.csv", study=EXPERIMENTS),
    output:
        "reports/metrics.csv",
    log:
        "results/metrics.log",
    conda:
        "../../environment.yml"
    message:
        "Collect the metrics of all studies"
    script:
        "../scripts/metrics.py"


rule verdict:
    input:
        metrics="reports/metrics.csv",
    output:
        speedups="reports/speedup.csv",
        verdict="reports/verdict.md",
        forest="reports/speedups.png",
    log:
        "results/verdict.log",
    conda:
        "../../environment.yml"
    params:
        comparisons={
            e.name: e.compare and e.compare.model_dump(mode="json") | {"features": e.evaluate.features[0]}
            for e in EXPERIMENTS.values()
        },
    message:
        "Compare the arms"
    script:
        "../scripts/verdict.py"


rule figures:
    input:
        metrics="reports/metrics.csv",
        speedups="reports/speedup.csv",
        previews=[path for study in EXPERIMENTS for path in checkpoint_files(study, "preview.png")],
    output:
        curves="reports/fid_curves.png",
        curves_svg="reports/fid_curves.svg",
        samples="reports/samples.png",
        schedules="reports/schedules.png",
        schedules_svg="reports/schedules.svg",
    log:
        "results/figures.log",
    conda:
        "../../environment.yml"
    params:
        # The first seed of each arm is shown.
        cells=[
            (e.name, arm, seed, step, step * e.run(arm).train.batch_size, str(path / "preview.png"))
            for e in EXPERIMENTS.values()
            for arm, seed, step, path in layout.checkpoints(e)
            if seed == e.seeds[0]
        ],
        runs=[(e.name, arm, e.run(arm).canonical()) for e in EXPERIMENTS.values() for arm in e.arms],
    message:
        "Draw the figures"
    script:
        "../scripts/figures.py"
