"""Training: paired random streams, exact resume, and the files that a segment writes."""

import copy
import csv
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.averages import ema_decay
from diffusion.checkpoints import load_checkpoint, sample_checkpoint, save_weights
from diffusion.config import Diffusion, Initial, Model, NamedNet, OpenMoji, RunConfig, Sample, Scheme, Train
from diffusion.data.arrays import split
from diffusion.errors import FileError, InputError, Stopped
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.losses import p2_weight
from diffusion.schemes import scheme_tables
from diffusion.training import segment
from diffusion.training.adamw import AdamW
from diffusion.training.segment import train_segment
from diffusion.training.state import (
    Meter,
    TrainState,
    initial_weights,
    learning_rate,
    save_state,
    summary,
    train_step,
    untrained,
)

ROOT = Path(__file__).resolve().parents[1]
P2 = {"p2": {"gamma": 0.5, "k": 1}}
UNI05, UNDER05 = Scheme(timesteps="uniform", mse_weight=P2), Scheme(timesteps=P2)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def tiny(scheme=UNI05, match=None, **train):
    settings = {"batch_size": 8, "learning_rate": 1e-3, "log_every": 2} | train
    return RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=8),
        model=Model(channels=32, channel_mult=(1,), res_blocks=1, attention_resolutions=(), head_channels=32),
        diffusion=Diffusion(),
        train=Train(**settings),
        scheme=scheme,
        match=match,
        train_version=1,
    )


def tensors(path):
    """All tensors of a state file by their keys."""
    return tensors_in(torch.load(path, weights_only=True))


def tensors_in(value, name=""):
    """All tensors in nested dicts and lists by their keys."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: tensor for k, inner in items for key, tensor in tensors_in(inner, f"{name}/{k}").items()}


def timeless_log(run_directory):
    """Rows of a run's log without the columns that measure time."""
    rows = csv.DictReader((run_directory / "log.csv").open())
    return [{k: v for k, v in row.items() if k not in {"seconds", "images_per_second"}} for row in rows]


def logged_steps(run_directory):
    return [int(row["step"]) for row in timeless_log(run_directory)]


def assert_same_end(a, b):
    """Two checkpoint directories hold the same weights and states, and their runs have the same log."""
    assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()
    first, second = tensors(a / "state.pt"), tensors(b / "state.pt")
    assert first.keys() == second.keys() and len(first) > 100
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert timeless_log(a.parent) == timeless_log(b.parent)


def spied_steps(run, seed, steps, images=IMAGES):
    """(x_t, t) of each step, as the net receives them."""
    state = TrainState(run, seed, "cpu")
    inputs = []
    state.model.register_forward_pre_hook(lambda _, arguments: inputs.append(tuple(a.clone() for a in arguments)))
    for _ in range(steps):
        train_step(state, state.batches(images))
    return inputs


def test_arms_of_a_seed_share_weights_images_noise_and_most_timesteps():
    a, b = (untrained(tiny(scheme), 3)[0].state_dict() for scheme in (UNI05, UNDER05))
    assert all(torch.equal(a[key], b[key]) for key in a)
    pairs = list(zip(spied_steps(tiny(UNI05), 3, 8), spied_steps(tiny(UNDER05), 3, 8), strict=True))
    equal = torch.cat([t_a == t_b for (_, t_a), (_, t_b) in pairs])
    # 86% of the timesteps are equal. Where they are, image and noise are equal, too.
    assert 0.7 < equal.double().mean() < 0.99
    for (x_a, t_a), (x_b, t_b) in pairs:
        assert torch.equal(x_a[t_a == t_b], x_b[t_a == t_b])


def test_seeds_share_nothing():
    a, b = (untrained(tiny(), seed)[0].state_dict()["input_blocks.0.0.weight"] for seed in (0, 1))
    assert not torch.equal(a, b)
    (x_a, t_a), (x_b, t_b) = spied_steps(tiny(), 0, 1)[0], spied_steps(tiny(), 1, 1)[0]
    assert not torch.equal(t_a, t_b) and not torch.equal(x_a, x_b)
    # For grey images x_t is the noise times a positive factor, so it has the signs of the noise.
    grey = np.full((1, 8, 8, 3), 127, np.uint8)
    signs = [spied_steps(tiny(), seed, 1, grey)[0][0][0].sign() for seed in (0, 1)]
    assert (signs[0] == signs[1]).double().mean() < 0.7


