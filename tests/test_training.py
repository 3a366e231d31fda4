"""Training: pairing, exact resume, and what a segment leaves behind."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.checkpoints import load_checkpoint, sample_checkpoint
from diffusion.config import Diffusion, Initial, Model, OpenMoji, RunConfig, Sample, Scheme, Train
from diffusion.errors import InputError, Stopped
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.losses import p2_weight
from diffusion.schemes import scheme_tables
from diffusion.training import segment
from diffusion.training.segment import train_segment
from diffusion.training.state import (
    TrainState,
    ema_decay,
    initial_weights,
    learning_rate,
    save_state,
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
    """All tensors of a state file by their place in it."""
    found = {}

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{place}/{key}")
        elif isinstance(value, list):
            for key, inner in enumerate(value):
                walk(inner, f"{place}/{key}")

    walk(torch.load(path, weights_only=True), "")
    return found


def timeless_log(*directories):
    """Rows of the logs without what measures time."""
    rows = [row for directory in directories for row in csv.DictReader((directory / "log.csv").open())]
    return [{k: v for k, v in row.items() if k not in {"seconds", "images_per_second"}} for row in rows]


def assert_same_end(a, b):
    assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()
    first, second = tensors(a / "state.pt"), tensors(b / "state.pt")
    assert first.keys() == second.keys() and len(first) > 100
    assert all(torch.equal(first[place], second[place]) for place in first)


def spied_steps(run, seed, steps, images=IMAGES):
    """(x_t, t) of each step, as the net saw them."""
    state = TrainState(run, seed, "cpu")
    seen = []
    state.model.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(a.clone() for a in arguments)))
    for _ in range(steps):
        train_step(state, state.batches(images))
    return seen


def test_arms_of_a_seed_share_init_images_noise_and_most_timesteps():
    a, b = (untrained(tiny(scheme), 3)[0].state_dict() for scheme in (UNI05, UNDER05))
    assert all(torch.equal(a[key], b[key]) for key in a)
    pairs = list(zip(spied_steps(tiny(UNI05), 3, 8), spied_steps(tiny(UNDER05), 3, 8), strict=True))
    equal = torch.cat([t_a == t_b for (_, t_a), (_, t_b) in pairs])
    # 86% of the timesteps are equal, and where they are, so are image and noise.
    assert 0.7 < equal.double().mean() < 0.99
    for (x_a, t_a), (x_b, t_b) in pairs:
        assert torch.equal(x_a[t_a == t_b], x_b[t_a == t_b])


def test_seeds_share_nothing():
    a, b = (untrained(tiny(), seed)[0].state_dict()["input_blocks.0.0.weight"] for seed in (0, 1))
    assert not torch.equal(a, b)
    (x_a, t_a), (x_b, t_b) = spied_steps(tiny(), 0, 1)[0], spied_steps(tiny(), 1, 1)[0]
    assert not torch.equal(t_a, t_b) and not torch.equal(x_a, x_b)
    # On grey images x_t is the noise times a positive factor: its signs are those of the noise.
    grey = np.full((1, 8, 8, 3), 127, np.uint8)
    signs = [spied_steps(tiny(), seed, 1, grey)[0][0][0].sign() for seed in (0, 1)]
    assert (signs[0] == signs[1]).double().mean() < 0.7


# With T = 8 every timestep soon has a loss, so that the history, a part of the state, decides what is drawn.
ADAPTIVE = Scheme(timesteps={"loss_second_moment": {"history": 1}}, stratified=True)
VARIANTS = {
    "plain": {},
    "dropout": {"model": tiny().model.model_copy(update={"dropout": 0.3})},
    "adaptive": {"scheme": ADAPTIVE, "diffusion": Diffusion(timesteps=8)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_equal_one_run(tmp_path, variant):
    run = tiny(random_flip=True, micro_batch=4).model_copy(update=VARIANTS[variant])
    train_segment(run, 0, IMAGES, None, tmp_path / "whole", 6, "cpu")
    previous = None
    for until in (2, 4, 6):
        train_segment(run, 0, IMAGES, previous, tmp_path / f"step{until}", until, "cpu")
        previous = tmp_path / f"step{until}" / "state.pt"
    assert_same_end(tmp_path / "whole", tmp_path / "step6")
    segments = [tmp_path / f"step{until}" for until in (2, 4, 6)]
    assert timeless_log(tmp_path / "whole") == timeless_log(*segments)
    if variant == "adaptive":
        history = torch.load(tmp_path / "whole/state.pt", weights_only=True)["history"]
        assert (history["counts"] > 0).all() and (history["losses"][:-1] > 0).all()


def test_a_stopped_segment_goes_on_to_the_same_end(tmp_path):
    run = tiny(log_every=5)
    train_segment(run, 0, IMAGES, None, tmp_path / "whole", 60, "cpu")

    def stop_after_a_row():
        while not (tmp_path / "cut/log.csv").exists() or len(timeless_log(tmp_path / "cut")) < 1:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_after_a_row)
    stopper.start()
    with pytest.raises(Stopped, match="the same command goes on"):
        train_segment(run, 0, IMAGES, None, tmp_path / "cut", 60, "cpu")
    stopper.join()
    assert not (tmp_path / "cut/state.pt").exists()
    assert 0 < torch.load(tmp_path / "cut/state.partial.pt", weights_only=True)["step"] < 60
    train_segment(run, 0, IMAGES, None, tmp_path / "cut", 60, "cpu")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert timeless_log(tmp_path / "whole") == timeless_log(tmp_path / "cut")
    assert not (tmp_path / "cut/state.partial.pt").exists()


def test_a_killed_segment_goes_on_to_the_same_end(tmp_path):
    run = tiny(log_every=5)
    train_segment(run, 0, IMAGES, None, tmp_path / "whole", 40, "cpu")
    np.save(tmp_path / "images.npy", IMAGES)
    code = f"""
