"""Data-parallel training: several processes compute what one computes, and stop, resume and fail together."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from convergence.train_job import Segment, train
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train
from diffusion.data.folder import prepare_folder
from diffusion.errors import InputError
from diffusion.training import parallel
from diffusion.training.segment import train_segment

ROOT = Path(__file__).resolve().parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
STEPS = 6


def run_of(scheme, **train_settings):
    """A wider net than the smallest one: with one channel per norm group, some gradients consist of rounding errors."""
    return RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=8),
        model=Model(channels=64, channel_mult=(1,), res_blocks=1, attention_resolutions=(), head_channels=32),
        diffusion=Diffusion(timesteps=20),
        train=Train(**{"batch_size": 12, "learning_rate": 1e-4, "log_every": 2} | train_settings),
        scheme=scheme,
        match=None,
        train_version=1,
    )


P2 = {"p2": {"gamma": 0.5, "k": 1}}
RUNS = {
    "weighted": run_of(Scheme(mse_weight=P2), micro_batch=2, random_flip=True),
    # Twenty timesteps have a full history after two or three batches, which then determines the draws.
    "adaptive": run_of(Scheme(timesteps={"loss_second_moment": {"history": 1}}), batch_size=60, micro_batch=15),
}


def _process(rank, count, directory, run):
    """One of several processes. Rank 0 records its reductions."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=count)
    reductions, all_reduce = [], dist.all_reduce

    def recorded(tensor, *arguments):
        reductions.append((str(tensor.dtype), tensor.numel()))
        return all_reduce(tensor, *arguments)

    dist.all_reduce = recorded
    run = RunConfig.model_validate_json(run)
    state = train_segment(run, 0, IMAGES, None, directory / "step6", STEPS, "cpu")
    torch.save([p.detach() for p in state.parameters], directory / f"weights{rank}.pt")
    if rank == 0:
        (directory / "reductions.json").write_text(json.dumps(reductions))
    dist.destroy_process_group()


def contents(directory):
    """The content of the state, and the numbers of the log without the columns that measure time."""
    state = torch.load(directory / "step6/state.pt", weights_only=True)
    rows = [
        [float(v) for k, v in row.items() if k not in {"seconds", "images_per_second"}]
        for row in csv.DictReader((directory / "log.csv").open())
    ]
    return state, torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module", params=RUNS)
def both(request, tmp_path_factory):
    """Directories of a run in one process and of the same run in two, and the run."""
    run, root = RUNS[request.param], tmp_path_factory.mktemp(request.param)
    (root / "one").mkdir()
    (root / "two").mkdir()
    train_segment(run, 0, IMAGES, None, root / "one/step6", STEPS, "cpu")
    mp.spawn(_process, (2, root / "two", run.canonical()), nprocs=2)
    return root / "one", root / "two", run


