"""The workflow on a real SLURM: a cluster of one node, this machine, with its own ports and key."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from projects import REPORT, copy_project, edit, reduce, snakemake

METRICS = str(REPORT / "metrics.csv")
DAEMONS = ["munged", "slurmctld", "slurmd"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(daemon) is None for daemon in DAEMONS),
        reason="needs root and the packages slurm-wlm and munge",
    ),
]
PROFILE = ["--workflow-profile", "workflow/profiles/slurm"]
# A cluster this small answers at once. Other tests cover MLflow.
QUICK = ["--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5", "--config", "tracking=off"]
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=15
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:4 RealMemory=1000000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Any device files serve as GPUs: no job computes on them.
GPUS = "".join(f"Name=gpu File=/dev/{name}\n" for name in ("full", "null", "random", "zero"))


def wait_for(happened, seconds=180):
    deadline = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.05)
    return result


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def queue(format="%i", *arguments):
    return output_of("squeue", "--noheader", f"--format={format}", *arguments).splitlines()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM cluster of one node; the value is the name of the node."""
    root, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for name in ("state", "spool", "bin"):
        (root / name).mkdir()
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o400)
    (root / "slurm.conf").write_text(CONFIG.format(root=root, host=host, ports=[free_port(), free_port()]))
    (root / "gres.conf").write_text(GPUS)
    # The plugin removes SLURM_CONF from the environment of srun; an installed cluster has its file in /etc.
    (root / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={root}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    (root / "bin/srun").chmod(0o755)
    commands = [
        ["munged", "--foreground", "--force", f"--socket={root}/munge.socket", f"--key-file={root}/munge.key"]
        + [f"--{kind}-file={root}/munged.{kind}" for kind in ("log", "pid", "seed")],
        ["slurmctld", "-D", "-L", f"{root}/slurmctld.log"],
        ["slurmd", "-D", "-L", f"{root}/slurmd.log"],
    ]
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{root}/slurm.conf")
        patch.setenv("PATH", f"{root}/bin:{os.environ['PATH']}")
        try:
            for command in commands:
                quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                daemons.append(subprocess.Popen(command, **quiet))
                wait_for(lambda: (root / "munge.socket").exists())
            wait_for(lambda: subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%n"], capture_output=True).stdout)
            yield host
            subprocess.run(["scancel", "--me"], check=True)
            wait_for(lambda: not queue())
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(timeout=30)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The default study, reduced to one seed, trained on this machine without SLURM."""
    project = copy_project(tmp_path_factory.mktemp("undisturbed"))
    edit(project, reduce)
    changes = {"seeds": [0], "checkpoints": [200], "probe": None, "device": "cpu"}
    edit(project, lambda study: study.update(changes))
    done = snakemake(project, "--config", "tracking=off", "--until", "train", "reference", "cost", target=METRICS)
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture(scope="module")
def finished(cluster, undisturbed, tmp_path_factory):
    """The same study, run through SLURM to the figure."""
    project = tmp_path_factory.mktemp("finished") / "study"
    shutil.copytree(undisturbed, project, symlinks=True)
    for made in ("openmoji", "references"):
        shutil.rmtree(project / "results" / made)
    done = snakemake(project, *PROFILE, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    (project / "run.log").write_text(done.stdout + done.stderr)
    return project


@pytest.fixture
def project(cluster, undisturbed, tmp_path):
    """The study with only its dataset, reference and cost."""
    project = tmp_path / "study"
    shutil.copytree(undisturbed, project, symlinks=True)
    for arm in project.glob("results/openmoji/*-*"):
        shutil.rmtree(arm)
    yield project
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not queue())


def weights(project):
    """The weights of both arms, relative to the project."""
    return sorted(str(path.relative_to(project)) for path in project.glob("results/openmoji/*/seed0/step200/weights.*"))


def same_weights(project, undisturbed, paths):
    return all((project / path).read_bytes() == (undisturbed / path).read_bytes() for path in paths)


@contextmanager
def running(project, *arguments, targets):
    """Snakemake in the background; killed at the end if it still runs. Its output is in run.log."""
    command = [sys.executable, "-m", "snakemake", *PROFILE, *QUICK, *arguments, "--", *targets]
    with (project / "run.log").open("w") as log:
        process = subprocess.Popen(command, cwd=project, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def hold_trainer(project):
    """Wait until a process trains a segment, and stop it. Returns its SLURM job and the train.log of the segment.

    So no machine is too fast for the fault that follows. SLURM wakes the processes that it ends.
    """

    def segment():
        logs = project.glob("results/openmoji/*/seed0/log.csv")
        return next((path.parent / "step200" for path in logs if len(path.read_text().splitlines()) > 5), None)

    directory = wait_for(segment)
    for job in queue("%i", "--states=running"):
        for pid in (line.split()[0] for line in output_of("scontrol", "listpids", job).splitlines()[1:]):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read()
            if b".train.py" in command:
                os.kill(int(pid), signal.SIGSTOP)
                assert not (directory / "weights.safetensors").exists()
                return job, directory / "train.log"
    raise AssertionError("no trainer in the queue")


def resumed_at_the_same_step(project, job, log):
    """Whether training stopped once, in this SLURM job, and resumed at exactly that step."""
    (slurm_log,) = project.glob(f".snakemake/slurm_logs/rule_train/*/{job}.log")
    stopped = re.findall(r"stopped at step (\d+) of 200", slurm_log.read_text())
    return len(set(stopped)) == 1 and re.findall(r"resuming from step (\d+)", log.read_text()) == stopped[:1]


def test_the_study_goes_through_slurm_to_the_figure(finished, undisturbed):
    assert (finished / "reports/fid_curves.png").stat().st_size > 10_000
    assert same_weights(finished, undisturbed, weights(undisturbed))
    log = (finished / "run.log").read_text()
    # 1 reference, 1 cost, 2 segments, 2 evaluations; the other jobs run where Snakemake runs.
    assert log.count("has been submitted with SLURM jobid") == 6 and "Trying to restart" not in log


def test_a_job_over_its_time_limit_resumes_by_itself(project, undisturbed):
    """With the settings with which Snakemake started."""
    target = weights(undisturbed)[0]
    with running(project, targets=[target]) as process:
        job, log = hold_trainer(project)
        (project / "experiments/openmoji.yaml").write_text("edited: [\n")
        assert queue("%l", f"--jobs={job}") == ["14:00"]
        subprocess.run(["scontrol", "update", f"JobId={job}", "EndTime=now"], check=True)
        wait_for(lambda: queue("%T", "--states=all", f"--jobs={job}") == ["TIMEOUT"])
        assert process.wait(timeout=240) == 0, (project / "run.log").read_text()
    assert "SLURM status is: 'TIMEOUT'" in (project / "run.log").read_text()
    assert resumed_at_the_same_step(project, job, log) and same_weights(project, undisturbed, [target])


def test_a_cancelled_job_resumes_at_the_next_start(project, undisturbed):
    target = weights(undisturbed)[0]
    with running(project, "--retries", "0", targets=[target]) as process:
        job, log = hold_trainer(project)
        subprocess.run(["scancel", job], check=True)
        assert process.wait(timeout=240) != 0
    assert "SLURM status is: 'CANCELLED'" in (project / "run.log").read_text()
    assert log.with_name("state.partial.pt").exists()
    done = snakemake(project, *PROFILE, *QUICK, target=target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert resumed_at_the_same_step(project, job, log) and same_weights(project, undisturbed, [target])


def test_a_killed_snakemake_leaves_no_second_trainer_and_loses_nothing(project, undisturbed):
    # Each job takes both CPUs: one trains, the other waits.
    wide = ["--set-resources", "train:cpus_per_task=2"]
    with running(project, *wide, targets=[METRICS]) as process:
        job, log = hold_trainer(project)
        wait_for(lambda: sorted(queue("%T")) == ["PENDING", "RUNNING"])
        process.kill()
    orphans = queue()
    assert len(orphans) == 2
    done = snakemake(project, *PROFILE, "--unlock", target=METRICS)
    assert done.returncode == 0, done.stdout + done.stderr
    done = snakemake(project, *PROFILE, *QUICK, target=METRICS, timeout=300)
    text = done.stdout + done.stderr
    assert done.returncode == 0 and "Trying to restart" not in text, text
    assert "Cancelling the SLURM jobs of a killed Snakemake" in text and all(orphan in text for orphan in orphans)
    # 2 segments and 2 evaluations, once each.
    assert text.count("has been submitted with SLURM jobid") == 4
    assert resumed_at_the_same_step(project, job, log) and same_weights(project, undisturbed, weights(undisturbed))


@contextmanager
def drained(node):
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"], check=True)
    try:
        yield
    finally:
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=True)


def test_a_drained_node_finishes_its_jobs_and_the_others_wait(cluster, project, undisturbed):
    targets = weights(undisturbed)
    with running(project, "--set-resources", "train:cpus_per_task=2", targets=targets) as process:
        first = wait_for(lambda: queue("%i", "--states=running"))
        with drained(cluster):
            wait_for(lambda: queue("%T", "--states=all", f"--jobs={first[0]}") == ["COMPLETED"])
            wait_for(lambda: queue("%T") == ["PENDING"])
            time.sleep(3)
            assert queue("%T") == ["PENDING"] and process.poll() is None
        assert process.wait(timeout=240) == 0, (project / "run.log").read_text()
    assert same_weights(project, undisturbed, targets)


@pytest.mark.parametrize(
    ("profile", "processes", "expected"),
    [
        ("slurm", 1, ["NumCPUs=1", "TresPerJob=gres:gpu:1"]),
        ("slurm", 4, ["NumCPUs=4", "TresPerJob=gres:gpu:4"]),
        ("slurm-multi-gpu", 1, ["NumCPUs=4", "TresPerJob=gres:gpu:4", "MinMemoryNode=62.50G"]),
    ],
)
def test_jobs_request_what_they_need(cluster, project, undisturbed, profile, processes, expected):
    edit(project, lambda study: study.update(device="auto", processes=processes))
    arguments = ["--workflow-profile", f"workflow/profiles/{profile}"]
    with drained(cluster), running(project, *arguments, targets=weights(undisturbed)[:1]) as process:
        (job,) = wait_for(queue)
        request = output_of("scontrol", "--oneliner", "show", "job", job).split()
        # 2 x 200 steps of 3 calls of the net, 0.1 s each, and the time on the GPU; 10 minutes to start.
        assert {*expected, "TimeLimit=00:13:00", "NumNodes=1-1"} <= set(request), request
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    wait_for(lambda: not queue())
