"""The library compared with values of the reference implementation (guided-diffusion), stored in tests/data.

Inputs are not stored: `det(name, ...)` generates them from the CRC-32 of their name.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import timesteps
from diffusion.gaussian import NoiseSchedule, linear_betas, p_mean_variance
from diffusion.losses import hybrid_loss, p2_weight
from diffusion.nets.unet import UNet
from diffusion.sampling import ddim_sample, ddim_timesteps

DATA = Path(__file__).parent / "data"
GOLDEN = dict(np.load(DATA / "adm_reference.npz"))
KEYS = json.loads((DATA / "adm_state_dict_keys.json").read_text())
# These entries are inputs of the loss.
INPUTS = {"linear_p2_0.5/t", "linear_p2_0/t"}
TINY32 = {
    "image_size": 32,
    "channels": 32,
    "channel_mult": (1, 2),
    "res_blocks": 1,
    "attention_resolutions": (16,),
    "head_channels": 16,
}
FFHQ128 = {
    "image_size": 128,
    "channels": 128,
    "channel_mult": (1, 1, 2, 3, 4),
    "res_blocks": 2,
    "attention_resolutions": (16,),
    "head_channels": 64,
}


def det(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


def p2_entries(schedule: NoiseSchedule, gamma: float) -> dict[str, Tensor]:
    prefix = f"linear_p2_{gamma:g}"
    t = torch.from_numpy(GOLDEN[f"{prefix}/t"]).long()
    x_start, noise = torch.tanh(det("ax0", (4, 3, 8, 8), 1.0)), det("aeps", (4, 3, 8, 8), 1.0)
    model_output = det("amo", (4, 6, 8, 8), 0.7)
    x_t = schedule.q_sample(x_start, t, noise)
    weight = p2_weight(schedule.snr, gamma, 1.0)
    losses = hybrid_loss(schedule, model_output, x_start, x_t, t, noise, weight[t].float())
    p = p_mean_variance(schedule, model_output, x_t, t)
    entries = {
        "x_t": x_t,
        "loss": losses.loss,
        "mse": losses.mse,
        "vb": losses.vb,
        "alphas_cumprod": schedule.alphas_cumprod,
        "snr": schedule.snr,
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_log_variance_clipped,
        "p2_weight": weight,
        "under_p": timesteps.p2(schedule, gamma, 1.0),
        "p_mean": p.mean,
        "p_log_variance": p.log_variance,
        "pred_xstart": p.pred_x_start,
    }
    return {f"{prefix}/{name}": value for name, value in entries.items()}


def ddim_entries(schedule: NoiseSchedule) -> dict[str, Tensor]:
    mix = torch.eye(3) + det("amix", (3, 3), 0.1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = schedule.alphas_cumprod.float()[t].view(-1, 1, 1, 1)
        epsilon = torch.einsum("oc,bchw->bohw", mix, x) * (1 - a).sqrt() / (0.25 * a + 1 - a)
        return torch.cat([epsilon, torch.zeros_like(epsilon)], dim=1)

    return {
        "ddim25/timesteps": ddim_timesteps(1000, 25),
        "ddim25/sample": ddim_sample(model, schedule, det("axT", (2, 3, 8, 8), 1.0), 25),
    }


def unet_entries() -> dict[str, Tensor]:
    net = UNet(**TINY32).eval()
    net.load_state_dict({key: det(key, tuple(value.shape), 0.05) for key, value in net.state_dict().items()})
    with torch.no_grad():
        return {"unet_tiny32/y": net(det("tiny32.x", (2, 3, 32, 32), 1.0), torch.tensor([3, 871]))}


@pytest.fixture(scope="module")
def computed() -> dict[str, Tensor]:
    schedule = NoiseSchedule(linear_betas(1000))
    return p2_entries(schedule, 0.5) | p2_entries(schedule, 0.0) | ddim_entries(schedule) | unet_entries()


def test_all_entries_are_compared(computed):
    assert set(computed) | INPUTS == set(GOLDEN)


@pytest.mark.parametrize("entry", sorted(set(GOLDEN) - INPUTS))
def test_golden(computed, entry):
    expected, actual = GOLDEN[entry], computed[entry].numpy()
    assert actual.shape == expected.shape
    if expected.dtype == np.float64:
        tolerance = 1e-12
    elif entry.endswith("/vb"):  # differences of nearly equal numbers in float32
        tolerance = 2e-4
    else:
        tolerance = 1e-5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("name", "arguments"), [("unet_tiny32", TINY32), ("ffhq128", FFHQ128)])
def test_state_dict_layout(name, arguments):
    with torch.device("meta"):
        net = UNet(**arguments)
    layout = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert layout == KEYS[name]


def test_parameter_count_of_ffhq128():
    with torch.device("meta"):
        net = UNet(**FFHQ128)
    assert sum(parameter.numel() for parameter in net.parameters()) == 98_621_958