import numpy as np, torch, pathlib
from diffusion.training import segment
from diffusion.training import state
from diffusion.config import RunConfig
torch.set_num_threads(1)
segment.SAVE_SECONDS = 0
run = RunConfig.model_validate_json({run.canonical()!r})
segment.train_segment(run, 0, np.load("images.npy"), None, pathlib.Path("cut"), 40, "cpu")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "cut/state.partial.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    train_segment(run, 0, IMAGES, None, tmp_path / "cut", 40, "cpu")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert timeless_log(tmp_path / "whole") == timeless_log(tmp_path / "cut")


@pytest.mark.parametrize("damage", ["other configuration", "truncated"])
def test_a_partial_state_that_does_not_fit_is_dropped(tmp_path, damage):
    run, before = tiny(), tiny(learning_rate=1e-2)
    train_segment(run, 0, IMAGES, None, tmp_path / "clean", 4, "cpu")
    other = TrainState(before if damage == "other configuration" else run, 0, "cpu")
    train_step(other, other.batches(IMAGES))
    (tmp_path / "cut").mkdir()
    partial = tmp_path / "cut/state.partial.pt"
    save_state(partial, other.content(parent="start", rows=[]))
    if damage == "truncated":
        partial.write_bytes(partial.read_bytes()[:1000])
    train_segment(run, 0, IMAGES, None, tmp_path / "cut", 4, "cpu")
    assert_same_end(tmp_path / "clean", tmp_path / "cut")


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    train_segment(tiny(), 0, IMAGES, None, tmp_path / "step2", 2, "cpu")
    state = tmp_path / "step2/state.pt"
    for run, seed in ((tiny(learning_rate=1e-2), 0), (tiny(), 1)):
        with pytest.raises(InputError, match="belongs to another run"):
            train_segment(run, seed, IMAGES, state, tmp_path / "step4", 4, "cpu")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"state.pt: damaged .*: delete it"):
        train_segment(tiny(), 0, IMAGES, state, tmp_path / "step4", 4, "cpu")


