"""Schemes: expected losses and gradients that must not depend on the density, and learned densities."""

import copy
from collections import deque

import numpy as np
import pytest
import torch

from diffusion.averages import ema_decay
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Scheme, Train
from diffusion.errors import InputError
from diffusion.gaussian import NoiseSchedule, cosine_betas, linear_betas
from diffusion.losses import hybrid_loss, p2_weight
from diffusion.schemes import Tables, scheme_tables
from diffusion.streams import generator
from diffusion.timesteps import DENSITIES as DENSITY_FUNCTIONS
from diffusion.timesteps import draw_stratified, draw_timesteps
from diffusion.training.segment import train_segment
from diffusion.training.state import TrainState, train_step, untrained

LONG, SHORT = NoiseSchedule(linear_betas(1000)), NoiseSchedule(linear_betas(40))
P2 = {"p2": {"gamma": 0.5, "k": 1}}
UNI05, UNDER05 = Scheme(mse_weight=P2), Scheme(timesteps=P2)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def tiny(scheme=UNI05, match=None, timesteps=1000, **train):
    settings = {"batch_size": 8, "learning_rate": 1e-3, "log_every": 2} | train
    return RunConfig(
        dataset=OpenMoji(source="openmoji", image_size=8),
        model=Model(channels=32, channel_mult=(1,), res_blocks=1, attention_resolutions=(), head_channels=32),
        diffusion=Diffusion(timesteps=timesteps),
        train=Train(**settings),
        scheme=scheme,
        match=match,
        train_version=1,
    )


# Densities whose smallest values still allow to estimate importance-corrected means from 100,000 draws.
DENSITIES = {
    "uniform": "uniform",
    "p2": P2,
    "loss_second_moment": "loss_second_moment",
    "log_normal_sigma": {"log_normal_sigma": {"mean": 0.5, "std": 2.5}},
    "logit_normal": {"logit_normal": {"mean": 0.3, "std": 1.5}},
    "speed": {"speed": {"k": 5, "tau": 30}},
}
EVERY_DENSITY = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
EVERY_SCHEDULE = pytest.mark.parametrize(
    "schedule", [LONG, SHORT, NoiseSchedule(cosine_betas(1000))], ids=["linear", "linear 40", "cosine"]
)


def random_losses(schedule: NoiseSchedule) -> torch.Tensor:
    """Random losses or gradients of both signs, one for each timestep."""
    return torch.randn(schedule.timesteps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@EVERY_SCHEDULE
@EVERY_DENSITY
@pytest.mark.parametrize("weights", [{}, {"mse_weight": P2, "vb_weight": "debiased"}], ids=["plain", "weighted"])
def test_corrected_losses_have_the_expectation_for_uniform_draws(schedule, density, weights):
    tables = scheme_tables(schedule, Scheme(timesteps=density, importance_corrected=True, **weights))
    uniform, loss = scheme_tables(schedule, Scheme(**weights)), random_losses(schedule)
    for corrected, plain in ((tables.mse_weight, uniform.mse_weight), (tables.vb_weight, uniform.vb_weight)):
        expected = (plain * loss).mean()
        torch.testing.assert_close((tables.probabilities * corrected * loss).sum(), expected, rtol=1e-9, atol=1e-12)


@EVERY_SCHEDULE
@EVERY_DENSITY
@pytest.mark.parametrize("target", [UNI05, UNDER05, Scheme(timesteps={"speed": {"tau": 30}}, mse_weight="min_snr")])
def test_matched_losses_have_the_expectation_of_their_target(schedule, density, target):
    matched, tables = scheme_tables(schedule, Scheme(timesteps=density), target), scheme_tables(schedule, target)
    for name in ("mse_weight", "vb_weight"):
        ours, theirs = (t.probabilities * getattr(t, name) for t in (matched, tables))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@EVERY_DENSITY
@pytest.mark.parametrize("draw", [draw_timesteps, draw_stratified])
def test_means_of_draws_have_the_expectation_for_uniform_draws(density, draw):
    tables = scheme_tables(SHORT, Scheme(timesteps=density, importance_corrected=True))
    loss, random = torch.linspace(1, 0, 40, dtype=torch.float64).square(), torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(tables.probabilities, 50, random) for _ in range(2_000)])

    def z_score(weight: torch.Tensor) -> float:
        # Batches are independent even if the draws within a batch are not.
        means = (weight * loss)[drawn].mean(1)
        return ((means.mean() - loss.mean()) / (means.std() / len(means) ** 0.5)).item()

    assert abs(z_score(tables.mse_weight)) < 4 and abs(z_score(tables.vb_weight)) < 4
    if density not in ("uniform", "loss_second_moment"):
        assert abs(z_score(torch.ones(40))) > 20


