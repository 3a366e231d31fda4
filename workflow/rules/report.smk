# The tables, figures, verdict and pages of each study, and the figure and front page of all selected studies.


# Written by the rule `overview` from workflow/report/front.rst and the verdicts.
report: layout.FRONT_PAGE.resolve()


localrules:
    verdict,
    figures,
    averages,
    pages,
    overview,


rule verdict:
    input:
        metrics=lambda wildcards: checkpoint_files(wildcards.study, "metrics.csv"),
        influences=lambda wildcards: checkpoint_files(wildcards.study, "influences.npy"),
        probes=lambda wildcards: probe_files(wildcards.study),
        # Of the probed checkpoints: the size of their last updates.
        probed=lambda wildcards: [path.with_name("provenance.json") for path in probe_files(wildcards.study)],
        provenances=lambda wildcards: [path / "provenance.json" for _, path in last_checkpoints(wildcards.study)],
        cost=rules.cost.output[0],
        # Not read: without kept samples, a checkpoint is evaluated again, also after other changes of its settings.
        samples=lambda wildcards: kept_samples(wildcards.study),
    output:
        metrics=report(
            layout.REPORT / "metrics.csv",
            caption="../report/metrics.rst",
            category="2. Curves",
            labels={"study": "{study}", "content": "Numbers (CSV)"},
        ),
        mechanism=report(
            layout.REPORT / "mechanism.csv",
            caption="../report/mechanism_table.rst",
            category="5. Mechanism",
            labels={"study": "{study}", "content": "Numbers (CSV)"},
        ),
        cost=report(
            layout.REPORT / "cost.csv",
            caption="../report/cost_table.rst",
            category="8. Cost",
            labels={"study": "{study}", "content": "Numbers (CSV)"},
        ),
        verdict=layout.REPORT / "verdict.json",
        markdown=layout.REPORT / "verdict.md",
        effects=report(
            layout.REPORT / "effects.csv",
            caption="../report/effects.rst",
            category="1. Verdict",
            labels={"study": "{study}", "content": "Numbers (CSV)"},
        ),
    log:
        layout.RESULTS / "{study}/verdict.log",
    conda:
        "../../environment.yml"
    params:
        arms=lambda wildcards: [arm for arm, *_ in layout.checkpoints(EXPERIMENTS[wildcards.study])],
        plan=lambda wildcards: plan_text(study_plan.plan_in_force(EXPERIMENTS[wildcards.study])),
        current=lambda wildcards: plan_text(study_plan.current_plan(EXPERIMENTS[wildcards.study])),
        trained=lambda wildcards: [arm for arm, _ in last_checkpoints(wildcards.study)],
        runs=lambda wildcards: run_settings(wildcards.study),
        rows=lambda wildcards: evaluated_metrics(EXPERIMENTS[wildcards.study]),
        bins=lambda wildcards: probed_bins(EXPERIMENTS[wildcards.study]),
        few_images=lambda wildcards: few_images(EXPERIMENTS[wildcards.study]),
        # Not read: after a change of the code, the verdict is written again, with a warning.
        code=source_hash(),
    message:
        "Compare the arms of {wildcards.study}"
    script:
        "../scripts/verdict.py"


rule figures:
    input:
        # For a row of real images.
        unpack(lambda wildcards: dataset_files(EXPERIMENTS[wildcards.study])),
        metrics=layout.REPORT / "metrics.csv",
        verdict=layout.REPORT / "verdict.json",
        previews=lambda wildcards: checkpoint_files(wildcards.study, "preview.png"),
        external=lambda wildcards: external_curves(wildcards.study),
        samples=lambda wildcards: kept_samples(wildcards.study),
    output:
        forest=report(
            layout.REPORT / "speedups.png",
            caption="../report/forest.rst",
            category="1. Verdict",
            labels={"study": "{study}", "content": "Forest plot"},
        ),
        curves=report(
            layout.REPORT / "fid_curves.png",
            caption="../report/curves.rst",
            category="2. Curves",
            labels={"study": "{study}", "content": "Curves"},
        ),
        curves_svg=layout.REPORT / "fid_curves.svg",
        hours=report(
            layout.REPORT / "hour_curves.png",
            caption="../report/hours.rst",
            category="2. Curves",
            labels={"study": "{study}", "content": "Curves over hours"},
        ),
        samples=report(
            layout.REPORT / "samples.png",
            caption="../report/samples.rst",
            category="3. Samples",
            labels={"study": "{study}", "content": "Samples"},
        ),
        schedules=report(
            layout.REPORT / "schedules.png",
            caption="../report/schedules.rst",
            category="4. Schedules",
            labels={"study": "{study}", "content": "Schedules"},
        ),
        schedules_svg=layout.REPORT / "schedules.svg",
        mechanism=report(
            layout.REPORT / "mechanism.png",
            caption="../report/mechanism.rst",
            category="5. Mechanism",
            labels={"study": "{study}", "content": "Loss and gradient noise"},
        ),
    log:
        layout.RESULTS / "{study}/figures.log",
    conda:
        "../../environment.yml"
    params:
        cells=lambda wildcards: preview_cells(EXPERIMENTS[wildcards.study]),
        seed=lambda wildcards: EXPERIMENTS[wildcards.study].seeds[0],
        runs=lambda wildcards: run_settings(wildcards.study),
    message:
        "Draw the figures of {wildcards.study}"
    script:
        "../scripts/figures.py"


