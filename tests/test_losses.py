"""The hybrid loss compared with numerical integration, and the equal expected losses of matched arms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion import losses, timesteps
from diffusion.gaussian import NoiseSchedule, cosine_betas, linear_betas
from diffusion.losses import hybrid_loss, p2_weight

T = 50
SHORT, LONG = NoiseSchedule(linear_betas(T)), NoiseSchedule(linear_betas(1000))
SCHEDULES = {"linear": LONG, "linear 50": SHORT, "cosine": NoiseSchedule(cosine_betas(1000))}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def batch(t: list[int], seed: int = 0, schedule: NoiseSchedule = SHORT) -> dict[str, torch.Tensor]:
    """Arguments of `hybrid_loss` for random 3 x 2 x 2 images, in float64."""
    random = torch.Generator().manual_seed(seed)
    t = torch.tensor(t)
    x_start = torch.rand(len(t), 3, 2, 2, dtype=torch.float64, generator=random) * 2 - 1
    noise = torch.randn(x_start.shape, dtype=torch.float64, generator=random)
    output = torch.randn(len(t), 6, 2, 2, dtype=torch.float64, generator=random)
    x_t = schedule.q_sample(x_start, t, noise)
    return {"model_output": output, "x_start": x_start, "x_t": x_t, "t": t, "noise": noise}


def kl_bits_by_integration(betas: np.ndarray, x_start: float, x_t: float, epsilon: float, v: float, t: int) -> float:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of one pixel in bits, with means by Bayes' rule on a grid."""
    kept_before, kept = np.prod(1 - betas[:t]), np.prod(1 - betas[: t + 1])
    x, dx = np.linspace(-15, 15, 100_001, retstep=True)

    def posterior(start: float) -> np.ndarray:
        density = stats.norm.pdf(x_t, math.sqrt(1 - betas[t]) * x, math.sqrt(betas[t]))
        density *= stats.norm.pdf(x, math.sqrt(kept_before) * start, math.sqrt(1 - kept_before))
        return density / (density.sum() * dx)

    q = posterior(x_start)
    guess = posterior((x_t - math.sqrt(1 - kept) * epsilon) / math.sqrt(kept))
    mean = (guess * x).sum() * dx
    smallest = (guess * (x - mean) ** 2).sum() * dx
    log_variance = (1 + v) / 2 * math.log(betas[t]) + (1 - v) / 2 * math.log(smallest)
    log_p = stats.norm.logpdf(x, mean, math.exp(log_variance / 2))
    seen = q > 0
    return (q[seen] * (np.log(q[seen]) - log_p[seen])).sum() * dx / math.log(2)


# At 1,000 timesteps vb equals the divergence; otherwise it is scaled by T / 1000.
@pytest.mark.parametrize(
    ("schedule", "t"), [*((SHORT, t) for t in (1, 5, 20, 49)), *((LONG, t) for t in (10, 300, 999))]
)
def test_vb_is_the_kl_divergence_in_bits(schedule, t):
    case = batch([t], schedule=schedule)
    pixels = zip(
        case["x_start"].flatten().tolist(),
        case["x_t"].flatten().tolist(),
        case["model_output"][:, :3].flatten().tolist(),
        case["model_output"][:, 3:].flatten().tolist(),
        strict=True,
    )
    expected = np.mean([kl_bits_by_integration(schedule.betas.numpy(), *pixel, t) for pixel in pixels])
    np.testing.assert_allclose(hybrid_loss(schedule, **case).vb.item(), expected * schedule.timesteps / 1000, rtol=1e-5)


