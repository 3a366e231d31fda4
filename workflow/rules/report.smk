# One table, its figures, the verdict, and the pages of the report.


# Written by the rule `pages`, from workflow/report/front.rst and the verdict.
report: Path("reports/pages/front.rst").resolve()


localrules:
    collect,
    metrics,
    mechanism,
    verdict,
    figures,
    pages,


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
        report(
            "reports/metrics.csv",
            caption="../report/metrics.rst",
            category="2. Curves",
            labels={"content": "Numbers (CSV)"},
        ),
    log:
        "results/metrics.log",
    conda:
        "../../environment.yml"
    message:
        "Collect the metrics of all studies"
    script:
        "../scripts/metrics.py"


rule mechanism:
    input:
        [path for study in EXPERIMENTS for path in probe_files(study)],
    output:
        table=report(
            "reports/mechanism.csv",
            caption="../report/mechanism_table.rst",
            category="5. Mechanism",
            labels={"content": "Numbers (CSV)"},
        ),
        figure=report(
            "reports/mechanism.png",
            caption="../report/mechanism.rst",
            category="5. Mechanism",
            labels={"content": "Loss and gradient noise"},
        ),
    log:
        "results/mechanism.log",
    conda:
        "../../environment.yml"
    params:
        comparisons={
            e.name: {key: e.comparison[key] for key in ("baseline", "candidates")} for e in EXPERIMENTS.values()
        },
    message:
        "Collect the probes and draw them"
    script:
        "../scripts/mechanism.py"


rule verdict:
    input:
        metrics="reports/metrics.csv",
        mechanism="reports/mechanism.csv",
    output:
        speedups=report(
            "reports/speedup.csv",
            caption="../report/speedup.rst",
            category="1. Verdict",
            labels={"content": "Numbers (CSV)"},
        ),
        verdict="reports/verdict.md",
        forest=report(
            "reports/speedups.png",
            caption="../report/forest.rst",
            category="1. Verdict",
            labels={"content": "Forest plot"},
        ),
    log:
        "results/verdict.log",
    conda:
        "../../environment.yml"
    params:
        comparisons={e.name: e.compare and e.comparison for e in EXPERIMENTS.values()},
    message:
        "Compare the arms"
    script:
        "../scripts/verdict.py"


rule figures:
    input:
        metrics="reports/metrics.csv",
        speedups="reports/speedup.csv",
        previews=[path for study in EXPERIMENTS for path in checkpoint_files(study, "preview.png")],
        published=[str(e.external_curves) for e in EXPERIMENTS.values() if e.external_curves],
    output:
        curves=report(
            "reports/fid_curves.png",
            caption="../report/curves.rst",
            category="2. Curves",
            labels={"content": "Curves"},
        ),
        curves_svg="reports/fid_curves.svg",
        samples=report(
            "reports/samples.png",
            caption="../report/samples.rst",
            category="3. Samples",
            labels={"content": "Samples"},
        ),
        schedules=report(
            "reports/schedules.png",
            caption="../report/schedules.rst",
            category="4. Schedules",
            labels={"content": "Schedules"},
        ),
        schedules_svg="reports/schedules.svg",
    log:
        "results/figures.log",
    conda:
        "../../environment.yml"
    params:
        published={e.name: str(e.external_curves) for e in EXPERIMENTS.values() if e.external_curves},
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


rule pages:
    input:
        metrics="reports/metrics.csv",
        verdict="reports/verdict.md",
        manifests=[dataset_files(e)["manifest"] for e in EXPERIMENTS.values()],
        provenances=[path for study in EXPERIMENTS for path in checkpoint_files(study, "provenance.json")],
    output:
        front="reports/pages/front.rst",
        verdict=report(
            "reports/pages/verdict.html",
            caption="../report/verdict.rst",
            category="1. Verdict",
            labels={"content": "Answer and tables"},
        ),
        data=report(
            "reports/pages/data.html",
            caption="../report/data.rst",
            category="6. Data",
            labels={"content": "Datasets"},
        ),
        provenance=report(
            "reports/pages/provenance.html",
            caption="../report/provenance.rst",
            category="7. Provenance",
            labels={"content": "Provenance"},
        ),
        cost=report(
            "reports/pages/cost.html",
            caption="../report/cost.rst",
            category="8. Cost",
            labels={"content": "Training time"},
        ),
    log:
        "results/pages.log",
    conda:
        "../../environment.yml"
    params:
        introduction=(Path(workflow.basedir) / "workflow/report/front.rst").read_text(encoding="utf-8"),
        studies={
            study: {
                "manifest": str(dataset_files(e)["manifest"]),
                "provenances": [str(path) for path in checkpoint_files(study, "provenance.json")],
                "experiment": (Path(workflow.basedir) / "experiments" / f"{study}.yaml").read_text(encoding="utf-8"),
            }
            for study, e in EXPERIMENTS.items()
        },
    message:
        "Write the pages of the report"
    script:
        "../scripts/pages.py"