class NoReading(TorchDispatchMode):
    """Fails where the host reads a number from a tensor: on a GPU it would wait for all work."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        assert operation not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        return operation(*arguments, **(keywords or {}))


def test_no_step_reads_a_number_back():
    with NoReading(), pytest.raises(AssertionError):
        torch.ones(()).item()
    for scheme in (UNI05, ADAPTIVE):
        state = TrainState(tiny(scheme, random_flip=True, micro_batch=4), 0, "cpu")
        batches = state.batches(IMAGES)
        with NoReading():
            for _ in range(3):
                train_step(state, batches)


def test_a_state_is_saved_as_it_was_when_asked_for(tmp_path, monkeypatch):
    """Training goes on while it is written."""
    state = TrainState(tiny(), 0, "cpu")
    batches, go_on = state.batches(IMAGES), threading.Event()
    train_step(state, batches)
    before = [p.detach().clone() for p in state.parameters]
    write = state.save_state
    monkeypatch.setattr(state, "save_state", lambda *of: (go_on.wait(), write(*of)))
    saver = segment._Saver(tmp_path / "state.pt")
    saver.save(state.content())
    train_step(state, batches)
    go_on.set()
    saver.wait()
    saved = TrainState(tiny(), 0, "cpu")
    saved.load(tmp_path / "state.pt")
    assert saved.step == 1 and state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters, before, strict=True))


def test_what_the_writing_of_a_state_meets_is_raised(tmp_path):
    saver = segment._Saver(tmp_path / "no such directory/state.pt")
    saver.save(TrainState(tiny(), 0, "cpu").content())
    with pytest.raises(FileNotFoundError):
        saver.wait()


@pytest.mark.slow
def test_bf16_trains_as_fp32_does():
    """200 steps: what rounding changes is small beside what another seed does."""

    def late_loss(precision: str, seed: int) -> float:
        state = TrainState(tiny(precision=precision, random_flip=True), seed, "cpu")
        batches = state.batches(IMAGES)
        for _ in range(100):
            train_step(state, batches)
        state.meter = state.Meter(state.device)
        for _ in range(100):
            train_step(state, batches)
        return state.meter.means()["loss"]

    exact, rough = (np.array([late_loss(precision, seed) for seed in range(3)]) for precision in ("fp32", "bf16"))
    assert not np.array_equal(exact, rough)
    assert np.abs(rough - exact).max() < exact.std(ddof=1)


class Reused:
    """A function whose results each call overwrites, as those of a CUDA graph are."""

    def __init__(self, function):
        self.function, self.results = function, None

    def __call__(self, *arguments):
        found = self.function(*arguments)
        if self.results is None:
            self.results = [torch.empty_like(tensor) for tensor in found]
        for mine, new in zip(self.results, found, strict=True):
            mine.copy_(new)
        return self.results


@pytest.mark.parametrize("through", [lambda function: function, Reused])
def test_micro_batches_change_nothing_but_rounding(through):
    whole, parts = TrainState(tiny(), 0, "cpu"), TrainState(tiny(micro_batch=2), 0, "cpu")
    parts.gradients = through(parts.gradients)
    for state in (whole, parts):
        train_step(state, state.batches(IMAGES))
    assert whole.meter.means() == pytest.approx(parts.meter.means(), rel=1e-4, nan_ok=True)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        # The first moment after one step is 0.1 times the gradient.
        torch.testing.assert_close(
            whole.optimizer.state[a]["exp_avg"], parts.optimizer.state[b]["exp_avg"], rtol=1e-3, atol=1e-7
        )


def test_the_average_of_weights_follows_its_definition():
    state = TrainState(tiny(ema_decay=0.5, ema_warmup=True), 0, "cpu")
    average = [p.detach().clone() for p in state.parameters]
    for step in range(12):
        train_step(state, state.batches(IMAGES))
        decay = min(0.5, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, state.parameters, strict=True)]
    for ours, expected in zip(state.ema, average, strict=True):
        torch.testing.assert_close(ours, expected)
    assert ema_decay(0, 0.9999, True) == 0.1 and ema_decay(10**6, 0.9999, True) == 0.9999
    # A fixed decay keeps 0.9999^10000 = 37% of the start.
    assert np.prod([ema_decay(step, 0.9999, False) for step in range(10_000)]) == pytest.approx(0.368, abs=1e-3)


def test_learning_rate_warms_up_linearly_and_stays():
    assert [learning_rate(step, 0.8, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert learning_rate(0, 0.8, 0) == 0.8


def test_the_gradient_of_a_step_is_that_of_the_weighted_loss():
    """Against the loss written out for the very batch that the step saw, through the optimiser's first moment."""
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
    for ours, theirs in ((matched.mse_weight, target.mse_weight), (matched.vb_weight, target.vb_weight)):
        torch.testing.assert_close(matched.probabilities * ours, target.probabilities * theirs, rtol=1e-12, atol=0)
    w = p2_weight(schedule.snr, 0.5, 1)
    torch.testing.assert_close(matched.mse_weight, w.mean().expand(1000), rtol=1e-12, atol=0)
    torch.testing.assert_close(matched.vb_weight, w.mean() / w, rtol=1e-12, atol=0)
    assert w.mean().item() == pytest.approx(0.806, abs=5e-4)