# With T = 8 every timestep soon has a loss, so the history, which is part of the state, determines the draws.
ADAPTIVE = Scheme(timesteps={"loss_second_moment": {"history": 1}}, stratified=True)
VARIANTS = {
    "plain": {},
    "dropout": {"model": tiny().model.model_copy(update={"dropout": 0.3})},
    "dit": {"model": NamedNet(dit={"patch": 4, "width": 32, "depth": 1, "heads": 2})},
    "adaptive": {"scheme": ADAPTIVE, "diffusion": Diffusion(timesteps=8)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_equal_one_run(tmp_path, variant):
    run = tiny(random_flip=True, micro_batch=4).model_copy(update=VARIANTS[variant])
    train_segment(run, 0, IMAGES, None, tmp_path / "whole/step6", 6, "cpu")
    previous = None
    for until in (2, 4, 6):
        train_segment(run, 0, IMAGES, previous, tmp_path / f"parts/step{until}", until, "cpu")
        previous = tmp_path / f"parts/step{until}/state.pt"
        assert logged_steps(tmp_path / "parts") == list(range(2, until + 1, 2))
    assert_same_end(tmp_path / "whole/step6", tmp_path / "parts/step6")
    if variant == "adaptive":
        history = torch.load(tmp_path / "whole/step6/state.pt", weights_only=True)["history"]
        assert (history["counts"] > 0).all() and (history["losses"][:-1] > 0).all()


def test_the_log_has_each_step_once_after_an_added_checkpoint_and_a_rerun(tmp_path, monkeypatch):
    run, steps = tiny(log_every=1), tmp_path / "run"
    train_segment(run, 0, IMAGES, None, steps / "step2", 2, "cpu")
    train_segment(run, 0, IMAGES, steps / "step2/state.pt", steps / "step6", 6, "cpu")
    assert logged_steps(steps) == [1, 2, 3, 4, 5, 6]
    expected = timeless_log(steps)
    # A checkpoint at step 4 is added: the segment to step 6 then starts there.
    train_segment(run, 0, IMAGES, steps / "step2/state.pt", steps / "step4", 4, "cpu")
    train_segment(run, 0, IMAGES, steps / "step4/state.pt", steps / "step6", 6, "cpu")
    assert timeless_log(steps) == expected
    # The last segment is repeated after the log was damaged. The log is complete at its start and at its end.
    (steps / "log.csv").write_text("step\n5\n5\n")
    logs = []
    monkeypatch.setattr(
        segment, "train_step", lambda state, batches: (logs.append(logged_steps(steps)), train_step(state, batches))
    )
    train_segment(run, 0, IMAGES, steps / "step4/state.pt", steps / "step6", 6, "cpu")
    assert logs == [[1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert timeless_log(steps) == expected


def test_rows_lost_from_the_file_during_training_are_restored_at_the_end(tmp_path, monkeypatch):
    def add_and_lose(log, means, timed):
        add(log, means, timed)
        log.path.unlink()

    add = segment._Log.add
    monkeypatch.setattr(segment._Log, "add", add_and_lose)
    train_segment(tiny(log_every=1), 0, IMAGES, None, tmp_path / "run/step3", 3, "cpu")
    assert logged_steps(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_segment_resumes_to_the_same_end(tmp_path, how):
    run, previous = tiny(log_every=5), tmp_path / "cut/step5/state.pt"
    train_segment(run, 0, IMAGES, None, tmp_path / "whole/step65", 65, "cpu")
    train_segment(run, 0, IMAGES, None, tmp_path / "cut/step5", 5, "cpu")

    def stop_after_a_row():
        while len(timeless_log(tmp_path / "cut")) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), how)

    stopper = threading.Thread(target=stop_after_a_row)
    stopper.start()
    with pytest.raises(Stopped, match=r"stopped at step \d+ of 65: training resumes from this step"):
        train_segment(run, 0, IMAGES, previous, tmp_path / "cut/step65", 65, "cpu")
    stopper.join()
    assert not (tmp_path / "cut/step65/state.pt").exists()
    assert 5 < torch.load(tmp_path / "cut/step65/state.partial.pt", weights_only=True)["step"] < 65
    train_segment(run, 0, IMAGES, previous, tmp_path / "cut/step65", 65, "cpu")
    assert_same_end(tmp_path / "whole/step65", tmp_path / "cut/step65")
    assert logged_steps(tmp_path / "cut") == list(range(5, 66, 5))
    assert not (tmp_path / "cut/step65/state.partial.pt").exists()


def test_a_first_segment_is_not_resumed_on_other_images(tmp_path, monkeypatch):
    run, others = tiny(log_every=1), IMAGES[::-1].copy()
    train_segment(run, 0, IMAGES, None, tmp_path / "whole/step3", 3, "cpu")
    stopped = threading.Event()
    stopped.set()
    with monkeypatch.context() as patch:
        patch.setattr(segment, "_StopSignals", lambda: nullcontext(stopped))
        for images, steps in ((others, 1), (others, 2), (IMAGES, 1)):
            with pytest.raises(Stopped, match=f"stopped at step {steps} of 3"):
                train_segment(run, 0, images, None, tmp_path / "cut/step3", 3, "cpu")
    train_segment(run, 0, IMAGES, None, tmp_path / "cut/step3", 3, "cpu")
    assert_same_end(tmp_path / "whole/step3", tmp_path / "cut/step3")


def test_a_process_that_ignores_hangups_continues_to_do_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with segment._StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_segment_resumes_to_the_same_end(tmp_path):
    run = tiny(log_every=5)
    train_segment(run, 0, IMAGES, None, tmp_path / "whole/step40", 40, "cpu")
    np.save(tmp_path / "images.npy", IMAGES)
    code = f"""
import numpy as np, torch, pathlib
from diffusion.training import segment
from diffusion.training.adamw import AdamW
from diffusion.config import RunConfig
torch.set_num_threads(1)
segment.SAVE_SECONDS = 0
run = RunConfig.model_validate_json({run.canonical()!r})
segment.train_segment(run, 0, np.load("images.npy"), None, pathlib.Path("cut/step40"), 40, "cpu")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "cut/step40/state.partial.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    train_segment(run, 0, IMAGES, None, tmp_path / "cut/step40", 40, "cpu")
    assert_same_end(tmp_path / "whole/step40", tmp_path / "cut/step40")
    assert logged_steps(tmp_path / "cut") == list(range(5, 41, 5))


@pytest.mark.parametrize("damage", ["other configuration", "other segment", "truncated"])
def test_a_partial_state_that_does_not_fit_is_deleted(tmp_path, caplog, damage):
    run, before = tiny(), tiny(learning_rate=1e-2)
    train_segment(run, 0, IMAGES, None, tmp_path / "clean/step4", 4, "cpu")
    other = TrainState(before if damage == "other configuration" else run, 0, "cpu")
    other.id = "another" if damage == "other segment" else "start"
    train_step(other, other.batches(IMAGES))
    (tmp_path / "cut/step4").mkdir(parents=True)
    partial = tmp_path / "cut/step4/state.partial.pt"
    save_state(partial, other.state_dict())
    if damage == "truncated":
        partial.write_bytes(partial.read_bytes()[:1000])
    train_segment(run, 0, IMAGES, None, tmp_path / "cut/step4", 4, "cpu")
    assert_same_end(tmp_path / "clean/step4", tmp_path / "cut/step4")
    assert f"{partial}: " in caplog.text and "it is deleted, and training resumes from step 0" in caplog.text


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    train_segment(tiny(), 0, IMAGES, None, tmp_path / "step2", 2, "cpu")
    state = tmp_path / "step2/state.pt"
    for run, seed in ((tiny(learning_rate=1e-2), 0), (tiny(), 1)):
        with pytest.raises(FileError, match="state.pt: is the state of a run with other settings"):
            train_segment(run, seed, IMAGES, state, tmp_path / "step4", 4, "cpu")
    state.write_bytes(state.read_bytes()[:-100])
    for read in (summary, lambda path: train_segment(tiny(), 0, IMAGES, path, tmp_path / "step4", 4, "cpu")):
        with pytest.raises(FileError, match=r"state.pt: is damaged \(.+\)") as error:
            read(state)
        assert error.value.path == state


def without(*keys):
    def remove(content):
        *parents, last = keys
        for key in parents:
            content = content[key]
        content.pop(last)

    return remove


def reshaped(*keys, dtype=None):
    def change(content):
        *parents, last = keys
        for key in parents:
            content = content[key]
        content[last] = content[last].to(dtype) if dtype else content[last][None, :1]

    return change


DAMAGES = {
    "no weight": without("model", "out.2.weight"),
    "another weight": lambda content: content["model"].update(more=torch.zeros(2)),
    "misshaped weight": reshaped("model", "out.2.bias"),
    "half weight": reshaped("model", "out.2.bias", dtype=torch.float16),
    "no average": without("ema", "out.2.bias"),
    "misshaped average": reshaped("ema", "out.2.weight"),
    "no moment": without("optimizer", "state", 3, "exp_avg"),
    "misshaped moment": reshaped("optimizer", "state", 3, "exp_avg_sq"),
    "no moments of a parameter": without("optimizer", "state", 3),
    "no moments": without("optimizer", "state"),
    "no sums": without("meter", "sums", "losses"),
    "misshaped sums": reshaped("meter", "sums", "quarters"),
    "no history": lambda content: content.update(history=None),
    "misshaped history": reshaped("history", "losses"),
    "no rows": without("rows"),
    "no step": without("step"),
    "no id": without("id"),
    "rows without value": lambda content: content.update(rows=None),
    "sources as text": lambda content: content.update(sources="5afe"),
    "step as text": lambda content: content.update(step="5"),
    "seconds without value": lambda content: content.update(seconds=None),
    "divergence as text": lambda content: content.update(diverged="5"),
    "id as number": lambda content: content.update(id=5),
    "images without value": lambda content: content["meter"].update(images=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_changes_nothing(tmp_path, damage):
    """The other state differs in every tensor, so a tensor that is taken from it is noticed."""
    run = tiny(ADAPTIVE, random_flip=True)
    state, other = (TrainState(run, 0, "cpu") for _ in range(2))
    for steps, target in ((3, state), (5, other)):
        for _ in range(steps):
            train_step(target, target.batches(IMAGES))
    save_state(tmp_path / "other.pt", other.state_dict())
    content = torch.load(tmp_path / "other.pt", weights_only=True)
    DAMAGES[damage](content)
    save_state(tmp_path / "damaged.pt", content)

    state.rows = [{"step": 3}]
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(FileError, match="damaged.pt: is damaged"):
        state.load(tmp_path / "damaged.pt")
    after = state.state_dict()
    first, second = tensors_in(before), tensors_in(after)
    assert first.keys() == second.keys() and len(first) > 100
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [before[name] for name in VALUES] == [after[name] for name in VALUES]

    state.load(tmp_path / "other.pt")
    first, second = tensors_in(other.state_dict()), tensors_in(state.state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)
    for target in (state, other):
        train_step(target, target.batches(IMAGES))
    assert all(torch.equal(a, b) for a, b in zip(state.parameters, other.parameters, strict=True))


VALUES = ("step", "seconds", "startup_seconds", "diverged", "id", "rows", "sources")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loaded_state_is_used_by_a_captured_graph(tmp_path):
    run = tiny(precision="fp32")
    state, indices = TrainState(run, 0, "cuda"), split(len(IMAGES), 4)[0]
    batches = state.batches(IMAGES, indices)
    assert batches.resident.is_cuda and len(batches.resident) == 6
    for step in range(4):
        if step == 2:
            save_state(tmp_path / "state.pt", state.state_dict())
        train_step(state, batches)
    expected = [p.detach().clone() for p in state.parameters]
    for target in (state, TrainState(run, 0, "cuda")):
        target.load(tmp_path / "state.pt")
        for _ in range(2):
            train_step(target, batches)
        for actual, weight in zip(target.parameters, expected, strict=True):
            torch.testing.assert_close(actual, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_the_optimizer_computes_what_that_of_torch_computes(betas):
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (5,), ()]
    ours = [torch.randn(shape, generator=random) for shape in shapes]
    ours[0] = ours[0].to(memory_format=torch.channels_last)
    theirs = [p.clone() for p in ours]
    optimizer, expected = (
        AdamW(ours, 0.05, betas),
        torch.optim.AdamW(theirs, weight_decay=0.05, betas=betas, fused=True),
    )
    for step in range(1, 6):
        gradients = [torch.randn(p.shape, generator=random) for p in ours]
        optimizer.step(gradients, 1e-3 * step)
        expected.param_groups[0]["lr"] = 1e-3 * step
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        expected.step()
        if step == 3:  # the state moves to another optimizer
            before, optimizer = optimizer, AdamW(ours, 0.05, betas)
            optimizer.load_state_dict(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    actual, state = tensors_in(optimizer.state_dict()["state"]), tensors_in(expected.state_dict()["state"])
    assert actual.keys() == state.keys() and all(torch.equal(actual[key], state[key]) for key in state)


def test_a_state_records_all_code_that_trained_it(tmp_path, monkeypatch):
    for until, code in ((2, "a"), (4, "b"), (6, "a")):
        monkeypatch.setattr(segment, "CODE", code)
        previous = tmp_path / f"step{until - 2}/state.pt" if until > 2 else None
        train_segment(tiny(), 0, IMAGES, previous, tmp_path / f"step{until}", until, "cpu")
    sources = [summary(tmp_path / f"step{until}/state.pt")["sources"] for until in (2, 4, 6)]
    assert sources == [["a"], ["a", "b"], ["b", "a"]]


def test_the_first_step_of_each_process_counts_as_startup(tmp_path, monkeypatch):
    """A run of two segments; the second one is stopped after step 8, and resumed."""
    now = first = 0

    def step(state, batches):
        nonlocal now, first
        now, first = now + (100 if first else 1), False
        train_step(state, batches)
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(segment, "train_step", step)
    monkeypatch.setattr(segment, "time", SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now))
    previous, run = None, tiny(log_every=1)
    for until, end in ((5, nullcontext()), (10, pytest.raises(Stopped)), (10, nullcontext())):
        first = True
        with end:
            train_segment(run, 0, IMAGES, previous, tmp_path / f"step{until}", until, "cpu")
        previous = tmp_path / "step5/state.pt"
    facts = [summary(tmp_path / f"step{until}/state.pt") for until in (5, 10)]
    assert [(fact["seconds"], fact["startup_seconds"]) for fact in facts] == [(4, 100), (7, 300)]
    rates = [row["images_per_second"] for row in csv.DictReader((tmp_path / "log.csv").open())]
    # Steps 1, 6 and 9 are the first ones of a process.
    assert rates == ["", *["8.0"] * 4, "", *["8.0"] * 2, "", "8.0"]


def test_a_row_of_the_log_has_the_rate_of_the_steps_after_the_first(tmp_path, monkeypatch):
    now = 0

    def step(state, batches):
        nonlocal now
        now += 1 if state.step else 100
        train_step(state, batches)

    monkeypatch.setattr(segment, "train_step", step)
    monkeypatch.setattr(segment, "time", SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now))
    train_segment(tiny(log_every=3), 0, IMAGES, None, tmp_path / "step6", 6, "cpu")
    assert [row["images_per_second"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["8.0", "8.0"]


def test_held_out_images_are_not_used_for_training(tmp_path):
    """Changed pixels of held-out images change nothing; those of a training image do."""
    run = tiny().model_copy(update={"dataset": OpenMoji(source="openmoji", image_size=8, held_out=4)})
    training, held_out = split(len(IMAGES), 4)
    weights = []
    for name, changed in (("as they are", []), ("held out", held_out), ("training", training[:1])):
        images = IMAGES.copy()
        images[changed] = 255 - images[changed]
        train_segment(run, 0, images, None, tmp_path / name / "step3", 3, "cpu")
        weights.append((tmp_path / name / "step3/weights.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(InputError, match="has 4 images, and held_out is 4, so no image is left for training"):
        train_segment(run, 0, IMAGES[:4], None, tmp_path / "none/step3", 3, "cpu")


class NoReading(TorchDispatchMode):
    """Fails if the host reads a number from a tensor, for which it would wait for the GPU."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        assert operation not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        return operation(*arguments, **(keywords or {}))


def test_no_step_reads_a_number_from_the_device():
    with NoReading(), pytest.raises(AssertionError):
        torch.ones(()).item()
    for scheme in (UNI05, ADAPTIVE):
        state = TrainState(tiny(scheme, random_flip=True, micro_batch=4), 0, "cpu")
        batches = state.batches(IMAGES)
        with NoReading():
            for _ in range(3):
                train_step(state, batches)


def test_training_continues_while_a_state_is_written(tmp_path, monkeypatch):
    """The file holds the state at the call of `save`."""
    state = TrainState(tiny(), 0, "cpu")
    batches, write_now = state.batches(IMAGES), threading.Event()
    train_step(state, batches)
    before = [p.detach().clone() for p in state.parameters]
    write = segment.save_state
    monkeypatch.setattr(segment, "save_state", lambda *arguments: (write_now.wait(), write(*arguments)))
    saver = segment._Saver(tmp_path / "state.pt")
    saver.save(state.state_dict())
    train_step(state, batches)
    state.rows.append({"step": 2})
    write_now.set()
    saver.wait()
    saved = TrainState(tiny(), 0, "cpu")
    saved.load(tmp_path / "state.pt")
    assert saved.step == 1 and state.step == 2 and saved.rows == []
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters, before, strict=True))


def test_an_error_while_a_state_is_written_is_raised(tmp_path):
    saver = segment._Saver(tmp_path / "no such directory/state.pt")
    saver.save(TrainState(tiny(), 0, "cpu").state_dict())
    with pytest.raises(FileNotFoundError):
        saver.wait()


@pytest.mark.slow
def test_bf16_trains_as_fp32_does():
    """In 200 steps, rounding changes the loss less than the seed does."""

    def late_loss(precision: str, seed: int) -> float:
        state = TrainState(tiny(precision=precision, random_flip=True), seed, "cpu")
        batches = state.batches(IMAGES)
        for _ in range(100):
            train_step(state, batches)
        state.meter = Meter(state.device)
        for _ in range(100):
            train_step(state, batches)
        return state.meter.means()["loss"]

    fp32, bf16 = (np.array([late_loss(precision, seed) for seed in range(3)]) for precision in ("fp32", "bf16"))
    assert not np.array_equal(fp32, bf16)
    assert np.abs(bf16 - fp32).max() < fp32.std(ddof=1)


class OverwritesResults:
    """A function of which each call overwrites the results of the last, as the replay of a CUDA graph does."""

    def __init__(self, function):
        self.function, self.results = function, None

    def __call__(self, *arguments):
        new = self.function(*arguments)
        if self.results is None:
            self.results = [torch.empty_like(tensor) for tensor in new]
        for result, tensor in zip(self.results, new, strict=True):
            result.copy_(tensor)
        return self.results


@pytest.mark.parametrize("wrapper", [lambda function: function, OverwritesResults])
def test_micro_batches_change_only_the_rounding(wrapper):
    whole, parts = TrainState(tiny(), 0, "cpu"), TrainState(tiny(micro_batch=2), 0, "cpu")
    parts.gradients.compute = wrapper(parts.gradients.compute)
    for state in (whole, parts):
        train_step(state, state.batches(IMAGES))
    assert whole.meter.means() == pytest.approx(parts.meter.means(), rel=1e-4, nan_ok=True)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        # The first moment after one step is 0.1 times the gradient.
        torch.testing.assert_close(
            whole.optimizer.state[a]["exp_avg"], parts.optimizer.state[b]["exp_avg"], rtol=1e-3, atol=1e-7
        )


def test_the_moving_average_of_the_weights_follows_its_definition():
    state = TrainState(tiny(ema_decay=0.5, ema_warmup=True), 0, "cpu")
    average = [p.detach().clone() for p in state.parameters]
    for step in range(12):
        train_step(state, state.batches(IMAGES))
        decay = min(0.5, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, state.parameters, strict=True)]
    for actual, expected in zip(state.averages[0.5], average, strict=True):
        torch.testing.assert_close(actual, expected)
    assert ema_decay(0, 0.9999, True) == 0.1 and ema_decay(10**6, 0.9999, True) == 0.9999
    # With a fixed decay, 0.9999^10000 = 37% of the initial weights remain.
    assert np.prod([ema_decay(step, 0.9999, False) for step in range(10_000)]) == pytest.approx(0.368, abs=1e-3)


