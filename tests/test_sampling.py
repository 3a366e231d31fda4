"""Samplers with the optimal model of Gaussian data, N(0, s^2) in every pixel.

Then E[x_0 | x_t] = s^2 sqrt(a) x_t / (s^2 a + 1 - a), and p(x_{t-1} | x_t) is Gaussian, its variance in
closed form. s is small, so that clipping x_0 to [-1, 1] touches nothing.
"""

import math

import pytest
import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, linear_betas, respaced
from diffusion.sampling import ddim_sample, ddim_timesteps, ddpm_sample, ddpm_timesteps, latents
from diffusion.streams import generator

S = 0.2


class GaussianModel:
    """The optimal epsilon for data N(0, S^2), and the v that gives the true variance of the respaced process."""

    def __init__(self, schedule: NoiseSchedule, used: Tensor):
        self.a = schedule.alphas_cumprod
        # Law of total variance: Var(x_{t-1} | x_t) = posterior variance + (d mean / d x_0)^2 Var(x_0 | x_t).
        coarse = respaced(schedule, used.sort().values)
        a = coarse.alphas_cumprod
        x_start_variance = S**2 * (1 - a) / (S**2 * a + 1 - a)
        log_variance = (coarse.posterior_variance + coarse.posterior_mean_x_start**2 * x_start_variance).log()
        lower, upper = coarse.posterior_log_variance_clipped, coarse.betas.log()
        self.v = torch.zeros_like(self.a)
        self.v[used.sort().values[1:]] = (2 * (log_variance - lower) / (upper - lower) - 1)[1:]
        self.seen = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),) and len(t.unique()) == 1
        self.seen.append(t[0].item())
        a, v = self.a[t].view(-1, 1, 1, 1), self.v[t].view(-1, 1, 1, 1)
        epsilon = (1 - a).sqrt() * x / (S**2 * a + 1 - a)
        return torch.cat([epsilon, v.expand_as(x)], dim=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("timesteps", "steps", "stride"), [(1000, 25, 40), (1000, 1000, 1), (100, 10, 10), (10, 1, 10)]
)
def test_ddim_timesteps_are_multiples_of_the_stride(timesteps, steps, stride):
    assert ddim_timesteps(timesteps, steps).tolist() == list(reversed(range(0, timesteps, stride)))


def test_the_number_of_ddim_steps_need_not_divide_that_of_timesteps():
    assert ddim_timesteps(1000, 3).tolist() == [668, 334, 0]