def levels(x_t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Likelihoods at t = 0 of the 256 grey levels for one x_t and one prediction, and the predicted x_0."""
    x_start = torch.linspace(-1, 1, 256, dtype=torch.float64).view(-1, 1, 1, 1)
    x_t, epsilon = torch.full_like(x_start, x_t), torch.full_like(x_start, -0.7)
    t = torch.zeros(256, dtype=torch.int64)
    output = torch.cat([epsilon, torch.full_like(x_start, 0.3)], dim=1)
    vb = hybrid_loss(SHORT, output, x_start, x_t, t, torch.zeros_like(x_start)).vb
    return 2 ** (-vb * 1000 / T), SHORT.predict_x_start(epsilon, x_t, t)


# Predictions in the middle and beyond both ends, where the first and last levels have the whole tail.
PREDICTED = pytest.mark.parametrize("x_t", [0.21, -1.05, 1.02])


@PREDICTED
def test_likelihood_of_the_256_levels_sums_to_one(x_t):
    likelihood, _ = levels(x_t)
    np.testing.assert_allclose(likelihood.sum().item(), 1, rtol=1e-6)


@PREDICTED
def test_likelihood_is_the_normal_probability_of_each_level(x_t):
    likelihood, mean = levels(x_t)
    std = math.exp(0.5 * (0.65 * SHORT.betas[0].log() + 0.35 * SHORT.posterior_variance[1].log()))
    edges = np.linspace(-1, 1, 256) + 1 / 255
    cumulative = np.concatenate([[0], stats.norm.cdf(edges[:-1], mean[0].item(), std), [1]])
    # The error of the tanh approximation of the normal CDF is at most 2e-4.
    np.testing.assert_allclose(likelihood, np.diff(cumulative), atol=4e-4)


def test_gradient_of_vb_reaches_only_the_variance():
    case = batch([0, 7])
    case["model_output"].requires_grad_()
    hybrid_loss(SHORT, **case).vb.sum().backward()
    gradient = case["model_output"].grad
    assert (gradient[:, :3] == 0).all()
    assert (gradient[1, 3:] != 0).all() and (gradient[0, 3:] != 0).any()


def test_gradient_of_mse_reaches_only_epsilon():
    case = batch([0, 7])
    case["model_output"].requires_grad_()
    hybrid_loss(SHORT, **case).mse.sum().backward()
    gradient = case["model_output"].grad
    torch.testing.assert_close(gradient[:, :3], 2 / 12 * (case["model_output"].detach()[:, :3] - case["noise"]))
    assert (gradient[:, 3:] == 0).all()


def test_perfect_prediction_with_minimal_variance_has_loss_0():
    case = batch([1, 7, 19])
    case["model_output"] = torch.cat([case["noise"], -torch.ones_like(case["noise"])], dim=1)
    loss = hybrid_loss(SHORT, **case)
    torch.testing.assert_close(loss.mse, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(loss.vb, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_fixed_variance_has_vb_0():
    case = batch([0, 7])
    learned = hybrid_loss(SHORT, **case)
    fixed = hybrid_loss(SHORT, **case | {"model_output": case["model_output"][:, :3]})
    assert (fixed.vb == 0).all()
    torch.testing.assert_close(fixed.mse, learned.mse, rtol=0, atol=0)
    torch.testing.assert_close(fixed.loss, learned.mse, rtol=0, atol=0)


def test_weights_scale_their_own_term_of_each_image():
    case = batch([0, 7])
    plain = hybrid_loss(SHORT, **case)
    mse_weight, vb_weight = torch.tensor([2.0, 0.5]), torch.tensor([0.25, 3.0])
    weighted = hybrid_loss(SHORT, **case, mse_weight=mse_weight, vb_weight=vb_weight)
    torch.testing.assert_close(weighted.mse, plain.mse * mse_weight)
    torch.testing.assert_close(weighted.vb, plain.vb * vb_weight)
    torch.testing.assert_close(weighted.loss, weighted.mse + weighted.vb, rtol=0, atol=0)


def test_losses_of_a_batch_are_independent():
    case = batch([0, 7, 19])
    together = hybrid_loss(SHORT, **case).loss
    alone = [hybrid_loss(SHORT, **{name: value[i : i + 1] for name, value in case.items()}).loss for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_p2_weight_with_unit_k_is_a_power_of_the_noise(gamma):
    schedule = NoiseSchedule(linear_betas(1000))
    torch.testing.assert_close(p2_weight(schedule.snr, gamma, 1.0), (1 - schedule.alphas_cumprod) ** gamma)
    torch.testing.assert_close(losses.p2(schedule, gamma, 1.0), (1 - schedule.alphas_cumprod) ** gamma)


def test_p2_weight_of_two_values():
    torch.testing.assert_close(p2_weight(torch.tensor([0.0, 2.0]), 2.0, 3.0), torch.tensor([1 / 9, 1 / 25]))


def test_unweighted_is_one_everywhere():
    torch.testing.assert_close(losses.unweighted(SHORT), torch.ones(T, dtype=torch.float64), rtol=0, atol=0)


def test_mean_p2_weight_of_the_linear_schedule():
    assert p2_weight(LONG.snr, 0.5, 1.0).mean().item() == pytest.approx(0.806, abs=5e-4)


def signal_and_noise(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """alphas_cumprod and 1 - alphas_cumprod computed by numpy, [T]."""
    kept = np.cumprod(1 - schedule.betas.numpy())
    return kept, 1 - kept


@EVERY_SCHEDULE
@pytest.mark.parametrize(("gamma", "k"), [(0.5, 1.0), (1.0, 3.0), (2.0, 0.1)])
def test_p2_weight_equals_the_published_formula(schedule, gamma, k):
    signal, noise = signal_and_noise(schedule)
    np.testing.assert_allclose(losses.p2(schedule, gamma, k), 1 / (k + signal / noise) ** gamma, rtol=1e-12)


@EVERY_SCHEDULE
@pytest.mark.parametrize("gamma", [5.0, 1.0, 0.01, 1e6])
def test_min_snr_weight_equals_the_published_formula(schedule, gamma):
    snr = np.divide(*signal_and_noise(schedule))
    weight = losses.min_snr(schedule, gamma).numpy()
    np.testing.assert_allclose(weight, np.minimum(snr, gamma) / snr, rtol=1e-12)
    # The weight is 1 at noisy timesteps; elsewhere weight times SNR, the weight of the loss of x_0, is gamma.
    assert (weight[snr <= gamma] == 1).all()
    np.testing.assert_allclose((weight * snr)[snr > gamma], gamma, rtol=1e-12)


@EVERY_SCHEDULE
def test_debiased_weight_equals_the_published_formula(schedule):
    signal, noise = signal_and_noise(schedule)
    np.testing.assert_allclose(losses.debiased(schedule), np.sqrt(noise / signal), rtol=1e-12)


@EVERY_SCHEDULE
@pytest.mark.parametrize("share", [0.02, 0.7, 1.0])
@pytest.mark.parametrize("lam", [0.6, 0.8, 0.5])
def test_speed_weight_equals_the_published_formula(schedule, lam, share):
    tau = round(share * schedule.timesteps)
    change = np.gradient(signal_and_noise(schedule)[1])
    scaled = (change - change.min()) / (change.max() - change.min())
    weight = losses.speed(schedule, lam, tau).numpy()
    np.testing.assert_allclose(weight[:tau], 1 - lam + (2 * lam - 1) * scaled[:tau], rtol=1e-9)
    assert (weight[tau:] == 1).all() and len(weight) == schedule.timesteps


@EVERY_SCHEDULE
@pytest.mark.parametrize("lam", [0.6, 0.8])
def test_speed_weight_ranges_from_1_minus_lambda_to_lambda(schedule, lam):
    weight = losses.speed(schedule, lam, schedule.timesteps)
    assert weight.min().item() == pytest.approx(1 - lam, abs=1e-12)
    assert weight.max().item() == pytest.approx(lam, abs=1e-12)
    # It is largest at the timestep at which the noise increases fastest.
    assert weight.argmax() == np.gradient(signal_and_noise(schedule)[1]).argmax()


def test_matched_weights_give_the_expected_loss_of_the_weighted_arm():
    # E_uniform[w mse + vb] = E_p[mean(w) mse + mean(w) / w_t vb] for p proportional to w, computed over all t.
    case = batch(list(range(T)))
    w, p = p2_weight(SHORT.snr, 0.5, 1.0), timesteps.p2(SHORT, 0.5, 1.0)
    weighted = hybrid_loss(SHORT, **case, mse_weight=w).loss.mean()
    matched = hybrid_loss(SHORT, **case, mse_weight=w.mean(), vb_weight=w.mean() / w).loss
    torch.testing.assert_close((p * matched).sum(), weighted)