def test_the_learning_rate_rises_linearly_and_is_then_constant():
    warmup = Train(learning_rate=0.8, learning_rate_warmup=4)
    assert [learning_rate(step, warmup) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert learning_rate(0, Train(learning_rate=0.8)) == 0.8


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_decaying_learning_rate_equals_that_of_torch(name, first):
    train = Train(learning_rate=0.8, decay={name: {"from": first, "until": first + 20, "to": 0.1}})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    schedulers = torch.optim.lr_scheduler
    decay = {
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, 20, eta_min=0.1),
        "linear": lambda: schedulers.LinearLR(optimizer, 1, 0.1 / 0.8, 20),
    }[name]()
    expected = [0.8] * first
    for _ in range(21):
        expected.append(decay.get_last_lr()[0])
        optimizer.step()
        decay.step()
    assert [learning_rate(step, train) for step in range(first + 21)] == pytest.approx(expected)
    assert learning_rate(10**6, train) == pytest.approx(0.1)


def test_a_longer_study_with_decay_starts_with_the_same_rates():
    decaying = Train(learning_rate=0.8, learning_rate_warmup=10, decay={"linear": {"from": 5, "until": 20}})
    warmup = Train(learning_rate=0.8, learning_rate_warmup=10)
    for step in range(25):
        share = min(max((20 - step) / 15, 0), 1)
        assert learning_rate(step, decaying) == pytest.approx(share * learning_rate(step, warmup))


