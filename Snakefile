# The convergence study: `snakemake --cores all` makes every figure of the chosen experiments.
#
#   snakemake --cores all reports/fid_curves.png
#   snakemake --cores all --config experiments=openmoji,my_study
#
# Each phase is a file in workflow/rules; what the phases agree on is in common.smk.

from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/common.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/probe.smk"
include: "workflow/rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        rules.figures.output,
        rules.mechanism.output,
        rules.verdict.output,
        rules.pages.output,