rule averages:
    input:
        metrics=layout.REPORT / "metrics.csv",
    output:
        report(
            layout.REPORT / "averages.png",
            caption="../report/averages.rst",
            category="2. Curves",
            labels={"study": "{study}", "content": "Averages of the weights"},
        ),
    log:
        layout.RESULTS / "{study}/averages.log",
    conda:
        "../../environment.yml"
    params:
        runs=lambda wildcards: run_settings(wildcards.study),
    message:
        "Draw the averages of the weights of {wildcards.study}"
    script:
        "../scripts/averages.py"


rule pages:
    input:
        verdict=layout.REPORT / "verdict.json",
        metrics=layout.REPORT / "metrics.csv",
        manifest=lambda wildcards: dataset_files(EXPERIMENTS[wildcards.study])["manifest"],
        provenances=lambda wildcards: checkpoint_files(wildcards.study, "provenance.json"),
    output:
        verdict=report(
            layout.REPORT / "pages/verdict.html",
            caption="../report/verdict.rst",
            category="1. Verdict",
            labels={"study": "{study}", "content": "Answer and tables"},
        ),
        data=report(
            layout.REPORT / "pages/data.html",
            caption="../report/data.rst",
            category="6. Data",
            labels={"study": "{study}", "content": "Dataset"},
        ),
        provenance=report(
            layout.REPORT / "pages/provenance.html",
            caption="../report/provenance.rst",
            category="7. Provenance",
            labels={"study": "{study}", "content": "Provenance"},
        ),
        cost=report(
            layout.REPORT / "pages/cost.html",
            caption="../report/cost.rst",
            category="8. Cost",
            labels={"study": "{study}", "content": "Training time"},
        ),
    log:
        layout.RESULTS / "{study}/pages.log",
    conda:
        "../../environment.yml"
    params:
        experiment=lambda wildcards: EXPERIMENTS[wildcards.study].text,
    message:
        "Write the report pages of {wildcards.study}"
    script:
        "../scripts/pages.py"


# Outputs of `overview` that need several studies.
STUDIES_OUTPUT = (
    {
        "studies": report(
            layout.STUDIES_FIGURE,
            caption="../report/studies.rst",
            category="1. Verdict",
            labels={"study": "all", "content": "Forest plot"},
        ),
        "studies_table": report(
            layout.STUDIES_FIGURE.with_suffix(".csv"),
            caption="../report/studies.rst",
            category="1. Verdict",
            labels={"study": "all", "content": "Numbers (CSV)"},
        ),
    }
    if len(EXPERIMENTS) > 1
    else {}
)


rule overview:
    input:
        metrics=expand(rules.verdict.output.metrics, study=EXPERIMENTS),
        verdicts=expand(rules.verdict.output.verdict, study=EXPERIMENTS),
        external=[path for study in EXPERIMENTS for path in external_curves(study)],
        # Not read: they make this target draw all figures.
        figures=expand(rules.figures.output, study=EXPERIMENTS),
        averages=averages_figures(),
    output:
        **STUDIES_OUTPUT,
        curves=report(
            layout.FIGURE,
            caption="../report/curves.rst",
            category="2. Curves",
            labels={"study": "all", "content": "Curves"},
        ),
        curves_svg=layout.FIGURE.with_suffix(".svg"),
        front=layout.FRONT_PAGE,
    log:
        layout.RESULTS / "overview.log",
    conda:
        "../../environment.yml"
    params:
        arms={study: list(experiment.arms) for study, experiment in EXPERIMENTS.items()},
        external={study: str(path) for study in EXPERIMENTS for path in external_curves(study)},
        introduction=(layout.ROOT / "workflow/report/front.rst").read_text(encoding="utf-8"),
    message:
        "Draw the curves of all selected studies"
    script:
        "../scripts/overview.py"