def test_the_gradient_of_a_step_is_that_of_the_weighted_loss():
    """The optimizer's first moment is compared with the gradient of the loss on the same batch."""
    from diffusion.losses import hybrid_loss
    from diffusion.streams import generator
    from diffusion.timesteps import draw_timesteps

    run = tiny(batch_size=10)
    state = TrainState(run, 0, "cpu")
    model, schedule = untrained(run, 0)
    order = torch.randperm(10, generator=generator(0, "order", 0))
    x = torch.from_numpy(IMAGES)[order].permute(0, 3, 1, 2) / 127.5 - 1
    t = draw_timesteps(torch.full((1000,), 1e-3, dtype=torch.float64), 10, generator(0, "timesteps", 0))
    noise = torch.randn(x.shape, generator=generator(0, "noise", 0))
    x_t = schedule.q_sample(x, t, noise)
    weight = p2_weight(schedule.snr, 0.5, 1)[t].float()
    hybrid_loss(schedule, model(x_t, t), x, x_t, t, noise, weight).loss.mean().backward()
    train_step(state, state.batches(IMAGES))
    for p, expected in zip(state.parameters, model.parameters(), strict=True):
        torch.testing.assert_close(state.optimizer.state[p]["exp_avg"], 0.1 * expected.grad, rtol=1e-4, atol=1e-7)


