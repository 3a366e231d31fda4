"""Densities over timesteps, and draws compared with them by chi-square tests at fixed seeds."""

from collections import deque

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from diffusion import timesteps
from diffusion.gaussian import NoiseSchedule, cosine_betas, linear_betas
from diffusion.timesteps import LossHistory, draw_stratified, draw_timesteps

LINEAR = NoiseSchedule(linear_betas(1000))
SCHEDULES = {
    "linear": LINEAR,
    "linear 250": NoiseSchedule(linear_betas(250)),
    "cosine": NoiseSchedule(cosine_betas(1000)),
    "cosine 50": NoiseSchedule(cosine_betas(50)),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


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


def test_p2_density_depends_on_k():
    p = timesteps.p2(LINEAR, 1.0, 3.0)
    np.testing.assert_allclose(p[0] / p[-1], (3 + LINEAR.snr[-1]) / (3 + LINEAR.snr[0]), rtol=1e-12)


def test_p2_density_for_gamma_0_is_uniform():
    torch.testing.assert_close(timesteps.p2(LINEAR, 0.0, 1.0), timesteps.uniform(LINEAR))


def log_sigma_edges(schedule: NoiseSchedule) -> np.ndarray:
    """Midpoints between the values of ln(sigma), and the ends, extrapolated by half an interval. [T + 1]."""
    kept = np.cumprod(1 - schedule.betas.numpy())
    x = 0.5 * np.log((1 - kept) / kept)
    middles = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middles[0]], middles, [2 * x[-1] - middles[-1]]])


@EVERY_SCHEDULE
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.7, 0.4), (3.0, 5.0)])
def test_log_normal_sigma_is_the_normal_probability_around_each_log_sigma(schedule, mean, std):
    mass = np.diff(stats.norm.cdf(log_sigma_edges(schedule), mean, std))
    np.testing.assert_allclose(
        timesteps.log_normal_sigma(schedule, mean, std), mass / mass.sum(), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize(("mean", "std"), [(-20.0, 1.0), (30.0, 1.2)])
def test_log_normal_sigma_is_exact_far_in_a_tail(mean, std):
    # The integral of the normal density over each interval, by 20 Gauss-Legendre nodes.
    edges = log_sigma_edges(LINEAR)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    half = np.diff(edges)[:, None] / 2
    mass = (half * weights * stats.norm.pdf(edges[:-1, None] + half * (nodes + 1), mean, std)).sum(1)
    np.testing.assert_allclose(timesteps.log_normal_sigma(LINEAR, mean, std), mass / mass.sum(), rtol=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (2.0, 0.7), (4.5, 2.0)])
def test_log_normal_sigma_has_the_moments_of_the_truncated_normal(mean, std):
    schedule = NoiseSchedule(linear_betas(4000))
    edges, p = log_sigma_edges(schedule), timesteps.log_normal_sigma(schedule, mean, std).numpy()
    middles = (edges[1:] + edges[:-1]) / 2
    expected = stats.truncnorm((edges[0] - mean) / std, (edges[-1] - mean) / std, mean, std)
    first = (p * middles).sum()
    # Sums over 4,000 intervals approximate the integrals.
    assert first == pytest.approx(expected.mean(), abs=1e-3)
    assert (p * (middles - first) ** 2).sum() == pytest.approx(expected.var(), rel=1e-3)