def test_default_correction_is_that_of_the_papers():
    assert Scheme(timesteps="loss_second_moment").corrected
    assert not any(Scheme(timesteps=name).corrected for name in ("uniform", "p2", "log_normal_sigma", "speed"))
    assert not Scheme(timesteps="loss_second_moment", importance_corrected=False).corrected
    tables = scheme_tables(LONG, Scheme(timesteps="logit_normal", mse_weight=P2))
    torch.testing.assert_close(tables.mse_weight, p2_weight(LONG.snr, 0.5, 1), rtol=0, atol=0)
    assert (tables.vb_weight == 1).all()


def test_matching_uni05_equals_correcting_p2_draws_of_the_p2_loss():
    matched = scheme_tables(LONG, UNDER05, UNI05)
    corrected = scheme_tables(LONG, Scheme(timesteps=P2, mse_weight=P2, importance_corrected=True))
    for name in Tables.__dataclass_fields__:
        torch.testing.assert_close(getattr(matched, name), getattr(corrected, name), rtol=1e-12, atol=0)


def test_vb_weight_of_the_match_is_80_at_timestep_0():
    assert scheme_tables(LONG, UNDER05, UNI05).vb_weight[0].item() == pytest.approx(80.6, abs=0.05)


def test_mse_weight_and_vb_weight_are_separate():
    assert (scheme_tables(LONG, UNI05).vb_weight == 1).all()
    assert (scheme_tables(LONG, Scheme(vb_weight=P2)).mse_weight == 1).all()


@pytest.mark.parametrize(
    ("scheme", "match", "vb_weight"),
    [
        (Scheme(timesteps=P2, correct_vb=False), UNI05, torch.ones(1000, dtype=torch.float64)),
        (Scheme(timesteps=P2, correct_vb=False), Scheme(vb_weight="debiased"), LONG.snr.rsqrt()),
        (
            Scheme(timesteps=P2, mse_weight=P2, vb_weight="debiased", importance_corrected=True, correct_vb=False),
            None,
            LONG.snr.rsqrt(),
        ),
    ],
)
def test_vb_can_be_left_uncorrected(scheme, match, vb_weight):
    tables, whole = (scheme_tables(LONG, s, match) for s in (scheme, scheme.model_copy(update={"correct_vb": True})))
    torch.testing.assert_close(tables.vb_weight, vb_weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(tables.mse_weight, whole.mse_weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        (Scheme(timesteps={"log_normal_sigma": {"std": 0.01}}, importance_corrected=True), None),
        (Scheme(timesteps={"log_normal_sigma": {"std": 0.01}}), UNI05),
    ],
)
def test_correction_of_a_zero_probability_is_an_error(scheme, match):
    with pytest.raises(InputError, match=r"log_normal_sigma .*0.01.* is 0 at \d+ timesteps.*: widen the density"):
        scheme_tables(LONG, scheme, match)
    assert (scheme_tables(LONG, Scheme(timesteps=scheme.timesteps)).probabilities == 0).any()


