# Loads the chosen experiments and finds, for the wildcards of a rule, the settings that it needs.

import sys
from pathlib import Path

# The packages that this file and the scripts import lie beside the Snakefile.
sys.path.insert(0, workflow.basedir)

from convergence import layout, resources, snakefile
from diffusion.errors import InputError

snakefile.set_environment(workflow.basedir)
snakefile.quiet_output()
try:
    EXPERIMENTS = snakefile.load_experiments(config, Path(workflow.basedir) / "experiments")
    if workflow.is_main_process:
        snakefile.check_writable()
        snakefile.check_extractors(EXPERIMENTS)
except InputError as error:
    sys.exit(str(error))  # an error of Snakemake's would wrap the sentence in places of this file

DATASETS = {layout.dataset_directory(e.dataset).name: e.dataset for e in EXPERIMENTS.values()}
REFERENCES = {
    layout.reference_path(e.dataset, features, e.evaluate).stem: (e, features)
    for e in EXPERIMENTS.values()
    for features in e.evaluate.features
}
# (study, directory of the arm) -> (experiment, run); the untrained net stands for the first arm that starts from it.
RUNS = {
    (e.name, directory): (e, run)
    for e in EXPERIMENTS.values()
    for arm, run in [(arm, e.run(arm)) for arm in reversed(e.arms)]
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
    snakefile.start_tracking(config, EXPERIMENTS)


onsuccess:
    snakefile.print_results(snakefile.stop_tracking())


onerror:
    snakefile.stop_tracking()


def experiment_of(wildcards):
    return RUNS[wildcards.study, wildcards.arm][0]


def run_of(wildcards):
    return RUNS[wildcards.study, wildcards.arm][1]


def dataset_files(experiment):
    directory = layout.dataset_directory(experiment.dataset)
    return {"images": directory / "images.npy", "manifest": directory / "manifest.json"}


def threads_of(wildcards):
    return run_of(wildcards).train.threads


def gpus_for(experiment):
    return snakefile.gpus(experiment, elsewhere=workflow.non_local_exec or workflow.remote_exec)


def gpus_of(wildcards):
    return gpus_for(experiment_of(wildcards))


def processes_of(wildcards):
    return experiment_of(wildcards).processes


def previous_step(wildcards):
    """The checkpoint that a segment goes on from; 0: it starts from the seed alone."""
    return max((s for s in experiment_of(wildcards).steps if s < int(wildcards.step)), default=0)


def previous_state(wildcards):
    step = previous_step(wildcards)
    return f"results/{wildcards.study}/{wildcards.arm}/seed{wildcards.seed}/step{step}/state.pt" if step else []


def droppable(path):
    """Kept if any chosen study asks for it: whether an output is temporary cannot depend on wildcards."""
    return path if any(e.sample.keep for e in EXPERIMENTS.values()) else temp(path)


def reference_of(experiment):
    """Which images are the reference: arguments of `reference_key`."""
    evaluate = experiment.evaluate
    return {
        "part": evaluate.reference,
        "held_out": experiment.dataset.held_out,
        "count": evaluate.reference_images,
    }


def weights_of(experiment):
    """Where extractors find weights that lie elsewhere: arguments of `load_extractor` by name."""
    return {name: weights.model_dump(mode="json") for name, weights in experiment.evaluate.weights.items()}


def references_of(wildcards):
    e = experiment_of(wildcards)
    return [layout.reference_path(e.dataset, features, e.evaluate) for features in e.evaluate.features]


def checkpoint_files(study, name):
    return [directory / name for *_, directory in layout.checkpoints(EXPERIMENTS[study])]


def probe_files(study):
    """The probes of a study: of all checkpoints that are trained, unless it has none."""
    experiment = EXPERIMENTS[study]
    if experiment.probe is None:
        return []
    return [directory / "probe.csv" for _, _, step, directory in layout.checkpoints(experiment) if step > 0]


def minutes(request):
    """The resource `runtime` of a rule, of a function that gives the request of a job. A second attempt asks for more."""
    return lambda wildcards, input, attempt: min(attempt * request(wildcards, input).minutes, resources.LONGEST_MINUTES)


def megabytes(request):
    """The resource `mem_mb` of a rule, likewise."""
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


def sample_request(wildcards, input):
    return resources.sample(run_of(wildcards), experiment_of(wildcards).sample, gpus_of(wildcards))


def evaluate_request(wildcards, input):
    experiment = experiment_of(wildcards)
    return resources.evaluate(experiment, images_of(experiment, input), threads_of(wildcards), gpus_of(wildcards))


def probe_request(wildcards, input):
    return resources.probe(run_of(wildcards), experiment_of(wildcards).probe, gpus_of(wildcards))