def test_matched_tables_have_the_expected_gradient_of_their_target():
    schedule = NoiseSchedule(linear_betas(1000))
    target, matched = scheme_tables(schedule, UNI05), scheme_tables(schedule, UNDER05, UNI05)
    for weight, expected in ((matched.mse_weight, target.mse_weight), (matched.vb_weight, target.vb_weight)):
        torch.testing.assert_close(matched.probabilities * weight, target.probabilities * expected, rtol=1e-12, atol=0)
    w = p2_weight(schedule.snr, 0.5, 1)
    torch.testing.assert_close(matched.mse_weight, w.mean().expand(1000), rtol=1e-12, atol=0)
    torch.testing.assert_close(matched.vb_weight, w.mean() / w, rtol=1e-12, atol=0)
    assert w.mean().item() == pytest.approx(0.806, abs=5e-4)


def test_a_diverged_run_ends_and_reports_it(tmp_path, caplog):
    run = tiny(learning_rate=1e15)
    state = train_segment(run, 0, IMAGES, None, tmp_path / "step20", 20, "cpu")
    assert 0 < state.diverged < 20
    assert f"the loss or a weight at step {state.diverged} is not finite" in caplog.text
    rows = timeless_log(tmp_path)
    later = train_segment(run, 0, IMAGES, tmp_path / "step20/state.pt", tmp_path / "step40", 40, "cpu")
    assert later.diverged == state.diverged and timeless_log(tmp_path) == rows
    checkpoint = load_checkpoint(tmp_path / "step40/weights.safetensors", "cpu")
    assert checkpoint.diverged
    assert sample_checkpoint(checkpoint, Sample(images=4, steps=2), "cpu").shape == (0, 8, 8, 3)