@pytest.mark.parametrize(
    ("timesteps", "scheme"),
    [
        (1000, Scheme(timesteps={"log_normal_sigma": {"mean": 60, "std": 1}})),
        (1000, Scheme(timesteps={"p2": {"gamma": 100, "k": 1e-10}})),
        (2, Scheme(mse_weight={"speed": {"tau": 1}})),
    ],
    ids=["no mass", "overflow", "no range"],
)
def test_tables_that_are_not_finite_are_errors(timesteps, scheme):
    with pytest.raises(InputError, match=r"is not finite at \d+ timesteps: use less extreme parameters"):
        scheme_tables(NoiseSchedule(linear_betas(timesteps)), scheme)


def test_a_name_without_a_function_is_an_error(monkeypatch):
    monkeypatch.delitem(DENSITY_FUNCTIONS, "speed")
    with pytest.raises(InputError, match=r"no function is named speed: add it to DENSITIES .*'uniform'"):
        scheme_tables(LONG, Scheme(timesteps="speed"))


def test_the_history_stays_finite_if_the_target_never_draws_some_timesteps():
    target = Scheme(timesteps={"log_normal_sigma": {"std": 0.01}})
    adaptive = Scheme(timesteps={"loss_second_moment": {"history": 1}})
    state = TrainState(tiny(adaptive, target, timesteps=4), 0, "cpu")
    assert (state.tables.mse_weight == 0).any()
    for _ in range(4):
        train_step(state, state.batches(IMAGES))
    assert torch.isfinite(state.history.losses).all() and np.isfinite(state.meter.means()["mse"])


@pytest.fixture(scope="module")
def net():
    """A net in float64 with perturbed weights: with its initial weights, most of its gradient is zero."""
    model, _ = untrained(tiny(), 0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=random))
    return model.double()


def losses_of_every_timestep(schedule: NoiseSchedule, tables: Tables, predict) -> torch.Tensor:
    """Weighted mse and vb, [2, T], for fixed images and noise; `predict(x_t, t)` is the net."""
    random = torch.Generator().manual_seed(1)
    t = torch.arange(schedule.timesteps)
    x_start = torch.rand(len(t), 3, 8, 8, dtype=torch.float64, generator=random) * 2 - 1
    noise = torch.randn(x_start.shape, dtype=torch.float64, generator=random)
    x_t = schedule.q_sample(x_start, t, noise)
    losses = hybrid_loss(schedule, predict(x_t, t), x_start, x_t, t, noise, tables.mse_weight, tables.vb_weight)
    return torch.stack([losses.mse, losses.vb])


def expected_gradients(net, scheme: Scheme, match: Scheme | None = None) -> list[torch.Tensor]:
    """Gradients of the expected mse and vb over all 40 timesteps, each as a vector."""
    tables = scheme_tables(SHORT, scheme, match)
    terms = losses_of_every_timestep(SHORT, tables, net) @ tables.probabilities
    gradients = [torch.autograd.grad(term, list(net.parameters()), retain_graph=True) for term in terms]
    return [torch.cat([g.flatten() for g in gradient]) for gradient in gradients]


@pytest.mark.parametrize(
    ("scheme", "match", "kept"),
    [
        (UNDER05, UNI05, (True, True)),
        (Scheme(timesteps=P2, mse_weight=P2, importance_corrected=True), None, (True, True)),
        (Scheme(timesteps="loss_second_moment", mse_weight=P2), None, (True, True)),
        (Scheme(timesteps="logit_normal", correct_vb=False), UNI05, (True, False)),
        (UNDER05, None, (False, False)),
    ],
    ids=["matched05", "corrected", "learned", "vb uncorrected", "under05"],
)
def test_expected_gradient_is_that_of_uni05(net, scheme, match, kept):
    for ours, theirs, same in zip(
        expected_gradients(net, scheme, match), expected_gradients(net, UNI05), kept, strict=True
    ):
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        assert difference < 1e-9 if same else difference > 0.05


