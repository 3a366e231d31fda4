"""The transformer DiT: compared with diffusers (tests/data/dit_diffusers.py), its initial weights, and training."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from projects import edit, snakemake, tiny_project
from test_golden import det
from torch import Tensor, nn

from convergence.command.budget import Rates, budget
from convergence.study_file import load_experiment
from diffusion.averages import average_name
from diffusion.build import build_net
from diffusion.checkpoints import load_checkpoint, sample_checkpoint
from diffusion.config import Diffusion, NamedNet, OpenMoji, RunConfig, Sample, Scheme, Train
from diffusion.devices import compute_copy
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.gradients import LossGradients
from diffusion.nets.dit import DiT
from diffusion.training.segment import train_segment
from diffusion.training.state import initial_weights, untrained

EXPECTED = np.load(Path(__file__).parent / "data/dit_diffusers.npz")
SMALL = {"patch": 2, "width": 48, "depth": 2, "heads": 3}
T = torch.tensor([3, 871])


def with_det(net: nn.Module) -> nn.Module:
    """The net with the weights of tests/data/dit_diffusers.py, in evaluation mode."""
    weights = {name: det(name, tuple(value.shape), 0.1) for name, value in net.named_parameters()}
    net.load_state_dict(net.state_dict() | weights)
    return net.eval()


def small(channels: int = 6) -> nn.Module:
    return with_det(DiT(image_size=12, **SMALL, learn_sigma=channels == 6))


def images(size: int = 12) -> Tensor:
    return det("dit.x", (2, 3, size, size), 1.0)


def test_a_predicted_variance_changes_no_other_initial_weight():
    """So arms with and without it start from equal weights."""
    torch.manual_seed(0)
    one = DiT(image_size=12, **SMALL, learn_sigma=True).state_dict()
    torch.manual_seed(0)
    other = DiT(image_size=12, **SMALL, learn_sigma=False).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("final_layer.linear"))


@pytest.mark.parametrize("channels", [3, 6])
@torch.no_grad()
def test_output_is_that_of_diffusers(channels):
    expected = torch.from_numpy(EXPECTED[f"{channels} channels"])
    assert expected.shape == (2, channels, 12, 12) and expected.std() > 0.5
    torch.testing.assert_close(small(channels)(images(), T), expected, rtol=0, atol=1e-5)


def test_state_dict_has_the_published_layout():
    linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    modules += [f"blocks.{n}.{name}" for n in range(12) for name in linear]
    modules += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    layout = {key: tuple(value.shape) for key, value in build_net(32, NamedNet(dit={})).state_dict().items()}
    assert layout.keys() == {"pos_embed"} | {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert layout["pos_embed"] == (1, 256, 384) and layout["x_embedder.proj.weight"] == (384, 3, 2, 2)
    assert layout["final_layer.linear.weight"] == (24, 384) and layout["t_embedder.mlp.0.weight"] == (384, 256)


@torch.no_grad()
def test_initial_weights_are_the_published_ones():
    net = build_net(16, NamedNet(dit={"width": 96, "depth": 2, "patch": 4}))
    assert (net(images(16), T) == 0).all()
    tokens = torch.randn(2, 16, 96)
    assert torch.equal(net.blocks[0](tokens, torch.randn(2, 96)), tokens)
    zero = re.compile(r"adaLN_modulation|final_layer\.linear|bias")
    for name, parameter in net.named_parameters():
        if zero.search(name):
            assert (parameter == 0).all(), name
        elif name.startswith("t_embedder"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:  # xavier: uniform, with the variance 2 / (inputs + outputs)
            limit = (6 / sum(parameter.flatten(1).shape)) ** 0.5
            assert 0.95 * limit < parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.05), name


def test_positions_are_those_of_columns_and_then_rows():
    frequencies = [1, 0.1, 0.01, 0.001]
    grid = DiT(image_size=6, patch=2, width=16, depth=1, heads=1).pos_embed[0].view(3, 3, 16)
    for row in range(3):
        for column in range(3):
            expected = [f(at * w) for at in (column, row) for f in (np.sin, np.cos) for w in frequencies]
            np.testing.assert_allclose(grid[row, column], expected, atol=1e-6)


@torch.no_grad()
def test_bf16_is_close_to_fp32():
    net = small()
    exact, rounded = net(images(), T), compute_copy(net, "bf16")(images(), T)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).std() < 0.02 * exact.std()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_reads_no_value_of_a_tensor(precision):
    """A CUDA graph cannot be captured if the CPU reads a value. On the meta device, tensors have none."""
    net = compute_copy(small().to("meta"), precision)
    y = net(torch.empty(2, 3, 12, 12, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    gradients = torch.autograd.grad(y.sum(), list(net.parameters()))
    assert [g.shape for g in gradients] == [p.shape for p in net.parameters()]


class Mine(nn.Module):
    """A net of one's own, which does not convert its inputs to the dtype of its weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.time(t[:, None] / 1000)[..., None, None]))


