"""On a GPU: kernels, CUDA graphs and prefetching give the results of the plain code, without synchronization."""

import numpy as np
import pytest
import torch

from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train
from diffusion.data.batches import Batches
from diffusion.devices import largest_batch
from diffusion.nets.norm import _implementation
from diffusion.nets.torch_norm import TorchGroupNorm
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("n", "channels", "size"), [(4, 128, 128), (2, 96, 17), (8, 512, 8), (3, 32, 32)])
def test_kernels_agree_with_torch_operations(n, channels, size, silu, dtype):
    kernels = _implementation("cuda")
    assert kernels is not TorchGroupNorm
    x, g = (
        (torch.randn(n, channels, size, size, device="cuda") + shift).to(dtype, memory_format=torch.channels_last)
        for shift in (1, 0)
    )
    gain, offset = torch.randn(2, n, channels, device="cuda")
    exact = TorchGroupNorm.forward(x.double(), gain.double(), offset.double(), 32, silu)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for ours, theirs in zip(kernels.forward(x, gain, offset, 32, silu), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    found = kernels.backward(g, x, gain, offset, *(s.float() for s in exact[1:]), silu)
    expected = TorchGroupNorm.backward(g.double(), x.double(), gain.double(), offset.double(), *exact[1:], silu)
    for ours, theirs in zip(found, expected, strict=True):
        # The rounding error of sums increases with the number of pixels.
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance["rtol"], atol=tolerance["atol"] * size)


@pytest.mark.parametrize("train", [{}, {"micro_batch": 8}, {"precision": "fp32"}], ids=str)
def test_a_cuda_graph_gives_the_results_of_single_launches(train):
    run = config(**train)
    graphed = TrainState(run, 0, "cuda")
    plain = TrainState(run, 0, "cuda")
    plain.gradients = plain._gradients
    for _ in range(3):
        for state in (graphed, plain):
            train_step(state, state.batches(IMAGES))
        for a, b in zip(graphed.parameters, plain.parameters, strict=True):
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


def test_bf16_trains_like_fp32():
    exact, rough = (np.array(losses(config(precision=precision), 200)) for precision in ("fp32", "bf16"))
    assert abs(np.mean(rough[100:]) / np.mean(exact[100:]) - 1) < 0.05


def test_the_largest_batch_fits():
    model = untrained(config(), 0)[0].cuda().eval()
    count = largest_batch(model, (3, 32, 32), "cuda", "auto")
    with torch.inference_mode():
        model(torch.zeros(count, 3, 32, 32, device="cuda"), torch.zeros(count, dtype=torch.int64, device="cuda"))
