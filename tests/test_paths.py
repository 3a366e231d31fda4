"""Paths, predictions and spaces of the loss: closed forms, round trips, and the optimal net of Gaussian data.

For data N(0, s^2) the marginal of x_t is Gaussian with the variance m^2 = alpha^2 s^2 + sigma^2. The optimal output is
linear, E[y | x_t] = (a alpha s^2 + b sigma) / m^2 x_t, and the exact solution of the flow is proportional to m.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion.build import noise_schedule, run_tables
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train
from diffusion.errors import InputError
from diffusion.evaluation.probe import probe
from diffusion.gaussian import NoiseSchedule, linear_betas, respaced
from diffusion.losses import hybrid_loss
from diffusion.paths import NoisePath
from diffusion.sampling import ddim_sample, ddim_timesteps, ddpm_sample, ode_sample, trailing_timesteps, trajectory
from diffusion.training.state import TrainState, train_step

S = 0.5
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "flow": "flow",
    "flow shift 3": {"flow": {"shift": 3}},
    "karras": "karras",
}
PREDICTIONS = ["epsilon", "x_start", "v", "velocity", {"edm": {"data_std": S}}]
SPACES = ["prediction", "epsilon", "x_start", "velocity"]
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
EVERY_PREDICTION = pytest.mark.parametrize("predict", PREDICTIONS, ids=str)


def path_of(schedule="linear", predict="epsilon", loss_in="prediction", timesteps=50) -> NoisePath:
    return noise_schedule(Diffusion(schedule=schedule, predict=predict, loss_in=loss_in, timesteps=timesteps))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_of(scheme, diffusion, match=None, match_diffusion=None) -> RunConfig:
    return RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=8),
        model=Model(channels=32, channel_mult=(1,), res_blocks=1, attention_resolutions=(), head_channels=32),
        diffusion=Diffusion(timesteps=50, **diffusion),
        train=Train(batch_size=8, learning_rate=1e-3),
        scheme=Scheme(**scheme),
        match=match,
        match_diffusion=match_diffusion,
        train_version=1,
    )


class Optimal:
    """The optimal output for data N(0, S^2)."""

    def __init__(self, path: NoisePath):
        self.std = (path.alpha.square() * S**2 + path.sigma.square()).sqrt()
        self.gain = (path.a * path.alpha * S**2 + path.b * path.sigma) / self.std.square()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain[t].to(x.dtype).view(-1, 1, 1, 1) * x


# Tables


def test_flow_is_straight_and_its_shift_is_that_of_the_odds():
    path = path_of("flow", timesteps=4)
    torch.testing.assert_close(path.sigma, torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64))
    shifted = path_of({"flow": {"shift": 3}}, timesteps=4)
    for each in (path, shifted):
        torch.testing.assert_close(each.alpha + each.sigma, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(shifted.sigma / shifted.alpha, 3 * path.sigma / path.alpha)


@pytest.mark.parametrize("rho", [1, 7])
def test_karras_levels_are_evenly_spaced_roots(rho):
    path = path_of({"karras": {"min": 0.01, "max": 20, "rho": rho}}, timesteps=11)
    np.testing.assert_allclose(path.sigma ** (1 / rho), np.linspace(0.01 ** (1 / rho), 20 ** (1 / rho), 11), rtol=1e-12)
    assert (path.alpha == 1).all()


def test_predictions_of_variance_preserving_paths_have_their_published_form():
    x_start, noise, t = normal(50, 3, 2, 2), normal(50, 3, 2, 2, seed=1), torch.arange(50)
    kept = NoiseSchedule(linear_betas(50)).alphas_cumprod.view(-1, 1, 1, 1)
    published = {
        "epsilon": noise,
        "x_start": x_start,
        "v": kept.sqrt() * noise - (1 - kept).sqrt() * x_start,
        "velocity": noise - x_start,
    }
    for predict, target in published.items():
        torch.testing.assert_close(path_of(predict=predict).target(x_start, t, noise), target)


@EVERY_SCHEDULE
def test_edm_has_the_published_preconditioning(schedule):
    plain, path = path_of(schedule), path_of(schedule, {"edm": {"data_std": S}})
    # Karras et al. 2022, table 1, for the noise level of x_t / alpha.
    level = (plain.sigma / plain.alpha).view(-1, 1, 1, 1)
    c_skip, c_out = S**2 / (level**2 + S**2), level * S / (level**2 + S**2).sqrt()
    c_in = 1 / (level**2 + S**2).sqrt()
    x_start, noise, t = normal(50, 3, 2, 2), normal(50, 3, 2, 2, seed=1), torch.arange(50)
    noisy = x_start + level * noise
    torch.testing.assert_close(path.q_sample(x_start, t, noise), c_in * noisy)
    torch.testing.assert_close(path.target(x_start, t, noise), (x_start - c_skip * noisy) / c_out)
    # The target and the input have the variance 1, and are uncorrelated.
    one = torch.ones(50, dtype=torch.float64)
    torch.testing.assert_close(path.a**2 * S**2 + path.b**2, one)
    torch.testing.assert_close(path.alpha**2 * S**2 + path.sigma**2, one)
    torch.testing.assert_close(path.a * path.alpha * S**2 + path.b * path.sigma, 0 * one)


@EVERY_SCHEDULE
@EVERY_PREDICTION
@pytest.mark.parametrize("loss_in", SPACES)
def test_images_and_noise_follow_from_the_prediction_and_errors_scale_by_the_factors(schedule, predict, loss_in):
    path, t = path_of(schedule, predict, loss_in), torch.arange(50)
    x_start, noise, wrong = normal(50, 3, 2, 2), normal(50, 3, 2, 2, seed=1), normal(50, 3, 2, 2, seed=2)
    x_t, target = path.q_sample(x_start, t, noise), path.target(x_start, t, noise)
    exact = path.predict_x_start(target, x_t, t)
    torch.testing.assert_close(exact, x_start, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(path.predict_epsilon(x_start, x_t, t), noise, rtol=1e-7, atol=1e-7)

    x_error = path.predict_x_start(wrong, x_t, t) - x_start
    epsilon_error = path.predict_epsilon(x_start + x_error, x_t, t) - noise
    errors = {
        "prediction": wrong - target, "epsilon": epsilon_error, "x_start": x_error, "velocity": epsilon_error - x_error
    }  # fmt: skip
    mse = hybrid_loss(path, wrong, x_start, x_t, t, noise).mse
    for space, factor in (("epsilon", path.epsilon_factor), (loss_in, path.loss_factor)):
        torch.testing.assert_close(factor * mse, errors[space].square().mean((1, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("alpha", "sigma", "predict"),
    [
        ([1.0, 0.0], [0.1, 1.0], lambda alpha, sigma: (0 * alpha, 0 * alpha + 1)),
        ([0.9, 0.5], [0.1, 0.5], lambda alpha, sigma: (alpha, sigma)),
        ([0.9, math.inf], [0.1, 0.5], lambda alpha, sigma: (0 * alpha, 0 * alpha + 1)),
    ],
    ids=["only noise", "x_t itself is predicted", "infinite"],
)
def test_tables_that_do_not_determine_the_image_are_errors(alpha, sigma, predict):
    tables = [torch.tensor(values, dtype=torch.float64) for values in (alpha, sigma)]
    with pytest.raises(InputError, match=r"x_0 cannot be computed .* at t = \d, .*: use less extreme parameters$"):
        NoisePath(*tables, predict)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [50, 250, 1000])
def test_epsilon_on_a_noise_schedule_computes_the_same_bits_as_the_formulas_of_ddpm(schedule, timesteps):
    path = path_of(schedule, timesteps=timesteps)
    kept, t = path.alphas_cumprod, torch.arange(timesteps)
    x, noise = normal(timesteps, 3, 2, 2).float(), normal(timesteps, 3, 2, 2, seed=1).float()

    def over(table: Tensor) -> Tensor:
        return table.float().view(-1, 1, 1, 1)

    x_start = over((1 / kept).sqrt()) * x - over((1 / kept - 1).sqrt()) * noise
    assert torch.equal(path.predict_x_start(noise, x, t), x_start)
    again = (over((1 / kept).sqrt()) * x - x_start) / over((1 / kept - 1).sqrt())
    assert torch.equal(path.predict_epsilon(x_start, x, t), again)
    assert torch.equal(path.q_sample(x, t, noise), over(kept.sqrt()) * x + over((1 - kept).sqrt()) * noise)
    assert torch.equal(path.target(x, t, noise), noise)
    assert (path.epsilon_factor == 1).all() and (path.loss_factor == 1).all()


# Weights


@pytest.mark.parametrize("loss_in", SPACES)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_v_is_the_weight_of_its_paper_in_any_space(gamma, loss_in):
    run = run_of({"mse_weight": {"min_snr": {"gamma": gamma}}}, {"predict": "v", "loss_in": loss_in})
    snr = noise_schedule(run.diffusion).snr
    torch.testing.assert_close(run_tables(run).mse_weight, snr.clamp(max=gamma) / (snr + 1))


@EVERY_SCHEDULE
@EVERY_PREDICTION
@pytest.mark.parametrize("loss_in", SPACES)
@pytest.mark.parametrize("weight", ["unweighted", "p2", "min_snr", "debiased", {"speed": {"tau": 40}}], ids=str)
def test_weights_of_papers_keep_their_objective_and_others_belong_to_the_space_of_the_loss(
    schedule, predict, loss_in, weight
):
    run = run_of({"mse_weight": weight}, {"schedule": schedule, "predict": predict, "loss_in": loss_in})
    path, tables, of_epsilon = noise_schedule(run.diffusion), run_tables(run), run_tables(run, of_epsilon=True)
    snr = path.snr
    published = {
        "p2": (1 + snr) ** -0.5, "min_snr": snr.clamp(max=5) / snr, "debiased": snr.rsqrt(),
        "unweighted": path.loss_factor / path.epsilon_factor,
    }  # fmt: skip
    torch.testing.assert_close(tables.mse_weight, of_epsilon.mse_weight * path.epsilon_factor)
    if isinstance(weight, str):
        torch.testing.assert_close(of_epsilon.mse_weight, published[weight])
    else:  # SpeeD's weight is 1 from tau on
        torch.testing.assert_close(tables.mse_weight[40:], path.loss_factor[40:])


def test_matched_arms_have_equal_expected_weights_of_epsilon_whatever_their_nets_predict():
    target, other = {"predict": "v", "loss_in": "velocity"}, {"predict": "x_start"}
    scheme = Scheme(mse_weight="unweighted", timesteps="p2")
    matched = run_of({"timesteps": {"logit_normal": {"std": 2}}}, other, scheme, Diffusion(timesteps=50, **target))
    expected, found = (run_tables(run, of_epsilon=True) for run in (run_of(dict(scheme), target), matched))
    torch.testing.assert_close(
        found.probabilities * found.mse_weight, expected.probabilities * expected.mse_weight, rtol=1e-9, atol=0
    )
    factor = noise_schedule(matched.diffusion).epsilon_factor
    torch.testing.assert_close(run_tables(matched).mse_weight, found.mse_weight * factor)


# Gaussian data


@EVERY_SCHEDULE
@EVERY_PREDICTION
@pytest.mark.parametrize("loss_in", SPACES)
def test_the_optimal_net_of_gaussian_data_has_no_expected_gradient(schedule, predict, loss_in):
    path, t = path_of(schedule, predict, loss_in), torch.arange(50).repeat_interleave(4)
    # The four signs have the first two moments of the two normal distributions, on which the expectation depends.
    x_start, noise = torch.tensor([*product((-S, S), (-1, 1))] * 50, dtype=torch.float64).T.reshape(2, -1, 1, 1, 1)
    x_t, scale = path.q_sample(x_start, t, noise), torch.ones(50, dtype=torch.float64, requires_grad=True)
    output = scale.repeat_interleave(4).view(-1, 1, 1, 1) * Optimal(path)(x_t, t)
    gain = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    output = output + gain.repeat_interleave(4).view(-1, 1, 1, 1) * x_t
    loss = hybrid_loss(path, output, x_start, x_t, t, noise, path.loss_factor[t]).loss.sum()
    (at_optimum,) = torch.autograd.grad(loss, gain)
    curvature = path.loss_factor * 8 * Optimal(path).std.square()
    torch.testing.assert_close(at_optimum / curvature, torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-9)


@EVERY_SCHEDULE
@EVERY_PREDICTION
@pytest.mark.parametrize("method", ["ddim", "heun", "dpm"])
def test_samples_of_the_optimal_net_have_the_variance_of_the_data(schedule, predict, method):
    path = path_of(schedule, predict, timesteps=1000)
    # Small numbers: clipping x_0 to [-1, 1] changes nothing.
    sample = ode_sample(Optimal(path), path, 0.01 * normal(1, 3, 2, 2), 100, method)
    torch.testing.assert_close(sample, 0.01 * S * normal(1, 3, 2, 2), rtol=0.05, atol=0)


ORDERS = {"ddim": 1, "heun": 2, "dpm": 2}


# If x_t has the variance 1 at all t, as with the true standard deviation of the data, Heun's method has order 3.
@EVERY_SCHEDULE
@pytest.mark.parametrize("predict", ["v", {"edm": {"data_std": 2 * S}}], ids=str)
@pytest.mark.parametrize(("method", "order"), ORDERS.items(), ids=ORDERS)
def test_solvers_have_their_order(schedule, predict, method, order):
    path = path_of(schedule, predict, timesteps=2001)
    model, start, end = Optimal(path), 1800, 200
    x = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    exact = model.std[end] / model.std[start]

    def error(steps: int) -> float:
        used = range(start, end - 1, -(start - end) // steps)
        *_, last, _ = trajectory(model, path, x, used, method, clip=False)
        return abs(last[0, 0, 0, 0].item() / exact.item() - 1)

    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.3)


# Samplers


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 25), (1000, 7), (50, 50), (10, 1)])
def test_trailing_timesteps_start_at_the_end_and_are_evenly_spaced(timesteps, steps):
    used = trailing_timesteps(timesteps, steps)
    gaps = -used.diff()
    assert len(used) == steps and used[0] == timesteps - 1 and used[-1] >= 0
    assert steps == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [0, 11])
def test_trailing_timesteps_are_between_1_and_all(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, but must be between 1 and 10"):
        trailing_timesteps(10, steps)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_computes_the_same_bits_as_the_published_formula(schedule):
    path, x = path_of(schedule, timesteps=1000), normal(2, 3, 4, 4).float()
    used = ddim_timesteps(1000, 25)
    coarse = respaced(path, used.flip(0))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 3 * torch.sin(5 * x + t.view(-1, 1, 1, 1))

    expected = x
    for index, timestep in zip(reversed(range(25)), used.tolist(), strict=True):
        kept, before = coarse.alphas_cumprod[index], coarse.alphas_cumprod_prev[index].float()
        total, ratio = (1 / kept).sqrt().float(), (1 / kept - 1).sqrt().float()
        x_start = (total * expected - ratio * model(expected, torch.full((2,), timestep))).clamp(-1, 1)
        expected = before.sqrt() * x_start + (1 - before).sqrt() * ((total * expected - x_start) / ratio)
    assert torch.equal(ddim_sample(model, path, x, 25), expected)


def as_v(path: NoiseSchedule):
    """A net that predicts noise, and the net that predicts the same as v."""

    def epsilon_model(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * torch.sin(x) + 0.2 * x

    def v_model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (table[t].view(-1, 1, 1, 1).to(x) for table in (path.alpha, path.sigma))
        return (epsilon_model(x, t) - sigma * x) / alpha

    return epsilon_model, v_model


@pytest.mark.parametrize("method", ["ddim", "ddpm", "heun", "dpm"])
def test_samples_do_not_depend_on_what_equivalent_nets_predict(method):
    epsilon_path, v_path = path_of(timesteps=100), path_of(predict="v", timesteps=100)
    x = normal(2, 3, 4, 4)

    def sample(model, path):
        if method == "ddpm":
            return ddpm_sample(model, path, x, 20, lambda step: normal(2, 3, 4, 4, seed=step + 1))
        return ode_sample(model, path, x, 20, method)

    epsilon_model, v_model = as_v(epsilon_path)
    torch.testing.assert_close(sample(v_model, v_path), sample(epsilon_model, epsilon_path), rtol=1e-6, atol=1e-8)


def test_ddpm_needs_a_posterior():
    with pytest.raises(ValueError, match="DDPM needs the posterior"):
        ddpm_sample(lambda x, t: x, path_of("flow"), normal(1, 3, 2, 2), 5, lambda step: normal(1, 3, 2, 2))


# Training


class Wrapped(nn.Module):
    """One parameter that scales the output of a function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * self.function(x, t)


