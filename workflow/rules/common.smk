# Loads the selected studies, and finds the settings of a job from its wildcards.

import sys
from pathlib import Path

# The packages that this file and the scripts import are next to the Snakefile.
sys.path.insert(0, workflow.basedir)

from convergence import gpus, layout, resources, snakefile, start_checks, start_warnings, study_plan, terminal
from convergence.errors import SAME_COMMAND, exit_on_user_error
from convergence.provenance import newest_provenances, trained_on
from convergence.schema import Evaluate
from convergence.tracking import process
from diffusion.averages import average_name
from diffusion.config import EVALUATE_VERSION
from diffusion.sources import source_hash

snakefile.set_environment(workflow.basedir)
snakefile.hold_interrupts()
terminal.shorten_output(lambda: start_warnings.print_repeated(training_jobs()))
# Snakemake adds a line number of this file to every exception except SystemExit.
with exit_on_user_error(SAME_COMMAND):
    # Jobs on other machines read the files with which Snakemake started.
    EXPERIMENTS = start_checks.load_experiments(
        config, layout.EXPERIMENTS if workflow.is_main_process else layout.STUDIES
    )
    TRACKED = start_checks.tracked_studies(config, EXPERIMENTS)
    JOBS_PER_GPU = start_checks.chosen_jobs_per_gpu(config)
    if workflow.is_main_process:
        snakefile.stop_on_hangup()
        start_checks.check_experiments(EXPERIMENTS)
        start_warnings.print_warnings(EXPERIMENTS.values())
        # Jobs run on this machine, unless a number of nodes is given (`jobs` in a profile).
        if workflow.nodes is None and any(snakefile.gpus(e, elsewhere=False) for e in EXPERIMENTS.values()):
            limit = workflow.global_resources.get("gpu")
            gpu_jobs = gpus.show_gpus(limit and limit.value, JOBS_PER_GPU or gpus.JOBS_PER_GPU)
            workflow.register_resource("gpu", gpu_jobs)  # Snakemake starts this number of jobs that use a GPU
        snakefile.call_at_exit_if_no_job_runs(lambda: workflow.dryrun or process.forward_missing(TRACKED))

DATASETS = {layout.dataset_directory(e.dataset).name: e.dataset for e in EXPERIMENTS.values()}
REFERENCES = {
    layout.reference_path(e.dataset, features, e.evaluate).stem: (e, features)
    for e in EXPERIMENTS.values()
    for features in e.evaluate.features
}
# (study, directory of the arm) -> (experiment, run), also of trials. The untrained net has the run of the first arm that
# starts from it.
RUNS = {
    (e.name, directory): (e, run)
    for e in EXPERIMENTS.values()
    for arm, run in [(arm, e.run(arm, values)) for arm in reversed(e.arms) for values in (*e.grid(arm), None)]
    for directory in (f"init-{run.initial.hash8}", f"{arm}-{run.hash8}")
}


wildcard_constraints:
    study="[a-z0-9_]+",
    arm="[a-z0-9_]+-[0-9a-f]{8}",
    seed=r"\d+",
    step=r"\d+",


onstart:
    snakefile.date_back()
    if workflow.executor_plugin.name == "slurm":
        snakefile.cancel_left_jobs((job.rule.name, job.wildcards) for job in workflow.dag.needrun_jobs())
    snakefile.save_study_files(EXPERIMENTS)
    for experiment in EXPERIMENTS.values():
        study_plan.record_plan(experiment)
    process.start_tracking(TRACKED)


onsuccess:
    tracked = process.stop_tracking(TRACKED)
    snakefile.check_all_ran(workflow.dag.needrun_jobs())
    terminal.print_results(EXPERIMENTS, outputs_of_this_call(), tracked)


onerror:
    process.stop_tracking(TRACKED)


def outputs_of_this_call():
    """The outputs of all jobs of this call, also of those that were up to date."""
    dag = workflow.dag
    return {Path(file) for job in dag.bfs(dag.dependencies, *dag.targetjobs) for file in job.output}


def training_jobs():
    """Weights of each training job of this call, and the reason to run it; not of jobs that `--forcerun` names."""
    reasons = [(job, workflow.dag.reason(job)) for job in workflow.dag.needrun_jobs() if job.rule.name == "train"]
    return [(Path(job.output.weights), reason) for job, reason in reasons if not reason.forced]


