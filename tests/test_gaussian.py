"""The diffusion process compared with closed forms and with Bayes' rule on a grid."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion.gaussian import NoiseSchedule, cosine_betas, gather, linear_betas, p_mean_variance, respaced

SHORT = NoiseSchedule(linear_betas(20))


def as_images(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def posterior_by_bayes(schedule: NoiseSchedule, x_start: float, x_t: float, t: int) -> tuple[float, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) of one pixel, proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    betas = schedule.betas.numpy()
    kept_before = np.prod(1 - betas[:t])
    x = np.linspace(-12, 12, 100_001)
    density = stats.norm.pdf(x_t, math.sqrt(1 - betas[t]) * x, math.sqrt(betas[t]))
    density *= stats.norm.pdf(x, math.sqrt(kept_before) * x_start, math.sqrt(1 - kept_before))
    density /= density.sum()
    mean = (density * x).sum()
    return mean, (density * (x - mean) ** 2).sum()


@pytest.mark.parametrize("t", [1, 2, 7, 19])
@pytest.mark.parametrize(("x_start", "x_t"), [(0.3, -0.8), (-1.0, 2.5)])
def test_posterior_follows_bayes_rule(t, x_start, x_t):
    mean, variance = posterior_by_bayes(SHORT, x_start, x_t, t)
    actual = SHORT.q_posterior_mean(as_images([x_start]), as_images([x_t]), torch.tensor([t]))
    np.testing.assert_allclose(actual.item(), mean, rtol=1e-7)
    np.testing.assert_allclose(SHORT.posterior_variance[t].item(), variance, rtol=1e-7)


def test_posterior_mean_at_timestep_0_is_the_image():
    x_start = as_images([0.3])
    torch.testing.assert_close(SHORT.q_posterior_mean(x_start, as_images([9.0]), torch.tensor([0])), x_start)
    assert SHORT.posterior_variance[0] == 0


def test_posterior_log_variance_is_finite_and_clipped_at_zero_only():
    clipped, exact = SHORT.posterior_log_variance_clipped, SHORT.posterior_variance.log()
    assert clipped.isfinite().all()
    torch.testing.assert_close(clipped[1:], exact[1:])
    torch.testing.assert_close(clipped[0], exact[1])


@pytest.mark.parametrize("timesteps", [100, 250, 1000, 4000])
def test_linear_betas_scale_with_the_number_of_timesteps(timesteps):
    betas = linear_betas(timesteps)
    assert betas.dtype == torch.float64 and len(betas) == timesteps
    np.testing.assert_allclose(betas, np.linspace(1e-4, 0.02, timesteps) * 1000 / timesteps, rtol=1e-12)
    # The sum does not depend on T: it is 1000 times the mean of 1e-4 and 0.02.
    np.testing.assert_allclose(betas.sum().item(), 10.05, rtol=1e-12)


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_cosine_schedule_has_its_closed_form(timesteps):
    betas = cosine_betas(timesteps)
    schedule = NoiseSchedule(betas)
    f = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    # Only the last beta, which would be 1, is clipped.
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert betas[-1] == 0.999 and (betas[:-1] < 0.999).all()


@pytest.mark.parametrize("betas", [linear_betas, cosine_betas])
@pytest.mark.parametrize("timesteps", [2, 5, 50, 1000])
def test_noise_increases_from_almost_zero(betas, timesteps):
    schedule = NoiseSchedule(betas(timesteps))
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert (schedule.snr.diff() < 0).all()
    assert 0 < schedule.alphas_cumprod[-1] < 0.01
    torch.testing.assert_close(schedule.snr, 1 / (1 / schedule.alphas_cumprod - 1))


@pytest.mark.parametrize("betas", [[0.1, 1.0], [0.0, 0.1], [[0.1, 0.2]], [0.1, math.nan]])
def test_invalid_betas_are_errors(betas):
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoiseSchedule(torch.tensor(betas, dtype=torch.float64))


def test_q_sample_equals_a_chain_of_single_steps():
    # Each step multiplies the image by sqrt(1 - beta) and adds independent noise of variance beta.
    kept, variance = 1.0, 0.0
    for t, beta in enumerate(SHORT.betas.tolist()):
        kept, variance = kept * math.sqrt(1 - beta), variance * (1 - beta) + beta
        signal = SHORT.q_sample(as_images([1.0]), torch.tensor([t]), as_images([0.0]))
        noise = SHORT.q_sample(as_images([0.0]), torch.tensor([t]), as_images([1.0]))
        np.testing.assert_allclose(signal.item(), kept, rtol=1e-12)
        np.testing.assert_allclose(noise.item() ** 2, variance, rtol=1e-12)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(1000)])
def test_predict_x_start_inverts_q_sample(betas):
    schedule = NoiseSchedule(betas)
    random = torch.Generator().manual_seed(0)
    t = torch.arange(0, 990, 30)
    x_start = torch.rand(len(t), 3, 4, 4, dtype=torch.float64, generator=random) * 2 - 1
    noise = torch.randn(x_start.shape, dtype=torch.float64, generator=random)
    x_t = schedule.q_sample(x_start, t, noise)
    torch.testing.assert_close(schedule.predict_x_start(noise, x_t, t), x_start, rtol=0, atol=1e-9)


def test_images_of_a_batch_have_their_own_timesteps():
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 5, 19])
    together = SHORT.q_sample(x, t, x)
    alone = torch.cat([SHORT.q_sample(x[i : i + 1], t[i : i + 1], x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_tables_take_the_dtype_of_the_images():
    values = gather(SHORT.betas, torch.tensor([0, 3]), torch.zeros(2, 3, 4, 4))
    assert values.shape == (2, 1, 1, 1) and values.dtype == torch.float32
    torch.testing.assert_close(values.flatten(), SHORT.betas[[0, 3]].float(), rtol=0, atol=0)


def test_learned_variance_ranges_from_the_posterior_variance_to_beta():
    t = torch.tensor([0, 4, 19])
    x_t = torch.zeros(3, 1, 2, 2, dtype=torch.float64)

    def log_variance(v: float) -> torch.Tensor:
        output = torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, v)], dim=1)
        return p_mean_variance(SHORT, output, x_t, t).log_variance[:, 0, 0, 0]

    lower, upper = SHORT.posterior_log_variance_clipped[t], SHORT.betas.log()[t]
    torch.testing.assert_close(log_variance(-1), lower)
    torch.testing.assert_close(log_variance(1), upper)
    torch.testing.assert_close(log_variance(0), (lower + upper) / 2)


def test_fixed_variance_is_the_posterior_variance():
    x_t = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    p = p_mean_variance(SHORT, torch.zeros_like(x_t), x_t, torch.tensor([0, 9]))
    assert p.log_variance.shape == x_t.shape
    torch.testing.assert_close(p.log_variance[:, 2, 3, 3], SHORT.posterior_log_variance_clipped[[0, 9]])


def test_mean_is_the_posterior_mean_of_the_clipped_prediction():
    x_t, epsilon, t = as_images([2.0, 0.1]), as_images([-1.5, 0.2]), torch.tensor([10, 3])
    free = p_mean_variance(SHORT, epsilon, x_t, t, clip=False)
    clipped = p_mean_variance(SHORT, epsilon, x_t, t)
    assert free.pred_x_start[0] > 1 and free.pred_x_start[1].abs() < 1
    torch.testing.assert_close(clipped.pred_x_start, free.pred_x_start.clamp(-1, 1), rtol=0, atol=0)
    mean = [
        posterior_by_bayes(SHORT, start, now, step)[0]
        for start, now, step in zip(clipped.pred_x_start.flatten().tolist(), [2.0, 0.1], [10, 3], strict=True)
    ]
    np.testing.assert_allclose(clipped.mean.flatten(), mean, rtol=1e-7)


def test_respaced_timesteps_must_increase():
    with pytest.raises(ValueError, match="strictly increasing"):
        respaced(NoiseSchedule(linear_betas(10)), torch.tensor([0, 0, 1]))


def test_predict_epsilon_inverts_predict_x_start():
    schedule, t = NoiseSchedule(cosine_betas(50)), torch.tensor([0, 20, 49])
    x_t, epsilon = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_start = schedule.predict_x_start(epsilon, x_t, t)
    torch.testing.assert_close(schedule.predict_epsilon(x_start, x_t, t), epsilon)


def test_respaced_with_all_timesteps_is_the_identity():
    schedule = NoiseSchedule(linear_betas(1000))
    same = respaced(schedule, torch.arange(1000))
    torch.testing.assert_close(same.betas, schedule.betas, rtol=1e-10, atol=0)
    torch.testing.assert_close(same.posterior_variance, schedule.posterior_variance, rtol=1e-9, atol=0)


def test_respaced_keeps_the_noise_level_of_the_timesteps_it_keeps():
    schedule = NoiseSchedule(cosine_betas(100))
    kept = torch.tensor([0, 3, 50, 98])
    torch.testing.assert_close(respaced(schedule, kept).alphas_cumprod, schedule.alphas_cumprod[kept])
