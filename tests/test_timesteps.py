"""Densities over timesteps, and draws held against them by chi-square tests at fixed seeds."""

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion import timesteps
from diffusion.gaussian import NoiseSchedule, cosine_betas, linear_betas
from diffusion.timesteps import draw_timesteps

LINEAR = NoiseSchedule(linear_betas(1000))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_density():
    torch.testing.assert_close(timesteps.uniform(LINEAR), torch.full((1000,), 1e-3, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(50)])
def test_p2_density_is_the_normalised_weight(gamma, betas):
    schedule = NoiseSchedule(betas)
    p, noise = timesteps.p2(schedule, gamma, 1.0), (1 - schedule.alphas_cumprod).numpy()
    np.testing.assert_allclose(p, noise**gamma / np.sum(noise**gamma), rtol=1e-12)


def test_p2_density_knows_k():
    p = timesteps.p2(LINEAR, 1.0, 3.0)
    np.testing.assert_allclose(p[0] / p[-1], (3 + LINEAR.snr[-1]) / (3 + LINEAR.snr[0]), rtol=1e-12)


def test_p2_density_without_gamma_is_uniform():
    torch.testing.assert_close(timesteps.p2(LINEAR, 0.0, 1.0), timesteps.uniform(LINEAR))


SMALL = NoiseSchedule(linear_betas(100))
DENSITIES = {
    "uniform": timesteps.uniform(SMALL),
    "p2 0.5": timesteps.p2(SMALL, 0.5, 1.0),
    "p2 1": timesteps.p2(SMALL, 1.0, 1.0),
    # Mass 0 somewhere, and a shape that P2 cannot have.
    "two blocks": torch.tensor([0.0] * 20 + [1 / 40] * 20 + [0.0] * 40 + [1 / 40] * 20, dtype=torch.float64),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_have_the_density(name):
    p = DENSITIES[name].numpy()
    drawn = draw_timesteps(DENSITIES[name], 1_000_000, seeded())
    counts = np.bincount(drawn, minlength=100)
    possible = p > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], 1_000_000 * p[possible]).pvalue > 1e-3


def test_draws_of_one_batch_are_independent():
    # Neighbouring draws fill the 10 x 10 table of coarse pairs evenly in proportion.
    p = DENSITIES["p2 1"]
    first, second = (draw_timesteps(p, 200_000, seeded()) // 10).view(2, -1)
    table = np.bincount(first * 10 + second, minlength=100).reshape(10, 10)
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(("gamma", "share"), [(0.5, 0.86), (1.0, 0.80)])
def test_arms_share_as_many_timesteps_as_can_be(gamma, share):
    p, uniform = timesteps.p2(LINEAR, gamma, 1.0), timesteps.uniform(LINEAR)
    equal = draw_timesteps(p, 100_000, seeded()) == draw_timesteps(uniform, 100_000, seeded())
    total_variation = (p - uniform).abs().sum().item() / 2
    # Four standard errors of a proportion over 100,000 draws.
    assert equal.double().mean().item() == pytest.approx(1 - total_variation, abs=0.006)
    assert 1 - total_variation == pytest.approx(share, abs=0.01)


def test_draws_follow_the_generator_alone():
    p = timesteps.p2(LINEAR, 0.5, 1.0)
    torch.manual_seed(1)
    one = draw_timesteps(p, 64, seeded(3))
    torch.manual_seed(2)
    torch.testing.assert_close(draw_timesteps(p, 64, seeded(3)), one, rtol=0, atol=0)
    assert not torch.equal(draw_timesteps(p, 64, seeded(4)), one)


@pytest.mark.parametrize("total", [2, 49, 4000])
@pytest.mark.parametrize("count", [1, 50_000])
def test_draws_are_indices_of_the_timesteps(total, count):
    drawn = draw_timesteps(timesteps.p2(NoiseSchedule(linear_betas(total)), 1.0, 1.0), count, seeded())
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    assert ((drawn >= 0) & (drawn < total)).all()
