"""On a GPU: kernels, CUDA graphs and prefetching give the results of the plain code, without synchronization."""

import numpy as np
import pytest
import torch
from test_operations import norm_case, relative_error

from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train
from diffusion.data.batches import Batches
from diffusion.devices import largest_batch
from diffusion.nets import operations, plain
from diffusion.training.state import TrainState, train_step, untrained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)


def config(**train) -> RunConfig:
    return RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=32),
        model=Model(channels=64, channel_mult=(1, 2), res_blocks=1, attention_resolutions=(16,), head_channels=32),
        diffusion=Diffusion(),
        train=Train(**({"batch_size": 32, "learning_rate": 1e-3} | train)),
        scheme=Scheme(timesteps={"p2": {"gamma": 0.5, "k": 1}}),
        train_version=1,
    )


def losses(run: RunConfig, steps: int) -> list[float]:
    """Mean losses of the first steps."""
    state, found, before = TrainState(run, 0, "cuda"), [], 0.0
    batches = state.batches(IMAGES)
    for _ in range(steps):
        train_step(state, batches)
        total = state.meter.sums["losses"][0].item()
        found.append((total - before) / run.train.batch_size)
        before = total
    return found


def test_the_net_computes_with_the_fused_operations():
    assert operations.implementation("cuda").__name__ == "diffusion.nets.fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("n", "channels", "size"), [(4, 128, 128), (2, 96, 17), (8, 512, 8), (3, 32, 32)])
def test_large_norms_agree_with_torch_operations(n, channels, size, silu, dtype):
    """Small ones, and the other operations: tests/test_operations.py."""
    exact = norm_case(plain, torch.float64, n, (channels,), (size, size), "", "scale and shift", silu)
    found, rounded = (
        norm_case(implementation, dtype, n, (channels,), (size, size), "", "scale and shift", silu)
        for implementation in (operations.implementation("cuda"), plain)
    )
    for ours, expected, theirs in zip(found, exact, rounded, strict=True):
        assert relative_error(ours, expected) < max(2 * relative_error(theirs, expected), 1e-5)


@pytest.mark.parametrize("train", [{}, {"micro_batch": 8}, {"precision": "fp32"}], ids=str)
def test_a_cuda_graph_gives_the_results_of_single_launches(train):
    run = config(**train)
    graphed = TrainState(run, 0, "cuda")
    single = TrainState(run, 0, "cuda")
    single.gradients.compute = single.gradients._compute
    for _ in range(3):
        for state in (graphed, single):
            train_step(state, state.batches(IMAGES))
        for a, b in zip(graphed.parameters, single.parameters, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-4)
            b.data.copy_(a.data)  # so that rounding errors do not accumulate


def test_no_step_synchronizes_with_the_device():
    state = TrainState(config(), 0, "cuda")
    batches = state.batches(IMAGES)
    for _ in range(4):  # past the graph capture and the end of an epoch
        train_step(state, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            train_step(state, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_do_not_depend_on_where_images_are_stored():
    order = lambda epoch: torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(epoch))  # noqa: E731
    resident, read = (Batches(IMAGES, 32, order, "cuda", resident=held) for held in (True, False))
    for step in range(8):
        assert torch.equal(resident[step], read[step])


def test_fused_operations_train_like_plain_ones(monkeypatch):
    fused = np.array(losses(config(), 200))
    monkeypatch.setattr(operations, "implementation", lambda device_type: plain)
    assert abs(np.mean(fused[100:]) / np.mean(losses(config(), 200)[100:]) - 1) < 0.05


def test_bf16_trains_like_fp32():
    exact, rough = (np.array(losses(config(precision=precision), 200)) for precision in ("fp32", "bf16"))
    assert abs(np.mean(rough[100:]) / np.mean(exact[100:]) - 1) < 0.05


def test_the_largest_batch_fits():
    model = untrained(config(), 0)[0].cuda().eval()
    count = largest_batch(model, (3, 32, 32), "cuda")
    with torch.inference_mode():
        model(torch.zeros(count, 3, 32, 32, device="cuda"), torch.zeros(count, dtype=torch.int64, device="cuda"))