def test_the_probe_measures_the_error_of_epsilon_whatever_the_net_predicts():
    epsilon_path, v_path = path_of(), path_of(predict="v")
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    by_prediction = [
        [row["value"] for row in probe(Wrapped(model), path, None, images, 3, 4, 0) if row["metric"] == "mse"]
        for model, path in zip(as_v(epsilon_path), (epsilon_path, v_path), strict=True)
    ]
    np.testing.assert_allclose(*by_prediction, rtol=1e-3)


@EVERY_SCHEDULE
@EVERY_PREDICTION
def test_an_untrained_net_has_at_most_the_mse_that_counts_as_collapsed(schedule, predict):
    path, t = path_of(schedule, predict), torch.arange(50).repeat_interleave(200)
    x_start = torch.sign(normal(len(t), 3, 2, 2))  # the largest images
    mse = path.target(x_start, t, normal(len(t), 3, 2, 2, seed=1)).square().view(50, -1).mean(1)
    assert mse.max() == pytest.approx(path.untrained_mse, rel=0.15)
    assert path_of("linear").untrained_mse == 1


@pytest.mark.parametrize(
    "diffusion",
    [{"schedule": "flow", "predict": "velocity"}, {"schedule": "karras", "predict": "edm"}, {"predict": "v"}],
    ids=str,
)
def test_training_lowers_the_loss(diffusion):
    state = TrainState(run_of({}, diffusion), 0, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8).repeat(8, 0)
    batches, means = state.batches(images), []
    for _ in range(2):
        state.meter = type(state.meter)(state.device)
        for _ in range(10):
            train_step(state, batches)
        means.append(state.meter.means())
    assert state.model(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)  # no variance is predicted
    assert means[1]["mse"] < means[0]["mse"] and means[0]["vb"] == 0