@torch.no_grad()
def test_gradients_of_draws_estimate_that_of_uni05(net):
    """At 1,000 timesteps and along two random directions, matched05 agrees with uni05, and under05 does not."""
    random = torch.Generator().manual_seed(2)
    ones, small = torch.ones(1000), 1e-6

    def losses(direction: list[torch.Tensor], distance: float) -> torch.Tensor:
        moved = copy.deepcopy(net)
        for p, d in zip(moved.parameters(), direction, strict=True):
            p += distance * d
        return losses_of_every_timestep(LONG, Tables(ones, ones, ones), moved)

    directions = [[torch.randn(p.shape, generator=random) for p in net.parameters()] for _ in range(2)]
    # Derivatives of the unweighted mse and vb of each timestep by central differences, [2, T] each.
    slopes = torch.stack([(losses(d, small) - losses(d, -small)) / (2 * small) for d in directions])
    mse, vb = slopes.unbind(1)

    def estimates(scheme: Scheme, match: Scheme | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of a million drawn gradients of mse and of vb along each direction, and their standard errors."""
        tables = scheme_tables(LONG, scheme, match)
        t = draw_timesteps(tables.probabilities, 1_000_000, random)
        drawn = torch.stack([tables.mse_weight * mse, tables.vb_weight * vb])[:, :, t]
        return drawn.mean(2), drawn.std(2) / 1000

    target, error = estimates(UNI05)

    def z_scores(scheme: Scheme, match: Scheme | None = None) -> torch.Tensor:
        """Absolute z scores of mse and vb, [2, 2]."""
        mean, own = estimates(scheme, match)
        return ((mean - target) / (own.square() + error.square()).sqrt()).abs()

    assert z_scores(UNDER05, UNI05).max() < 4
    # Differences are detected: both terms of under05, and an uncorrected vb.
    assert (z_scores(UNDER05).amax(1) > 10).all()
    mse_score, vb_score = z_scores(Scheme(timesteps=P2, correct_vb=False), UNI05)
    assert mse_score.max() < 4 and vb_score.max() > 10


LEARNED = {"loss_second_moment": {"history": 2}}
FOUR = NoiseSchedule(linear_betas(4))
W, Q, ONE = p2_weight(FOUR.snr, 0.5, 1), scheme_tables(FOUR, UNDER05).probabilities, torch.ones(4, dtype=torch.float64)
# Name -> (scheme, match, the weights for uniform draws, whether each weight is divided by 4 p_t).
ARMS = {
    "stratified": (Scheme(timesteps=P2, stratified=True), None, (ONE, ONE), (False, False)),
    "corrected": (Scheme(timesteps=P2, mse_weight=P2, importance_corrected=True), None, (W, ONE), (True, True)),
    "matched": (Scheme(timesteps={"speed": {"tau": 2}}), UNDER05, (4 * Q, 4 * Q), (True, True)),
    "learned": (Scheme(timesteps=LEARNED, mse_weight=P2), None, (W, ONE), (True, True)),
    "learned, stratified": (Scheme(timesteps=LEARNED, stratified=True, mse_weight=P2), None, (W, ONE), (True, True)),
    "learned, matched": (Scheme(timesteps=LEARNED), UNDER05, (4 * Q, 4 * Q), (True, True)),
    "learned, vb uncorrected": (
        Scheme(timesteps=LEARNED, mse_weight=P2, correct_vb=False),
        None,
        (W, ONE),
        (True, False),
    ),
    "learned, uncorrected": (
        Scheme(timesteps=LEARNED, mse_weight=P2, importance_corrected=False),
        None,
        (W, ONE),
        (False, False),
    ),
}


@pytest.mark.parametrize(("scheme", "match", "weights", "corrected"), ARMS.values(), ids=ARMS)
def test_training_steps_draw_and_weight_as_their_scheme_states(scheme, match, weights, corrected):
    """Each step is compared with draws and weights that are computed here from the losses of the steps before."""
    state = TrainState(tiny(scheme, match, timesteps=4, batch_size=10), 0, "cpu")
    kept = [deque(maxlen=2) for _ in range(4)]
    p, seen, logged = state.tables.probabilities, [], 0.0
    update, found = state.optimizer.step, []
    state.optimizer.step = lambda gradients, rate: found.append(gradients) or update(gradients, rate)
    for step in range(10):
        order = torch.randperm(10, generator=generator(0, "order", step))
        x_start = torch.from_numpy(IMAGES)[order].permute(0, 3, 1, 2) / 127.5 - 1
        t = (draw_stratified if scheme.stratified else draw_timesteps)(p, 10, generator(0, "timesteps", step))
        noise = torch.randn(x_start.shape, generator=generator(0, "noise", step))
        x_t = FOUR.q_sample(x_start, t, noise)
        model = copy.deepcopy(state.model)
        _, mse, vb = hybrid_loss(FOUR, model(x_t, t), x_start, x_t, t, noise)
        terms = [w[t] * term / (4 * p[t] if c else 1) for w, term, c in zip(weights, (mse, vb), corrected, strict=True)]
        sum(terms).mean().backward()

        train_step(state, state.batches(IMAGES))
        for ours, expected in zip(found[step], model.parameters(), strict=True):
            torch.testing.assert_close(ours, expected.grad, rtol=1e-3, atol=1e-6)
        logged += sum(terms).sum().item()
        assert state.meter.means()["loss"] == pytest.approx(logged / (10 * (step + 1)), rel=1e-4)

        # The history has the losses with the weights for uniform draws, whatever the density.
        for one, loss in zip(t.tolist(), (weights[0][t] * mse + weights[1][t] * vb).tolist(), strict=True):
            kept[one].append(loss)
        if state.history and all(len(losses) == 2 for losses in kept):
            rms = torch.tensor([np.sqrt(np.mean(np.square(losses))) for losses in kept])
            p = 0.999 * rms / rms.sum() + 0.001 / 4
        torch.testing.assert_close(state.tables_now().probabilities, p, rtol=1e-4, atol=0)
        seen.append(p)
    assert len({tuple(p.tolist()) for p in seen}) >= 6 if state.history else state.tables_now() is state.tables


def test_a_run_with_a_learned_density_resumes_bit_for_bit(tmp_path):
    run = tiny(Scheme(timesteps=LEARNED, mse_weight=P2), timesteps=4)
    whole = train_segment(run, 0, IMAGES, None, tmp_path / "whole", 8, "cpu")
    train_segment(run, 0, IMAGES, None, tmp_path / "step4", 4, "cpu")
    parts = train_segment(run, 0, IMAGES, tmp_path / "step4/state.pt", tmp_path / "step8", 8, "cpu")
    for name in ("losses", "counts"):
        torch.testing.assert_close(getattr(parts.history, name), getattr(whole.history, name), rtol=0, atol=0)
    assert (parts.tables_now().probabilities != 0.25).any()
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "step8")]
    assert weights[0] == weights[1]


def test_the_average_without_warmup_keeps_a_share_of_the_initial_weights():
    """Without warm-up, the share of the untrained weights after n steps is decay^n."""
    state = TrainState(tiny(ema_decay=0.5, ema_warmup=False), 0, "cpu")
    average = [p.detach().clone() for p in state.parameters]
    for _ in range(3):
        train_step(state, state.batches(IMAGES))
        average = [(a + p.detach()) / 2 for a, p in zip(average, state.parameters, strict=True)]
    for ours, expected in zip(state.averages[0.5], average, strict=True):
        torch.testing.assert_close(ours, expected)
    assert np.prod([ema_decay(step, 0.9999, False) for step in range(10_000)]) == pytest.approx(0.368, abs=5e-4)