@pytest.mark.parametrize("steps", [0, 333, 600, 1001])
def test_ddim_timesteps_without_an_integer_stride_are_errors(steps):
    with pytest.raises(ValueError, match=f"gives {steps} steps"):
        ddim_timesteps(1000, steps)


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 2), (1000, 250), (1000, 999), (50, 50)])
def test_ddpm_timesteps_are_evenly_spaced(timesteps, steps):
    used = ddpm_timesteps(timesteps, steps)
    assert len(used) == steps and used[0] == timesteps - 1 and used[-1] == 0
    gaps = -used.diff()
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [1, 1001])
def test_too_few_or_too_many_ddpm_timesteps_are_errors(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, but must be between 2 and 1000"):
        ddpm_timesteps(1000, steps)


def test_ddim_of_gaussian_data_equals_the_product_of_its_steps():
    schedule, steps = NoiseSchedule(linear_betas(1000)), 25
    model = GaussianModel(schedule, ddim_timesteps(1000, steps))
    x = normal(2, 3, 8, 8)
    a = schedule.alphas_cumprod[::40].tolist()
    gain = 1.0
    for now, before in zip(reversed(a), [*reversed(a[:-1]), 1.0], strict=True):
        # Song et al. 2021, eq. 12, eta = 0: x -> sqrt(a') x_0 + sqrt(1 - a') epsilon; both are linear in x here.
        total = S**2 * now + 1 - now
        gain *= math.sqrt(before) * S**2 * math.sqrt(now) / total + math.sqrt(1 - before) * math.sqrt(1 - now) / total
    torch.testing.assert_close(ddim_sample(model, schedule, x, steps), gain * x, rtol=1e-9, atol=0)
    assert model.seen == list(range(960, -1, -40))


def test_ddim_approaches_the_std_of_gaussian_data_with_more_steps():
    schedule = NoiseSchedule(linear_betas(1000))
    x = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (10, 25, 100, 1000):
        gain = ddim_sample(GaussianModel(schedule, ddim_timesteps(1000, steps)), schedule, x, steps)[0, 0, 0, 0].item()
        errors.append(abs(gain / S - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.03 and errors[-1] < 0.01


@pytest.mark.parametrize(("timesteps", "steps"), [(100, 100), (1000, 40)])
def test_ddpm_samples_have_the_std_of_gaussian_data(timesteps, steps):
    schedule = NoiseSchedule(linear_betas(timesteps))
    model = GaussianModel(schedule, ddpm_timesteps(timesteps, steps))
    shape = (16, 3, 32, 32)
    samples = ddpm_sample(model, schedule, normal(*shape), steps, lambda step: normal(*shape, seed=step + 1))
    # With the true reverse variance, every x_t has its exact marginal; the last step returns the mean at a_0.
    a = schedule.alphas_cumprod[0].item()
    expected = S * math.sqrt(S**2 * a / (S**2 * a + 1 - a))
    # Four standard errors of the standard deviation of 49,152 numbers.
    assert samples.std().item() == pytest.approx(expected, rel=0.013)
    assert samples.mean().item() == pytest.approx(0, abs=0.004)
    assert model.seen == ddpm_timesteps(timesteps, steps).tolist()


def test_ddpm_adds_noise_in_all_steps_except_the_last():
    schedule = NoiseSchedule(linear_betas(10))
    steps = []

    def noise(step: int) -> Tensor:
        steps.append(step)
        return torch.zeros(1, 3, 2, 2, dtype=torch.float64)

    ddpm_sample(GaussianModel(schedule, torch.arange(10)), schedule, normal(1, 3, 2, 2), 10, noise)
    assert steps == list(range(9))


def test_samplers_accept_a_model_of_fixed_variance():
    schedule = NoiseSchedule(linear_betas(100))
    full, x = GaussianModel(schedule, torch.arange(100)), normal(1, 3, 4, 4)

    def epsilon_only(x: Tensor, t: Tensor) -> Tensor:
        return full(x, t)[:, :3]

    torch.testing.assert_close(ddim_sample(epsilon_only, schedule, x, 10), ddim_sample(full, schedule, x, 10))
    # The posterior variance is too small: it lacks the variance of x_0 given x_t.
    samples = ddpm_sample(epsilon_only, schedule, normal(4, 3, 32, 32), 20, lambda i: normal(4, 3, 32, 32, seed=i + 1))
    assert 0.3 * S < samples.std().item() < 0.95 * S


def wild_model(x: Tensor, t: Tensor) -> Tensor:
    """Predictions far outside the range of images, which depend on x and t of each image."""
    return torch.cat([3 * torch.sin(5 * x + t.view(-1, 1, 1, 1)), x], dim=1)


def test_ddim_in_one_step_is_the_prediction_from_the_first_timestep():
    schedule = NoiseSchedule(linear_betas(1000))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    epsilon = 0.5 * x
    expected = schedule.predict_x_start(epsilon, x, torch.zeros(2, dtype=torch.int64)).clamp(-1, 1)
    torch.testing.assert_close(ddim_sample(lambda *_: epsilon, schedule, x, 1), expected)


def test_ddim_is_deterministic_and_images_are_independent():
    schedule = NoiseSchedule(linear_betas(1000))
    x = normal(5, 3, 4, 4).float()
    together = ddim_sample(wild_model, schedule, x, 25)
    torch.manual_seed(1)
    torch.testing.assert_close(ddim_sample(wild_model, schedule, x, 25), together, rtol=0, atol=0)
    parts = torch.cat([ddim_sample(wild_model, schedule, part, 25) for part in x.split([1, 3, 1])])
    torch.testing.assert_close(parts, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(ddim_sample(wild_model, schedule, x.flip(0), 25).flip(0), together, rtol=0, atol=1e-5)


def test_ddim_samples_are_in_range_for_any_model():
    schedule = NoiseSchedule(linear_betas(1000))
    samples = ddim_sample(wild_model, schedule, normal(4, 3, 8, 8), 25)
    assert samples.abs().max() <= 1
    assert samples.abs().max() > 0.99


def test_samplers_do_not_change_the_latents():
    schedule, x = NoiseSchedule(linear_betas(100)), normal(2, 3, 4, 4)
    before = x.clone()
    ddim_sample(wild_model, schedule, x, 10)
    ddpm_sample(wild_model, schedule, x, 10, lambda step: normal(2, 3, 4, 4, seed=step))
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_latents_depend_only_on_seeds_and_index():
    shape = (3, 4, 4)
    whole = latents(7, 2, range(10), shape)
    assert whole.shape == (10, *shape) and whole.dtype == torch.float32
    parts = torch.cat([latents(7, 2, range(3), shape), latents(7, 2, range(3, 10), shape)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    torch.testing.assert_close(latents(7, 2, range(9, -1, -1), shape).flip(0), whole, rtol=0, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(latents(7, 2, range(10), shape), whole, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 1), (1, 3, 5)])
def test_latents_are_the_first_normal_numbers_of_their_streams(shape):
    fresh = [torch.randn(shape, generator=generator(7, "other/2", index)) for index in (4, 5, 6)]
    assert torch.equal(latents(7, 2, range(4, 7), shape, "other"), torch.stack(fresh))


def test_latents_differ_between_samples_seeds_runs_and_streams():
    shape = (3, 8, 8)
    sets = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 11), (0, 0, "other")]
    several = torch.cat([latents(seed, run, range(3), shape, *stream) for seed, run, *stream in sets])
    assert len({image.numpy().tobytes() for image in several}) == 3 * len(sets)


def test_latents_are_standard_normal():
    x = latents(0, 0, range(200), (3, 16, 16))
    assert x.mean().item() == pytest.approx(0, abs=0.011)
    assert x.std().item() == pytest.approx(1, abs=0.008)
    # Latents of neighbouring indices are uncorrelated.
    assert torch.corrcoef(x[:50].flatten(1)).triu(1).abs().max() < 0.2


def test_streams_are_equal_only_for_equal_arguments():
    def first(*key: int | str) -> float:
        return torch.rand(1, dtype=torch.float64, generator=generator(*key)).item()

    assert first(0, "noise", 5) == first(0, "noise", 5)
    keys = [
        (0, "noise", 5),
        (1, "noise", 5),
        (0, "flip", 5),
        (0, "noise", 6),
        (0, "noise"),
        (5, "noise", 0),
        # These two are equal if written without a separator.
        (11, "n", 0),
        (1, "1n", 0),
    ]
    assert len({first(*key) for key in keys}) == len(keys)
