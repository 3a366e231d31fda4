"""Which GPUs jobs use: the GPUs that are visible, their assignment to processes, and full memory."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from projects import ROOT, TINY_MODEL, copy_project, edit, snakemake, write_pictures

from convergence import gpus
from convergence.errors import StudyError
from convergence.gpus import JOBS_PER_GPU, default_jobs_per_gpu, is_gpu_full, show_gpus, visible_gpus
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train

# What nvidia-smi prints: with -L, and for the query of ids and memory.
TWO = (
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11aa-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22bb-2)\n",
    "GPU-11aa-1, 81559\nGPU-22bb-2, 81559\n",
)
UNEQUAL = (
    "GPU 0: NVIDIA T400 (UUID: GPU-11aa-1)\nGPU 1: NVIDIA RTX A6000 (UUID: GPU-22bb-2)\n",
    "GPU-11aa-1, 1999\nGPU-22bb-2, 49140\n",
)
MIG = (
    "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11aa-1)\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-33cc)\n"
    "  MIG 1g.5gb+me   Device  1: (UUID: MIG-44dd)\n"
    "GPU 1: NVIDIA GB10 (UUID: GPU-22bb-2)\n",
    "GPU-11aa-1, 40536\nGPU-22bb-2, [N/A]\n",
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with the given output on the path, and sets environment variables."""

    def install(output, **environment):
        listed, queried = output
        script = f"#!/bin/sh\nif [ $1 = -L ]; then printf '{listed}'; else printf '{queried}'; fi\n"
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvidia-smi").write_text(script)
        (tmp_path / "bin/nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus._installed.cache_clear()
    yield install
    gpus._installed.cache_clear()


@pytest.mark.parametrize(
    ("output", "environment", "expected"),
    [
        (TWO, {}, [("GPU-11aa-1", 81559), ("GPU-22bb-2", 81559)]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1, 0"}, [("GPU-22bb-2", 81559), ("GPU-11aa-1", 81559)]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-22,GPU-22bb-2"}, [("GPU-22bb-2", 81559)]),
        (TWO, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (TWO, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        (UNEQUAL, {"CUDA_VISIBLE_DEVICES": "0"}, [("0", 1999)]),
        (UNEQUAL, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [("GPU-22bb-2", 49140)]),
        (MIG, {}, [("MIG-33cc", 20_000), ("MIG-44dd", 5_000), ("GPU-22bb-2", gpus.UNKNOWN_MEGABYTES)]),
        (MIG, {"CUDA_VISIBLE_DEVICES": "MIG-44dd"}, [("MIG-44dd", 5_000)]),
    ],
)
def test_gpus_are_those_that_the_variable_names_otherwise_those_of_the_machine(machine, output, environment, expected):
    machine(output, **environment)
    assert visible_gpus() == expected


@pytest.mark.parametrize("entry", ["2", "0,,1", "GPU-", "MIG-33", "first"])
def test_a_wrong_entry_of_the_variable_is_named_in_one_sentence(machine, entry):
    machine(TWO, CUDA_VISIBLE_DEVICES=entry)
    with pytest.raises(StudyError, match=r"^CUDA_VISIBLE_DEVICES: `.*` is not one GPU of this machine: name indices"):
        visible_gpus()


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="needs a machine without a GPU")
def test_a_machine_without_nvidia_smi_and_device_files_has_no_gpu(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("limit", "environment", "shown"),
    [
        (None, {}, "GPU-11aa-1,GPU-22bb-2"),
        (1, {}, "GPU-11aa-1"),
        (1, {"CUDA_VISIBLE_DEVICES": "1,0"}, "GPU-22bb-2"),
    ],
)
def test_jobs_see_as_many_gpus_as_the_resource_states(machine, limit, environment, shown):
    machine(TWO, **environment)
    assert show_gpus(limit, 3) == 3 * len(shown.split(","))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


@pytest.mark.parametrize(
    ("limit", "environment", "message"),
    [
        (4, {}, "--resources gpu=4: only 2 can be used: lower it, or let several jobs share each GPU with --config"),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= names no GPU .*: unset it"),
    ],
)
def test_too_few_gpus_are_reported_in_one_sentence(machine, limit, environment, message):
    machine(TWO, **environment)
    with pytest.raises(StudyError, match=message):
        show_gpus(limit, 2)


@pytest.mark.parametrize(("gigabytes", "expected"), [(7, JOBS_PER_GPU), (9, 1)])
def test_a_job_that_needs_much_of_the_smallest_gpu_has_it_alone(machine, gigabytes, expected):
    machine(MIG, CUDA_VISIBLE_DEVICES="MIG-33cc")
    assert default_jobs_per_gpu(gigabytes * 10**9) == expected


class Jobs:
    """Starts processes that take GPUs and hold them until they are stopped."""

    def __init__(self, temporary, visible):
        self.environment = os.environ | {"TMPDIR": str(temporary), "CUDA_VISIBLE_DEVICES": visible}
        self.processes = []

    def start(self, count=1, jobs_per_gpu=2):
        code = (
            "import os, sys; from convergence.gpus import take_gpus; print('asks', flush=True);"
            f"take_gpus({count}, {jobs_per_gpu});"
            "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=self.environment, **pipes)
        self.processes.append(job)
        assert line_of(job) == "asks"
        return job

    def gpu_of(self, *arguments):
        """Starts a job, and returns its GPUs when it has them."""
        return line_of(self.start(*arguments))


def line_of(job):
    """The next line that a job prints within 30 s; otherwise an empty text."""
    ready, *_ = select.select([job.stdout], [], [], 30)
    return job.stdout.readline().decode().strip() if ready else ""


def end(job, number=signal.SIGKILL):
    job.send_signal(number)
    job.wait(timeout=10)


def waits(job):
    """Whether a job gets no GPU in several attempts."""
    return not select.select([job.stdout], [], [], 5 * gpus.POLL_SECONDS)[0]


@pytest.fixture
def jobs(tmp_path):
    """A function that returns `Jobs` for the GPUs that a variable lists."""
    made = []

    def make(visible):
        made.append(Jobs(tmp_path, visible))
        return made[-1]

    yield make
    for job in [job for started in made for job in started.processes]:
        job.kill()
        job.wait(timeout=10)
        job.stdin.close()
        job.stdout.close()


@pytest.mark.parametrize("visible", ["0,1,2", "GPU-11aa-1,GPU-22bb-2,MIG-GPU-33/1/0"])
def test_each_gpu_gets_a_job_before_one_gets_two_also_after_kill_9(jobs, visible):
    machine, names = jobs(visible), visible.split(",")
    assert [machine.gpu_of() for _ in range(4)] == [*names, names[0]]
    end(machine.processes[1], signal.SIGKILL)
    assert [machine.gpu_of() for _ in range(3)] == [names[1], names[1], names[2]]
    late = machine.start()
    assert waits(late)
    end(machine.processes[2], signal.SIGTERM)
    assert line_of(late) == names[2]


def test_data_parallel_processes_have_different_gpus_alone(jobs):
    machine = jobs("0,1,2")
    assert machine.gpu_of() == "0"
    assert machine.gpu_of(2, 1) == "1,2"
    assert machine.gpu_of() == "0"
    assert waits(machine.start())


def test_a_job_that_waits_for_a_gpu_alone_is_not_overtaken(jobs):
    machine = jobs("0")
    first, second = machine.start(1, 3), machine.start(1, 3)
    assert line_of(first) == line_of(second) == "0"
    alone = machine.start(1, 1)
    assert waits(alone)
    later = machine.start(1, 3)
    end(first)
    assert waits(later) and waits(alone)
    end(second)
    assert line_of(alone) == "0" and waits(later)
    end(alone)
    assert line_of(later) == "0"


def test_gpus_that_a_cluster_assigns_are_left_as_they_are(jobs):
    machine = jobs("3,5")
    assert [machine.gpu_of(1, 0), machine.gpu_of(2, 1), machine.gpu_of(2, 0)] == ["3,5"] * 3


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error."""


def caused_by(error):
    """An error that occurred while another one was handled."""
    try:
        try:
            raise error
        except RuntimeError:
            raise RuntimeError("the capture of a graph failed")  # noqa: B904
    except RuntimeError as later:
        return later


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (caused_by(OutOfMemoryError("CUDA out of memory")), True),
        (caused_by(RuntimeError("mat1 and mat2 cannot be multiplied")), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_a_full_gpu_are_recognised(error, full):
    assert is_gpu_full(error) == full


# Like the scripts of the rules. The memory of the GPU is full: always, or at step 4 of training if the GPU is shared.
SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from convergence import gpus
from convergence.jobs import job

log, directory, jobs_per_gpu, run = sys.argv[1:]
with job(SimpleNamespace(rule="train", wildcards=["a"], log=[log])):
    gpus.take_gpus(1, int(jobs_per_gpu))
    if not run:
        raise RuntimeError("CUDA error: out of memory")
    import torch
    from diffusion.config import RunConfig
    from diffusion.training import segment
    from made import scenes

    segment.SAVE_SECONDS = 0
    train_step = segment.train_step

    def fill_memory(state, batches):
        if state.step == 3 and len(gpus._locks) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        train_step(state, batches)

    segment.train_step = fill_memory
    run = RunConfig.model_validate_json(run)
    segment.train_segment(run, 0, scenes(8, seed=0, size=16), None, Path(directory), 5, "cpu")
"""


def run_script(jobs, directory, jobs_per_gpu, run=""):
    (directory / "script.py").write_text(SCRIPT)
    paths = [directory / name for name in ("script.py", "job.log", "run/5")]
    command = [sys.executable, *paths, str(jobs_per_gpu), run]
    environment = jobs.environment | {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
    }
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_training_that_fills_the_gpu_says_so_and_resumes_alone(jobs, tmp_path):
    machine, log = jobs("0"), tmp_path / "job.log"
    other = machine.start()
    assert line_of(other) == "0"
    run = RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=16),
        model=Model(**TINY_MODEL),
        diffusion=Diffusion(),
        train=Train(batch_size=8, log_every=1),
        scheme=Scheme(),
        match=None,
        train_version=1,
    )
    process = run_script(machine, tmp_path, 2, run.canonical())
    while not (log.exists() and "waiting for a free GPU" in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    end(other)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    messages = [line.split("train a: ")[1] for line in errors.splitlines() if "left" not in line]
    assert messages[:2] == [
        "the memory of the GPU is full: this job runs again as soon as no other job uses the GPU",
        "waiting for a free GPU",
    ]
    assert messages[2] in ("resuming from step 2", "resuming from step 3")  # the last write may not have ended
    assert (tmp_path / "run/5/state.pt").exists()


@pytest.mark.parametrize("jobs_per_gpu", [1, 2])
def test_a_job_that_does_not_fit_the_gpu_alone_ends_with_one_sentence(jobs, tmp_path, jobs_per_gpu):
    process = run_script(jobs("0"), tmp_path, jobs_per_gpu)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert len(errors.splitlines()) == jobs_per_gpu
    assert "the memory of the GPU is full: end other programs that use it, or lower train.micro_batch" in errors


def project_for_gpus(directory, **changes):
    """A project with a study of eight pictures that uses a GPU if there is one."""
    project = copy_project(directory / "project")
    write_pictures(project)

    def change(study):
        study |= {"dataset": {"source": "folder", "path": "pictures", "image_size": 16}, "model": TINY_MODEL}
        study |= {"checkpoints": [2], "seeds": [0, 1, 2], "device": "auto", "probe": {"images": 8, "batch_size": 4}}
        study["train"] |= {"batch_size": 8}
        study["evaluate"].pop("reference_images", None)
        study |= changes

    edit(project, change)
    return project


# Ends Snakemake when it starts: prints how many jobs may use GPUs, and what each job requests.
PRINT_AND_END = """
onstart:
    import json, os
    jobs = {job.rule.name: [job.resources.get(name) for name in ("gpu", "jobs_per_gpu")] for job in workflow.dag.jobs}
    print(json.dumps([workflow.global_resources["gpu"].value if workflow.nodes is None else None, jobs]), flush=True)
    os._exit(0)
"""


def planned(project, *arguments):
    """The number of jobs that use GPUs at once, and (gpu, jobs_per_gpu) of each rule that uses one."""
    done = snakemake(project, "--nolock", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    limit, rules = json.loads(done.stdout)
    return limit, {rule: tuple(numbers) for rule, numbers in rules.items() if numbers[0]}


@pytest.mark.slow
def test_jobs_of_small_nets_share_gpus_and_others_have_them_alone(tmp_path, machine):
    machine(TWO)
    project = project_for_gpus(tmp_path)
    (project / "Snakefile").open("a").write(PRINT_AND_END)
    kinds = ["reference", "train", "evaluate", "probe", "cost"]
    shared = dict.fromkeys(kinds, (1, 2)) | {"cost": (1, 1)}
    assert planned(project) == (4, shared)
    edit(project, lambda study: study.update(processes=2))
    chosen = planned(project, "--resources", "gpu=1", "--config", "jobs_per_gpu=3")
    assert chosen == (3, dict.fromkeys(kinds, (1, 3)) | {"train": (2, 1), "cost": (1, 1)})
    cluster = planned(project, "--workflow-profile", "workflow/profiles/slurm")
    assert cluster == (None, dict.fromkeys(kinds, (1, 0)) | {"train": (2, 0)})
    for wrong in ("jobs_per_gpu=0", "jobs_per_gpu=many"):
        done = snakemake(project, "--dry-run", "--config", wrong)
        assert done.returncode and f"--config {wrong}: use a whole number from 1 to 16" in done.stderr


# Instead of workflow/scripts/train.py: uses a GPU for a second, and fills the memory of a GPU that it shares once.
STAND_IN = """
import time
from pathlib import Path
from convergence import gpus
from convergence.jobs import job, wait_for_gpus

with job(snakemake):
    wait_for_gpus(snakemake)
    start, alone = time.time(), len(gpus._locks) > 1
    time.sleep(1)
    with open("uses.txt", "a") as file:
        print(gpus.os.environ["CUDA_VISIBLE_DEVICES"], alone, start, time.time(), file=file)
    if snakemake.wildcards.seed == "2" and not alone:
        raise RuntimeError("CUDA error: out of memory")
    for path in snakemake.output:
        Path(path).write_text("{}")
"""


@pytest.mark.slow
def test_snakemake_runs_jobs_on_all_gpus_and_one_without_enough_memory_alone(tmp_path, machine):
    machine(TWO)
    project = project_for_gpus(tmp_path, seeds=[0, 1, 2, 3])
    (project / "workflow/scripts/train.py").write_text(STAND_IN)
    done = snakemake(project, "--cores", "5", "--config", "tracking=off", "--until", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPUs: 2, with up to 2 job(s) on each" in done.stderr
    assert done.stderr.count("the memory of the GPU is full: this job runs again") == 2
    uses = [line.split() for line in (project / "uses.txt").read_text().splitlines()]
    assert len(uses) == 8 + 2 and sum(alone == "True" for _, alone, *_ in uses) == 2
    most = {"GPU-11aa-1": 0, "GPU-22bb-2": 0}
    for gpu, _, start, _ in uses:
        together = [use for use in uses if use[0] == gpu and use[2] <= start < use[3]]
        most[gpu] = max(most[gpu], len(together))
        assert len(together) == 1 or "True" not in [use[1] for use in together]
    assert set(most.values()) == {2}
