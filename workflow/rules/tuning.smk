# The trials of a study with a section `tune`: which values are best for each arm? `convergence tune` uses the result.


localrules:
    tuning,


rule tuning:
    input:
        metrics=lambda wildcards: [
            trial.directory / "metrics.csv" for trial in layout.trials(EXPERIMENTS[wildcards.study])
        ],
    output:
        table=report(
            layout.REPORT / "tuning.csv",
            caption="../report/tuning.rst",
            category="9. Tuning",
            labels={"study": "{study}", "content": "Numbers (CSV)"},
        ),
        figure=report(
            layout.REPORT / "tuning.png",
            caption="../report/tuning.rst",
            category="9. Tuning",
            labels={"study": "{study}", "content": "Trials"},
        ),
    log:
        layout.RESULTS / "{study}/tuning.log",
    wildcard_constraints:
        study="|".join(study for study in EXPERIMENTS if EXPERIMENTS[study].tune) or "none",
    conda:
        "../../environment.yml"
    params:
        trials=lambda wildcards: trial_settings(wildcards.study),
        # Not read: after an edit of the study, the table is written again.
        study=lambda wildcards: EXPERIMENTS[wildcards.study].text,
        rows=lambda wildcards: evaluated_metrics(EXPERIMENTS[wildcards.study]),
        # Not read: after a change of the code, the table is written again.
        code=source_hash(),
    message:
        "Select the best values of each arm of {wildcards.study}"
    script:
        "../scripts/tuning.py"
