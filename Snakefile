# The convergence study: `snakemake --cores all` makes all tables, figures and pages of the selected studies.
#
#   snakemake --cores all reports/fid_curves.png
#   snakemake --cores all --config experiments=openmoji,my_study
#
# Studies are the files in experiments/ of the working directory; with --directory, of that directory.
# Each phase is a file in workflow/rules; common.smk holds the functions that the phases share.

from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/common.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/cost.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/probe.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/tuning.smk"


# With --until or --omit-from, Snakemake loses the jobs after a checkpoint when it decides again which jobs must run.
# While it reads this file, it does not know these options yet.
if {"--until", "-U", "--omit-from", "-O"} & {argument.split("=")[0] for argument in sys.argv}:
    for name in ("dataset", "reference"):
        workflow.get_rule(name).is_checkpoint = False


localrules:
    all,


rule all:
    default_target: True
    input:
        rules.overview.output,
        expand(rules.pages.output, study=EXPERIMENTS),
