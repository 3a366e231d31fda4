"""Which GPUs jobs use: the GPUs that are visible, their assignment to processes, and full memory."""

import os
import re
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
    assert show_gpus(limit) == len(shown.split(","))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


@pytest.mark.parametrize(
    ("limit", "environment", "message"),
    [
        (4, {}, "--resources gpu=4: only 2 can be used: lower it; with --config jobs_per_gpu=4, 4 jobs share a GPU"),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= names no GPU .*: unset it"),
    ],
)
def test_too_few_gpus_are_reported_in_one_sentence(machine, limit, environment, message):
    machine(TWO, **environment)
    with pytest.raises(StudyError, match=message):
        show_gpus(limit)


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
    return job.stdout.readline().decode().strip()


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


def test_gpus_that_a_cluster_assigns_are_left_as_they_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus.take_gpus(2, 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5" and not gpus._locks


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error."""


def caused_by(error):
    """An error that occurred while another one was handled."""
    try:
        try:
            raise error
        except RuntimeError:
            raise RuntimeError("the capture of a graph failed")
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


# Takes a GPU like the scripts of the rules; without the GPU alone, its memory is full.
SCRIPT = """
import sys
from types import SimpleNamespace
from convergence import gpus
from convergence.jobs import job

with job(SimpleNamespace(rule="train", wildcards=["a"], log=[sys.argv[1]])):
    gpus.take_gpus(1, int(sys.argv[2]))
    print("has", len(gpus._locks), flush=True)
    import torch
    if len(gpus._locks) == 1 or sys.argv[3] == "always":
        raise torch.OutOfMemoryError("CUDA out of memory")
    print("done", flush=True)
"""


def run_script(jobs, directory, *arguments):
    (directory / "script.py").write_text(SCRIPT)
    command = [sys.executable, directory / "script.py", directory / "job.log", *arguments]
    environment = jobs.environment | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_job_whose_gpu_is_full_says_so_and_runs_again_alone(jobs, tmp_path):
    machine = jobs("0")
    other = machine.start()
    assert line_of(other) == "0"
    process = run_script(machine, tmp_path, "2", "once")
    log = tmp_path / "job.log"
    while not (log.exists() and "waiting for a free GPU" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    end(other)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and output.split("\n")[:3] == ["has 1", "has 16", "done"]
    assert errors.count("the memory of the GPU is full: this job runs again as soon as no other") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("jobs_per_gpu", [1, 2])
def test_a_job_that_does_not_fit_the_gpu_alone_ends_with_one_sentence(jobs, tmp_path, jobs_per_gpu):
    process = run_script(jobs("0"), tmp_path, str(jobs_per_gpu), "always")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert len(errors.splitlines()) == jobs_per_gpu
    assert "the memory of the GPU is full: end other programs that use it, or lower train.micro_batch" in errors