@EVERY_SCHEDULE
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal_is_the_normal_probability_of_the_logit(schedule, mean, std):
    edges = special.logit(np.arange(schedule.timesteps + 1) / schedule.timesteps)
    expected = np.diff(stats.norm.cdf(edges, mean, std))
    np.testing.assert_allclose(timesteps.logit_normal(schedule, mean, std), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("t", [0, 60, 125, 200, 249])
def test_logit_normal_is_the_integral_of_its_published_density(t):
    mean, std = 0.4, 0.8

    def density(time: float) -> float:
        return stats.norm.pdf(special.logit(time), mean, std) / (time * (1 - time))

    expected, _ = integrate.quad(density, t / 250, (t + 1) / 250, epsabs=0, epsrel=1e-10)
    p = timesteps.logit_normal(SCHEDULES["linear 250"], mean, std)
    assert p[t].item() == pytest.approx(expected, rel=1e-7)


@EVERY_SCHEDULE
@pytest.mark.parametrize(("k", "share"), [(5.0, 0.7), (25.0, 0.5), (0.2, 0.9), (5.0, 1.0)])
def test_speed_density_equals_the_published_formula(schedule, k, share):
    total = schedule.timesteps
    tau = round(share * total)
    expected = [k / (total + tau * (k - 1))] * tau + [1 / (total + tau * (k - 1))] * (total - tau)
    np.testing.assert_allclose(timesteps.speed(schedule, k, tau), expected, rtol=1e-12)


@EVERY_SCHEDULE
def test_loss_second_moment_starts_uniform(schedule):
    p = timesteps.loss_second_moment(schedule, 10, 0.001)
    torch.testing.assert_close(p, timesteps.uniform(schedule), rtol=0, atol=0)


# Usual parameters, and parameters that put most of the probability on few timesteps or outside the schedule.
PARAMETERS = [
    ("uniform", ()),
    ("loss_second_moment", (10, 0.001)),
    ("p2", (0.5, 1.0)),
    ("p2", (20.0, 1.0)),
    ("p2", (0.5, 1e-9)),
    ("p2", (0.5, 1e9)),
    ("log_normal_sigma", (-1.2, 1.2)),
    ("log_normal_sigma", (30.0, 1.0)),
    ("log_normal_sigma", (-30.0, 1.0)),
    ("log_normal_sigma", (0.0, 1e-6)),
    ("log_normal_sigma", (0.0, 1e6)),
    ("logit_normal", (0.0, 1.0)),
    ("logit_normal", (800.0, 1.0)),
    ("logit_normal", (0.0, 1e-6)),
    ("logit_normal", (0.0, 1e9)),
    ("speed", (5.0, 50)),
    ("speed", (1e-9, 1)),
    ("speed", (1e9, 1)),
]


@EVERY_SCHEDULE
@pytest.mark.parametrize(("name", "parameters"), PARAMETERS)
def test_a_density_gives_probabilities_of_all_timesteps(schedule, name, parameters):
    p = timesteps.DENSITIES[name](schedule, *parameters)
    assert p.shape == (schedule.timesteps,) and p.dtype == torch.float64
    assert (p >= 0).all() and p.sum().item() == pytest.approx(1, abs=1e-12)


SMALL = NoiseSchedule(linear_betas(100))
DENSITIES = {
    "uniform": timesteps.uniform(SMALL),
    "p2 0.5": timesteps.p2(SMALL, 0.5, 1.0),
    "p2 1": timesteps.p2(SMALL, 1.0, 1.0),
    "log_normal_sigma": timesteps.log_normal_sigma(SMALL, -1.2, 1.2),
    "logit_normal": timesteps.logit_normal(SMALL, 0.5, 0.8),
    "speed": timesteps.speed(SMALL, 5.0, 70),
    # Zero at some timesteps, and with a shape that P2 cannot have.
    "two blocks": torch.tensor([0.0] * 20 + [1 / 40] * 20 + [0.0] * 40 + [1 / 40] * 20, dtype=torch.float64),
}
EVERY_DENSITY = pytest.mark.parametrize("p", DENSITIES.values(), ids=DENSITIES)


def chi_square(drawn: torch.Tensor, p: torch.Tensor) -> float:
    """p-value of draws given probabilities; timesteps expected fewer than 5 times are one cell."""
    counts, expected = np.bincount(drawn, minlength=len(p)), len(drawn) * p.numpy()
    assert counts[expected == 0].sum() == 0
    cells = np.where(expected < 5, 0, np.arange(1, len(p) + 1))
    counts, expected = np.bincount(cells, counts), np.bincount(cells, expected)
    return stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue


@EVERY_DENSITY
def test_draws_have_the_density(p):
    assert chi_square(draw_timesteps(p, 1_000_000, seeded()), p) > 1e-3


@EVERY_DENSITY
def test_stratified_draws_have_the_density_at_each_position_of_a_batch(p):
    # Draws of one batch are dependent; draws of different batches are independent.
    generator = seeded()
    batches = torch.stack([draw_stratified(p, 4, generator) for _ in range(8_000)])
    for place in range(4):
        assert chi_square(batches[:, place], p) > 1e-3


@EVERY_DENSITY
@pytest.mark.parametrize("count", [1, 7, 64, 300])
def test_stratified_draws_spread_evenly(p, count):
    """The number of draws up to any timestep is its expectation, rounded down or up."""
    generator = seeded()
    for _ in range(100):
        below = np.bincount(draw_stratified(p, count, generator), minlength=100).cumsum()
        assert (np.abs(below - count * p.numpy().cumsum()) < 1 + 1e-9).all()


@EVERY_DENSITY
def test_stratified_batch_means_vary_less(p):
    def variance(draw):
        generator = seeded()
        return np.var([torch.cos(draw(p, 16, generator) / 40).mean().item() for _ in range(500)])

    # Their variance is 1% to 9% of that of independent draws, and 19% if few timesteps have most of the probability.
    assert variance(draw_stratified) < 0.3 * variance(draw_timesteps)


@EVERY_DENSITY
def test_stratified_draws_share_the_offset(p):
    """For very many timesteps, the draws are u itself; the draws from every other density follow from this u."""
    u = draw_stratified(torch.full((1_000_000,), 1e-6, dtype=torch.float64), 64, seeded(5)).numpy() / 1e6
    # u_i = (u_0 + i / B) mod 1, with a precision of 1e-6.
    np.testing.assert_allclose((u - u[0]) % 1, (np.arange(64) / 64) % 1, atol=2e-6)
    drawn = draw_stratified(p, 64, seeded(5)).numpy()
    below, above = (np.searchsorted(p.numpy().cumsum(), u + slack, side="right") for slack in (-2e-6, 2e-6))
    assert ((below <= drawn) & (drawn <= above)).all()


def test_draws_of_one_batch_are_independent():
    # In a 10 x 10 table of coarse pairs of consecutive draws, rows and columns are independent.
    p = DENSITIES["p2 1"]
    first, second = (draw_timesteps(p, 200_000, seeded()) // 10).view(2, -1)
    table = np.bincount(first * 10 + second, minlength=100).reshape(10, 10)
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(("gamma", "share"), [(0.5, 0.86), (1.0, 0.80)])
def test_runs_share_as_many_timesteps_as_possible(gamma, share):
    p, uniform = timesteps.p2(LINEAR, gamma, 1.0), timesteps.uniform(LINEAR)
    equal = draw_timesteps(p, 100_000, seeded()) == draw_timesteps(uniform, 100_000, seeded())
    total_variation = (p - uniform).abs().sum().item() / 2
    # Four standard errors of a proportion over 100,000 draws.
    assert equal.double().mean().item() == pytest.approx(1 - total_variation, abs=0.006)
    assert 1 - total_variation == pytest.approx(share, abs=0.01)


BOTH_DRAWS = pytest.mark.parametrize("draw", [draw_timesteps, draw_stratified])


@BOTH_DRAWS
def test_draws_depend_only_on_the_generator(draw):
    p = timesteps.p2(LINEAR, 0.5, 1.0)
    torch.manual_seed(1)
    one = draw(p, 64, seeded(3))
    torch.manual_seed(2)
    torch.testing.assert_close(draw(p, 64, seeded(3)), one, rtol=0, atol=0)
    assert not torch.equal(draw(p, 64, seeded(4)), one)


@BOTH_DRAWS
@pytest.mark.parametrize("total", [2, 49, 4000])
@pytest.mark.parametrize("count", [1, 50_000])
def test_draws_are_indices_of_the_timesteps(draw, total, count):
    drawn = draw(timesteps.p2(NoiseSchedule(linear_betas(total)), 1.0, 1.0), count, seeded())
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    assert ((drawn >= 0) & (drawn < total)).all()


def random_batches(total: int, largest: int, batches: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(timesteps, float32 losses) of batches of 1 to `largest` images; low timesteps are more frequent."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, largest + 1, batches)
    return [
        (
            torch.from_numpy((total * random.random(size) ** 1.5).astype(np.int64)),
            torch.from_numpy(random.exponential(size=size).astype(np.float32)),
        )
        for size in sizes
    ]


def by_deques(batches, total, history, uniform) -> np.ndarray:
    """The density after the batches, computed by its definition."""
    kept = [deque(maxlen=history) for _ in range(total)]
    for t, losses in batches:
        for one, loss in zip(t.tolist(), losses.tolist(), strict=True):
            kept[one].append(loss)
    if any(len(losses) < history for losses in kept):
        return np.full(total, 1 / total)
    rms = np.array([np.sqrt(np.mean(np.square(losses))) for losses in kept])
    return (1 - uniform) * rms / rms.sum() + uniform / total


def learned(batches, total, history=10, uniform=0.001) -> torch.Tensor:
    state = LossHistory(total, history, uniform)
    for t, losses in batches:
        state.add(t, losses)
    return state.probabilities()


# Batches with more losses of a timestep than the history keeps, larger and smaller than the number of timesteps.
@pytest.mark.parametrize(
    ("total", "largest", "batches", "history", "uniform"),
    [(7, 60, 12, 10, 0.001), (7, 3, 160, 10, 0.001), (30, 8, 200, 3, 0.1), (9, 6, 30, 1, 0.0), (4, 30, 9, 10, 1.0)],
)
def test_loss_history_keeps_the_same_losses_as_deques(total, largest, batches, history, uniform):
    fed, state, cold = random_batches(total, largest, batches), LossHistory(total, history, uniform), []
    for count, (t, losses) in enumerate(fed, 1):
        state.add(t, losses)
        p, expected = state.probabilities(), by_deques(fed[:count], total, history, uniform)
        assert p.dtype == torch.float64 and p.sum().item() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(p, expected, rtol=1e-12)
        seen = torch.cat([t for t, _ in fed[:count]])
        assert state.counts.tolist() == np.bincount(seen, minlength=total).tolist()
        cold.append(min(state.counts) < history)
    # Both the uniform and the learned density occurred.
    assert cold[0] and not cold[-1]


def test_loss_history_stays_uniform_until_the_last_timestep_is_full():
    t = torch.arange(3).repeat(10)
    losses = torch.arange(30.0) + 1
    torch.testing.assert_close(learned([(t[:-1], losses[:-1])], 3), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert learned([(t, losses)], 3).diff().min() > 0


def test_loss_history_keeps_the_last_losses_of_a_batch():
    # The last ten losses of timestep 0 replace the first ten.
    t = torch.tensor([0] * 20 + [1] * 10)
    losses = torch.tensor([9.0] * 10 + [1.0] * 10 + [1.0] * 10)
    np.testing.assert_allclose(learned([(t, losses)], 2), [0.5, 0.5], rtol=1e-12)
    np.testing.assert_allclose(learned([(t.flip(0), losses.flip(0))], 2), [0.8996, 0.1004], rtol=1e-12)


def test_loss_history_keeps_the_proportions_of_tiny_losses():
    # Their squares underflow in float32.
    fed = random_batches(5, 60, 10)
    tiny = [(t, losses * 1e-30) for t, losses in fed]
    torch.testing.assert_close(learned(tiny, 5), learned(fed, 5), rtol=1e-6, atol=0)


def test_loss_history_mixes_in_a_thousandth_of_the_uniform_density():
    # All losses of timestep 0 are zero.
    t, losses = torch.arange(4).repeat(10), torch.tensor([0.0, 1.0, 1.0, 2.0]).repeat(10)
    np.testing.assert_allclose(learned([(t, losses)], 4), 0.999 * np.array([0, 1, 1, 2]) / 4 + 0.001 / 4, rtol=1e-12)