def test_a_run_diverges_if_only_its_weights_are_not_finite(tmp_path):
    """The gradient of the last step before a checkpoint is not finite, and no loss is computed after it."""
    state = train_segment(tiny(learning_rate=1e11, log_every=1), 0, IMAGES, None, tmp_path / "step3", 3, "cpu")
    assert all(np.isfinite(row["loss"]) for row in state.rows) and state.diverged == 3
    assert summary(tmp_path / "step3/state.pt")["diverged"] == 3
    assert load_checkpoint(tmp_path / "step3/weights.safetensors", "cpu").diverged


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_that_are_not_finite_are_no_samples(tmp_path, sampler):
    state = TrainState(tiny(), 0, "cpu")
    weights = {name: torch.full_like(value, 1e30) for name, value in state.averaged_weights()["ema0.9999"].items()}
    save_weights(tmp_path / "weights.safetensors", weights, tiny().initial, 0, 3, diverged=False)
    checkpoint = load_checkpoint(tmp_path / "weights.safetensors", "cpu")
    settings = Sample(images=4, steps=2, batch_size=2, sampler=sampler)
    assert sample_checkpoint(checkpoint, settings, "cpu").shape == (0, 8, 8, 3)


def test_the_mse_of_a_state_is_the_mean_since_a_checkpoint(tmp_path):
    state = train_segment(tiny(log_every=2), 0, IMAGES, None, tmp_path / "step5", 5, "cpu")
    (first, second, last), path = [row["mse"] for row in state.rows], tmp_path / "step5/state.pt"
    assert summary(path)["mse"] == pytest.approx((2 * first + 2 * second + last) / 5)
    assert summary(path, since=2)["mse"] == pytest.approx((2 * second + last) / 3)
    assert summary(path, since=5)["mse"] is None