def test_a_net_of_ones_own_computes_bf16_under_autocast():
    net, schedule = with_det(Mine()), NoiseSchedule(linear_betas(1000))
    batch = images(), det("noise", (2, 3, 12, 12), 1.0), T, torch.ones(2), torch.ones(2)
    (exact, terms), (low, low_terms) = (LossGradients(net, schedule, p)(*batch) for p in ("fp32", "bf16"))
    torch.testing.assert_close(low_terms, terms, rtol=0.05, atol=0)
    for g, expected in zip(low, exact, strict=True):
        assert g.dtype == torch.float32 and not torch.equal(g, expected)
        assert (g - expected).norm() < 0.1 * expected.norm()


def run(precision: str = "fp32", **keys: object) -> RunConfig:
    return RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=8),
        model=NamedNet(dit={"patch": 2, "width": 32, "depth": 1, "heads": 2, **keys}),
        diffusion=Diffusion(),
        train=Train(batch_size=8, learning_rate=2e-3, log_every=10, precision=precision),
        scheme=Scheme(),
        train_version=1,
    )


@pytest.mark.parametrize(("precision", "learn_sigma"), [("fp32", True), ("bf16", False)])
def test_training_lowers_the_loss_and_its_checkpoint_is_sampled(tmp_path, precision, learn_sigma):
    """On one constant image, the loss of a short run becomes much smaller than that of the untrained net."""
    settings = run(precision, learn_sigma=learn_sigma)
    image = np.full((1, 8, 8, 3), 200, np.uint8)
    state = train_segment(settings, 0, image, None, tmp_path / "step100", 100, "cpu")
    assert state.rows[-1]["mse"] < 0.5 * state.rows[0]["mse"] and (state.rows[-1]["vb"] == 0) == (not learn_sigma)
    checkpoint = load_checkpoint(tmp_path / "step100/weights.safetensors", "cpu")
    loaded, expected = checkpoint.model.state_dict(), state.averaged_weights()[average_name(settings.train.ema_decay)]
    assert isinstance(checkpoint.model, DiT) and loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    samples = sample_checkpoint(checkpoint, Sample(images=4, steps=10, precision=precision), "cpu")
    assert samples.shape == (4, 8, 8, 3) and samples.std() > 0


def test_the_untrained_net_is_rebuilt_from_its_checkpoint(tmp_path):
    initial_weights(run().initial, 3, tmp_path / "weights.safetensors")
    loaded = load_checkpoint(tmp_path / "weights.safetensors", "cpu").model.state_dict()
    expected = untrained(run(), 3)[0].state_dict()
    assert "pos_embed" in loaded and all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_study_runs_with_a_dit(tmp_path, monkeypatch):
    project = tiny_project(tmp_path / "study")
    edit(project, lambda study: study.update(model={"dit": {"patch": 4, "width": 32, "depth": 1, "heads": 2}}))
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "reports/openmoji/mechanism.csv").exists() and (project / "reports/openmoji/verdict.md").exists()
    (checkpoint, *_) = (project / "results/openmoji").glob("under05-*/seed0/step8/weights.safetensors")
    parameters = sum(p.numel() for p in load_checkpoint(checkpoint, "cpu").model.parameters())
    monkeypatch.chdir(project)
    estimate = budget(load_experiment(project / "experiments/openmoji.yaml"), Rates(1, 1), 1)
    assert estimate.peak - estimate.kept == 16 * parameters