def test_two_processes_compute_what_one_computes(both):
    (one, rows_one), (two, rows_two) = (contents(directory) for directory in both[:2])
    for name, expected in one["ema"].items():
        torch.testing.assert_close(two["ema"][name], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=1e-4, atol=1e-6)
    for expected, actual in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(actual["exp_avg"], expected["exp_avg"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(rows_two, rows_one, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert len(rows_one) == STEPS // 2
    if one["history"]:
        assert (one["history"]["counts"] >= 1).all()
        assert torch.equal(two["history"]["counts"], one["history"]["counts"])
        torch.testing.assert_close(two["history"]["losses"], one["history"]["losses"], rtol=1e-4, atol=1e-6)


def test_every_process_has_the_same_weights(both):
    first, second = (torch.load(both[1] / f"weights{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_reduced_once_per_step(both):
    _, directory, run = both
    reductions = json.loads((directory / "reductions.json").read_text())
    parameters = sum(p.numel() for p in torch.load(directory / "weights0.pt"))
    large = [numel for dtype, numel in reductions if dtype == "torch.float32"]
    assert large == STEPS * [parameters + 2 * run.train.batch_size]
    assert len(reductions) == 2 * STEPS  # the second one agrees on stopping


def test_one_process_reduces_nothing():
    assert parallel.rank() == 0 and parallel.rank_slice(12) == range(12)
    assert parallel.any_rank([True, False]) == [True, False]
    tensor = torch.arange(3.0)
    parallel.all_reduce_sum([tensor])
    assert tensor.tolist() == [0, 1, 2]


@pytest.fixture
def segment(tmp_path):
    """A long segment for torchrun, on a prepared dataset."""
    (tmp_path / "images").mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"images/{index}.png")
    prepare_folder(tmp_path / "data", tmp_path / "images", 8)
    return Segment(
        run=run_of(Scheme(timesteps=P2), log_every=1),
        seed=0,
        dataset=tmp_path / "data",
        previous=None,
        directory=tmp_path / "run/step40",
        until=40,
        gpus=0,
        threads=1,
        log=str(tmp_path / "train.log"),
        name="train",
    )


def in_a_process(segment):
    code = """if True:
        import sys
        from convergence.train_job import Segment, train
        train(Segment.model_validate_json(sys.argv[1]), 2)
    """
    command = [sys.executable, "-c", code, segment.model_dump_json()]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


def test_a_segment_is_equal_after_a_json_round_trip(segment):
    assert Segment.model_validate_json(segment.model_dump_json()) == segment
    later = segment.model_copy(update={"previous": Path("step20/state.pt"), "run": RUNS["adaptive"]})
    assert Segment.model_validate_json(later.model_dump_json()) == later


def test_a_number_of_processes_that_does_not_divide_the_batch_is_an_error(segment):
    batch_size = segment.run.train.batch_size
    with pytest.raises(InputError, match=f"processes: {batch_size + 1} .* batch_size {batch_size}: use a divisor"):
        train(segment, batch_size + 1)


@pytest.mark.slow
def test_torchrun_stops_and_resumes_to_the_same_end(segment, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    train(segment, 2)
    whole = torch.load(segment.directory / "state.pt", weights_only=True)

    cut = segment.model_copy(update={"directory": tmp_path / "other/step40"})
    process = in_a_process(cut)
    log = tmp_path / "other/log.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert stderr.rstrip().splitlines()[-1] == "diffusion.errors.Stopped: stopped: run the same command again to resume"
    assert Path(segment.log).read_text().count("stopped at step") == 1
    assert (cut.directory / "state.partial.pt").exists() and not (cut.directory / "state.pt").exists()

    train(cut, 2)
    assert [int(row["step"]) for row in csv.DictReader(log.open())] == list(range(1, 41))
    resumed = torch.load(cut.directory / "state.pt", weights_only=True)
    assert all(torch.equal(whole["model"][name], value) for name, value in resumed["model"].items())
    first, second = (part.directory / "weights.safetensors" for part in (segment, cut))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_reported_in_one_sentence(segment, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(
        InputError, match=r"process \d of 2 failed with exit code 1: correct the error above \(also in .*train.log\)"
    ):
        train(segment.model_copy(update={"dataset": Path("nowhere")}), 2)
    stderr = capfd.readouterr().err
    assert "nowhere: is not a complete dataset" in stderr and "Traceback" not in stderr


@pytest.mark.slow
def test_a_full_disk_in_one_of_several_processes_is_reported_in_one_sentence(segment, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        process = in_a_process(segment.model_copy(update={"directory": disk / "run/step4000", "until": 4000}))
        log = disk / "run/log.csv"
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(OSError, match="No space left"), (disk / "all").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 100)
        _, stderr = process.communicate(timeout=60)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    message, *raised = stderr.splitlines()
    assert "No space left on device: free space" in message
    # The rest is printed by the process of the test, which does not log.
    assert raised[0].startswith("Traceback") and sum(line.startswith("Traceback") for line in raised) == 1
    # The other process fails, too, and may end first.
    assert re.search(r"process \d of 2 failed with exit code 1: correct the error above", raised[-1])