def test_a_checkpoint_has_the_size_of_its_last_update(tmp_path):
    """Against the weights of runs that end at neighbouring steps; also in a segment of one step."""
    run, paths = tiny(), {name: tmp_path / name / f"step{name[-1]}" for name in ("end4", "end5", "part4", "part5")}
    for name in ("end4", "end5", "part4"):
        train_segment(run, 0, IMAGES, None, paths[name], int(name[-1]), "cpu")
    older = torch.load(paths["part4"] / "state.pt", weights_only=True)
    del older["norms"]  # states of earlier versions have none
    save_state(paths["part4"] / "state.pt", older)
    train_segment(run, 0, IMAGES, paths["part4"] / "state.pt", paths["part5"], 5, "cpu")
    old, new = (
        torch.cat([w.flatten() for w in torch.load(paths[name] / "state.pt", weights_only=True)["model"].values()])
        for name in ("end4", "end5")
    )
    for name in ("end5", "part5"):
        facts = summary(paths[name] / "state.pt")
        assert facts["update_norm"] == pytest.approx((new - old).double().norm().item(), rel=1e-5)
        assert facts["weight_norm"] == pytest.approx(old.double().norm().item(), rel=1e-5)
    assert summary(paths["end4"] / "state.pt")["update_norm"] != facts["update_norm"]
    assert "update_norm" not in summary(paths["part4"] / "state.pt")
    train_segment(tiny(learning_rate=1e15), 0, IMAGES, None, tmp_path / "diverged/step20", 20, "cpu")
    assert summary(tmp_path / "diverged/step20/state.pt")["update_norm"] is None