def test_a_diverged_run_ends_and_says_so(tmp_path):
    run = tiny(learning_rate=1e30)
    state = train_segment(run, 0, IMAGES, None, tmp_path / "step20", 20, "cpu")
    assert 0 < state.diverged < 20
    later = train_segment(run, 0, IMAGES, tmp_path / "step20/state.pt", tmp_path / "step40", 40, "cpu")
    assert later.diverged == state.diverged and timeless_log(tmp_path / "step40") == []
    checkpoint = load_checkpoint(tmp_path / "step40/weights.safetensors", "cpu")
    assert checkpoint.diverged
    sample_checkpoint(checkpoint, Sample(images=4, steps=2), tmp_path / "samples.npy", "cpu")
    assert np.load(tmp_path / "samples.npy").shape == (0, 8, 8, 3)


def test_training_learns(tmp_path):
    """On one constant image, the loss of a short run falls far below that of the untrained net."""
    state = train_segment(tiny(log_every=10), 0, np.full((1, 8, 8, 3), 200, np.uint8), None, tmp_path, 100, "cpu")
    loss = [float(row["mse"]) for row in timeless_log(tmp_path)]
    assert state.step == 100 and loss[-1] < 0.3 * loss[0]


def test_samples_do_not_depend_on_the_batch(tmp_path):
    train_segment(tiny(), 0, IMAGES, None, tmp_path, 4, "cpu")
    checkpoint = load_checkpoint(tmp_path / "weights.safetensors", "cpu")
    arrays = []
    for batch_size, images in ((5, 5), (2, 5), (8, 7)):
        sample_checkpoint(checkpoint, Sample(images=images, batch_size=batch_size, steps=5), tmp_path / "s.npy", "cpu")
        arrays.append(np.load(tmp_path / "s.npy")[:5].astype(int))
    assert arrays[0].shape == (5, 8, 8, 3) and arrays[0].std() > 10
    assert np.abs(arrays[0] - arrays[1]).max() <= 1 and np.abs(arrays[0] - arrays[2]).max() <= 1


def test_ddpm_samples_do_not_depend_on_the_batch(tmp_path):
    initial_weights(Initial.model_validate(tiny().initial), 0, tmp_path / "weights.safetensors")
    checkpoint = load_checkpoint(tmp_path / "weights.safetensors", "cpu")
    arrays = []
    for batch_size in (3, 2):
        settings = Sample(sampler="ddpm", images=3, batch_size=batch_size, steps=5)
        sample_checkpoint(checkpoint, settings, tmp_path / "s.npy", "cpu")
        arrays.append(np.load(tmp_path / "s.npy").astype(int))
    assert np.abs(arrays[0] - arrays[1]).max() <= 1


def test_step_0_is_where_training_starts(tmp_path):
    initial_weights(tiny().initial, 7, tmp_path / "weights.safetensors")
    loaded = load_checkpoint(tmp_path / "weights.safetensors", "cpu").model.state_dict()
    start = TrainState(tiny(), 7, "cpu")
    assert all(torch.equal(loaded[key], value) for key, value in start.ema_weights().items())


@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: b"", lambda content: b"x" * 100])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    initial_weights(tiny().initial, 0, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="weights.safetensors: not a whole checkpoint"):
        load_checkpoint(path, "cpu")