def experiment_of(wildcards):
    return RUNS[wildcards.study, wildcards.arm][0]


def run_of(wildcards):
    return RUNS[wildcards.study, wildcards.arm][1]


# Snakemake compares the times of input files, and the content of those up to a size that the profiles set. The images
# can be larger, so they are `ancient`: the manifest has their sha256. Not all files from one job may be `ancient`, unless
# that job is a checkpoint: if it runs, Snakemake looks for no other reason to run the jobs after it.
def dataset_files(experiment):
    directory = layout.dataset_directory(experiment.dataset)
    return {"images": ancient(directory / "images.npy"), "manifest": directory / "manifest.json"}


def training_files(wildcards):
    """The dataset. A newer manifest does not train a checkpoint again that was trained on the same images (sha256)."""
    files = dataset_files(experiment_of(wildcards))
    provenance = Path(str(layout.STEP / "provenance.json").format(**dict(wildcards.items())))
    if trained_on(provenance, files["manifest"]):
        files["manifest"] = ancient(files["manifest"])
    return files


def threads_of(wildcards):
    """CPU threads of a process.

    Jobs compute with the resource `torch_threads`: Snakemake lowers `threads` to --cores, and another number of threads
    changes the last digits of a result.
    """
    return run_of(wildcards).train.threads


def threads_of_reference(wildcards):
    return REFERENCES[wildcards.reference][0].train.threads


def is_elsewhere():
    """Whether jobs run on other machines."""
    return workflow.non_local_exec or workflow.remote_exec


def gpus_for(experiment):
    return snakefile.gpus(experiment, elsewhere=is_elsewhere())


def gpus_of(wildcards):
    return gpus_for(experiment_of(wildcards))


def jobs_per_gpu(experiment, needed=0):
    """How many jobs share a GPU with a job that needs `needed` bytes of its memory; 0 if a cluster assigns GPUs."""
    if is_elsewhere() or not gpus_for(experiment):
        return 0
    return JOBS_PER_GPU or gpus.default_jobs_per_gpu(needed)


def jobs_per_gpu_of_training(wildcards):
    experiment, train = experiment_of(wildcards), run_of(wildcards).train
    if experiment.processes > 1:
        return min(jobs_per_gpu(experiment), 1)
    images = min(train.micro_batch or train.batch_size, train.batch_size)
    return jobs_per_gpu(experiment, resources.gradient_bytes(run_of(wildcards), images, train.precision == "fp32"))


def jobs_per_gpu_of_probe(wildcards):
    experiment = experiment_of(wildcards)
    return jobs_per_gpu(experiment, resources.gradient_bytes(run_of(wildcards), experiment.probe.batch_size, True))


def processes_of(wildcards):
    return experiment_of(wildcards).processes


def cores_of_cost(wildcards):
    """All cores of this machine; elsewhere the threads of the arms."""
    if is_elsewhere():
        experiment = EXPERIMENTS[wildcards.study]
        return max(experiment.run(arm).train.threads for arm in experiment.arms)
    return workflow.cores


def previous_step(wildcards):
    """The checkpoint that a segment starts from; 0 if it starts from the untrained net."""
    return max((s for s in experiment_of(wildcards).steps if s < int(wildcards.step)), default=0)


def previous_state(wildcards):
    step = previous_step(wildcards)
    return str(layout.STEP / "state.pt").format(**{**dict(wildcards.items()), "step": step}) if step else []


def sample_settings(experiment):
    """What determines the samples: not whether they are kept."""
    return experiment.sample.model_copy(update={"keep": False}).canonical()


def reference_settings(experiment, features):
    """What determines the reference features of one extractor: not the metrics and the other extractors."""
    evaluate = experiment.evaluate
    weights = {name: file for name, file in evaluate.weights.items() if name == features}
    part = {"reference": evaluate.reference, "reference_images": evaluate.reference_images}
    return Evaluate(features=(features,), weights=weights, **part).canonical()


def references_of(wildcards):
    e = experiment_of(wildcards)
    return [layout.reference_path(e.dataset, features, e.evaluate) for features in e.evaluate.features]


def checkpoint_files(study, name):
    return [directory / name for *_, directory in layout.checkpoints(EXPERIMENTS[study])]


