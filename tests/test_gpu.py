"""On a GPU: kernels, CUDA graphs and prefetching give the results of the plain code, without synchronization."""

import numpy as np
import pytest
import torch
from made import correlated
from test_operations import norm_case, relative_error

from diffusion.checkpoints import Checkpoint, sample_checkpoint
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Sample, Scheme, Train
from diffusion.data.batches import Batches
from diffusion.devices import largest_batch
from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.probe import probe
from diffusion.evaluation.reference import evaluate, reference_of
from diffusion.evaluation.weights import LITE0
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.nets import operations, plain
from diffusion.prefetch import prefetched
from diffusion.schemes import scheme_tables
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
            averages = (state.optimizer.state[p]["exp_avg"] for state, p in ((graphed, a), (single, b)))
            torch.testing.assert_close(*averages, rtol=1e-2, atol=1e-5)
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


def test_a_probe_has_the_values_of_the_cpu():
    run, rows = config(precision="fp32"), []
    for device in ("cpu", "cuda"):
        net, schedule = untrained(run, 0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.02)
        tables = scheme_tables(schedule, run.scheme, run.match)
        rows.append(probe(net.to(device), schedule, tables, IMAGES[:64], 2, 16, 0, device, "fp32"))
    for cpu, gpu in zip(*rows, strict=True):
        assert gpu["value"] == pytest.approx(cpu["value"], rel=1e-2)


def test_tensors_that_are_made_ahead_arrive_unchanged():
    busy = torch.randn(4096, 4096, device="cuda")
    with prefetched(lambda number: torch.full((1_000_000,), float(number)), range(30), "cuda") as tensors:
        found = []
        for tensor in tensors:
            busy @ busy  # the GPU is behind the host
            found.append(tensor.mean())
    assert [mean.item() for mean in found] == list(range(30))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_in_fp32_are_those_of_the_cpu(sampler):
    settings = Sample(sampler=sampler, images=5, batch_size=2, steps=4, precision="fp32")
    images = []
    for device in ("cpu", "cuda"):
        model = untrained(config(), 0)[0].to(device).eval().requires_grad_(False)
        checkpoint = Checkpoint(model, NoiseSchedule(linear_betas(1000)), 32)
        images.append(sample_checkpoint(checkpoint, settings, device).astype(int))
    assert images[0].std() > 10 and np.abs(images[0] - images[1]).max() <= 1


def test_features_are_those_of_the_cpu():
    on_cpu, on_gpu = (
        extract_features(IMAGES, load_extractor(LITE0, device), batch_size=48) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.fixture
def tf32():
    """TF32 is on, as a user may have it; metrics turn it off."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("n", [100, 300])  # fewer and more images than 2 D
@pytest.mark.usefixtures("tf32")
def test_metrics_are_those_of_the_cpu(n):
    real, generated = correlated(2000, 128, seed=0), correlated(n, 128, seed=1) + np.float32(0.1)
    real[1:5] = real[0]
    held_out = correlated(200, 128, seed=2)
    expected, found = (reference_of(real, {}, held_out, device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    covariance = expected.root.T @ expected.root
    np.testing.assert_allclose(found.root.T @ found.root, covariance, rtol=0, atol=1e-12 * covariance.max())
    assert found.kernel == pytest.approx(expected.kernel, rel=1e-7)
    np.testing.assert_allclose(found.radii[5:], expected.radii[5:], rtol=1e-4)
    assert found.radii[:5].max() < 1e-3 * np.linalg.norm(real[0])  # exact duplicates
    np.testing.assert_allclose(found.held_out_distances, expected.held_out_distances, rtol=1e-4)

    names = ["fd", "fd_infinity", "kid", "precision", "recall", "memorised"]
    rows = zip(*(evaluate(generated, expected, names, device) for device in ("cpu", "cuda")), strict=True)
    tolerances = {"kid": 1e-6 * expected.kernel, "precision": 1 / n, "recall": 1e-3, "memorised": 1e-3}
    for cpu, gpu in rows:
        assert gpu.reason == cpu.reason
        assert gpu.value == pytest.approx(cpu.value, rel=1e-6, abs=tolerances.get(cpu.metric, 0), nan_ok=True)
        assert gpu.stderr == pytest.approx(cpu.stderr, rel=1e-2, nan_ok=True)
        if cpu.metric in ("fd", "kid"):
            np.testing.assert_allclose(
                gpu.influences, cpu.influences, rtol=1e-3, atol=1e-3 * np.abs(cpu.influences).max()
            )