def test_training_lowers_the_loss(tmp_path):
    """On one constant image, the loss of a short run becomes much smaller than that of the untrained net."""
    image = np.full((1, 8, 8, 3), 200, np.uint8)
    state = train_segment(tiny(log_every=10), 0, image, None, tmp_path / "step100", 100, "cpu")
    loss = [float(row["mse"]) for row in timeless_log(tmp_path)]
    assert state.step == 100 and loss[-1] < 0.3 * loss[0]


def test_samples_do_not_depend_on_the_batch(tmp_path):
    train_segment(tiny(), 0, IMAGES, None, tmp_path / "step4", 4, "cpu")
    checkpoint = load_checkpoint(tmp_path / "step4/weights.safetensors", "cpu")
    samples = []
    for batch_size, images in ((5, 5), (2, 5), (8, 7)):
        settings = Sample(images=images, batch_size=batch_size, steps=5)
        samples.append(sample_checkpoint(checkpoint, settings, "cpu")[:5].astype(int))
    assert samples[0].shape == (5, 8, 8, 3) and samples[0].std() > 10
    assert np.abs(samples[0] - samples[1]).max() <= 1 and np.abs(samples[0] - samples[2]).max() <= 1


def test_ddpm_samples_do_not_depend_on_the_batch(tmp_path):
    initial_weights(Initial.model_validate(tiny().initial), 0, tmp_path / "weights.safetensors")
    checkpoint = load_checkpoint(tmp_path / "weights.safetensors", "cpu")
    samples = []
    for batch_size in (3, 2):
        settings = Sample(sampler="ddpm", images=3, batch_size=batch_size, steps=5)
        samples.append(sample_checkpoint(checkpoint, settings, "cpu").astype(int))
    assert np.abs(samples[0] - samples[1]).max() <= 1


def test_training_starts_from_the_weights_of_step_0(tmp_path):
    initial_weights(tiny().initial, 7, tmp_path / "weights.safetensors")
    loaded = load_checkpoint(tmp_path / "weights.safetensors", "cpu").model.state_dict()
    start = TrainState(tiny(), 7, "cpu")
    assert all(torch.equal(loaded[key], value) for key, value in start.averaged_weights()["ema0.9999"].items())


@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: b"", lambda content: b"x" * 100])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    initial_weights(tiny().initial, 0, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match="weights.safetensors: is not a complete checkpoint") as error:
        load_checkpoint(path, "cpu")
    assert error.value.path == path