def probe_files(study):
    """The probes of all trained checkpoints of a study, unless it has no section `probe`."""
    experiment = EXPERIMENTS[study]
    if experiment.probe is None:
        return []
    return [directory / "probe.csv" for _, _, step, directory in layout.checkpoints(experiment) if step > 0]


def external_curves(study):
    """The table of curves from other people, if the study names one."""
    path = EXPERIMENTS[study].external_curves
    return [path] if path else []


def kept_samples(study):
    """The samples of all checkpoints, if the study keeps them."""
    return checkpoint_files(study, "samples.npy") if EXPERIMENTS[study].sample.keep else []


def averages_figures():
    """The figures of the averages of the weights, of the studies that measure several."""
    several = [study for study, experiment in EXPERIMENTS.items() if len(experiment.evaluate.ema or ()) > 1]
    return [layout.report_directory(study) / "averages.png" for study in several]


def last_checkpoints(study):
    """(arm, directory) of the last checkpoint of each run."""
    experiment = EXPERIMENTS[study]
    return [(arm, path) for arm, _, step, path in layout.checkpoints(experiment) if step == experiment.steps[-1]]


def trial_settings(study):
    """(arm, tuned values, seed, directory) of each checkpoint of the trials of a study."""
    return [(trial.arm, trial.values, trial.seed, str(trial.directory)) for trial in layout.trials(EXPERIMENTS[study])]


def run_settings(study):
    """(arm, settings of its runs as JSON) of each arm."""
    return [(arm, EXPERIMENTS[study].run(arm).canonical()) for arm in EXPERIMENTS[study].arms]


def plan_text(plan):
    """A plan as JSON; an empty text if the study compares nothing."""
    return plan.canonical() if plan else ""


def evaluated_metrics(experiment):
    """The features, metric and, if the study names averages, the average of each value that a checkpoint has."""
    evaluate = experiment.evaluate
    averages = [(average_name(average),) for average in evaluate.ema or ()] or [()]
    return [
        (name, metric, *average) for name in evaluate.features for average in averages for metric in evaluate.metrics
    ]


def few_images(experiment):
    """The warnings about few images, which the verdict repeats."""
    return start_warnings.few_images(experiment, newest_provenances(experiment))


def probed_bins(experiment):
    """T, and the number of bins of timesteps that are probed; 0 bins if the study has no probe."""
    return (experiment.diffusion.timesteps, experiment.probe.bins if experiment.probe else 0)


def preview_cells(experiment):
    """(arm, seed, step, training images, preview) of each checkpoint of the first seed."""
    return [
        (arm, seed, step, step * experiment.run(arm).train.batch_size, str(path / "preview.png"))
        for arm, seed, step, path in layout.checkpoints(experiment)
        if seed == experiment.seeds[0]
    ]


def minutes(request):
    """The resource `runtime`, from a function that returns the request of a job. Each further attempt asks for more."""
    return lambda wildcards, input, attempt: min(attempt * request(wildcards, input).minutes, resources.LONGEST_MINUTES)


def megabytes(request):
    """The resource `mem_mb`, in the same way."""
    return lambda wildcards, input, attempt: attempt * request(wildcards, input).megabytes


def images_of(experiment, input):
    return resources.images_in(input.images, experiment.dataset.image_size)


def dataset_request(wildcards, input):
    return resources.dataset(DATASETS[wildcards.dataset])


def reference_request(wildcards, input):
    experiment, _ = REFERENCES[wildcards.reference]
    images, threads = images_of(experiment, input), experiment.train.threads
    return resources.reference(experiment.evaluate, images, threads, gpus_for(experiment))


def train_request(wildcards, input):
    steps = int(wildcards.step) - previous_step(wildcards)
    images = images_of(experiment_of(wildcards), input)
    return resources.train(run_of(wildcards), steps, images, gpus_of(wildcards), processes_of(wildcards))


def evaluate_request(wildcards, input):
    experiment = experiment_of(wildcards)
    images = images_of(experiment, input)
    return resources.evaluate(experiment, run_of(wildcards), images, gpus_of(wildcards))


def cost_request(wildcards, input):
    experiment = EXPERIMENTS[wildcards.study]
    runs = [experiment.run(arm) for arm in experiment.arms]
    return resources.cost(runs, images_of(experiment, input), gpus_for(experiment), experiment.processes)


def probe_request(wildcards, input):
    return resources.probe(run_of(wildcards), experiment_of(wildcards).probe, gpus_of(wildcards))
