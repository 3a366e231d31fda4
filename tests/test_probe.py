"""The probe against brute-force gradients and losses of single images."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.config import Scheme
from diffusion.data.arrays import split
from diffusion.data.batches import to_model_range
from diffusion.errors import InputError
from diffusion.evaluation.probe import ALL, GradientMoments, bin_edges, diverged_rows, probe, probe_images
from diffusion.gaussian import NoiseSchedule, linear_betas
from diffusion.losses import hybrid_loss
from diffusion.schemes import scheme_tables

T = 12
SCHEDULE = NoiseSchedule(linear_betas(T))
P2 = {"p2": {"gamma": 1.0, "k": 1}}
UNI = Scheme(mse_weight=P2)
SCHEMES = {
    "uniform": (Scheme(), None),
    "weighted": (UNI, None),
    "undersampled": (Scheme(timesteps=P2), None),
    "matched": (Scheme(timesteps=P2), UNI),
}


class Toy(nn.Module):
    """Six parameters, scaled by t and the pixels: the gradient depends on image, noise and timestep."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.linspace(-1, 1, 6))

    def forward(self, x, t):
        scale = ((1 + t) / T).to(x)[:, None, None, None]
        return self.weight[None, :, None, None] * (scale + x.repeat(1, 2, 1, 1))


class Constant(nn.Module):
    """Predicts zero noise for every input, which is its optimum: the expected gradient is zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x, t):
        return self.weight[None, :, None, None].expand(x.shape)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def values(rows):
    return {(row["timesteps"], row["metric"]): row["value"] for row in rows}


def run(name="uniform", count=64, bins=3, batch_size=8, seed=0, net=None, chosen=None):
    tables = scheme_tables(SCHEDULE, *SCHEMES[name])
    chosen = images(count) if chosen is None else chosen
    return probe(net or Toy(), SCHEDULE, tables, chosen, bins, batch_size, seed)


def single_gradients(tables, chosen, probabilities, random):
    """Gradients of single images at timesteps drawn by NumPy, [N, 6]."""
    x_start = to_model_range(torch.from_numpy(chosen))
    t = torch.from_numpy(random.choice(T, len(chosen), p=probabilities))
    noise = torch.from_numpy(random.standard_normal(x_start.shape, dtype=np.float32))
    net = Toy()
    weights = tables.mse_weight[t].float(), tables.vb_weight[t].float()
    weights_per_image = nn.Parameter(net.weight.detach().expand(len(chosen), 6).clone())
    scale = ((1 + t) / T).float()[:, None, None, None]
    x_t = SCHEDULE.q_sample(x_start, t, noise)
    output = weights_per_image[:, :, None, None] * (scale + x_t.repeat(1, 2, 1, 1))
    losses = hybrid_loss(SCHEDULE, output, x_start, x_t, t, noise, *weights)
    return torch.autograd.grad(losses.loss.sum(), weights_per_image)[0].double().numpy()


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_in_bins_and_over_all_timesteps_equal_those_of_single_images(name):
    tables = scheme_tables(SCHEDULE, *SCHEMES[name])
    measured = values(run(name, chosen=images(8_000), batch_size=20))
    p = tables.probabilities.numpy()
    cases = {ALL: p} | {
        f"{a}-{b - 1}": np.where((np.arange(T) >= a) & (np.arange(T) < b), p, 0)
        for a, b in itertools.pairwise(bin_edges(T, 3))
    }
    for timesteps, mass in cases.items():
        single = single_gradients(tables, images(60_000, 1), mass / mass.sum(), np.random.default_rng(2))
        variance = np.cov(single.T).trace()
        square = (single.mean(axis=0) ** 2).sum()
        np.testing.assert_allclose(measured[timesteps, "gradient_variance"], variance, rtol=0.1)
        np.testing.assert_allclose(measured[timesteps, "gradient_squared_norm"], square, rtol=0.1)
    chances = {name: p[a:b].sum() for name, a, b in (("0-3", 0, 4), ("4-7", 4, 8), ("8-11", 8, 12))}
    second_moment = sum(
        chance * (measured[name, "gradient_variance"] + measured[name, "gradient_squared_norm"])
        for name, chance in chances.items()
    )
    whole = second_moment - measured[ALL, "gradient_squared_norm"]
    np.testing.assert_allclose(measured[ALL, "gradient_variance"], whole)


def test_few_images_do_not_bias_the_variance():
    many = values(run(chosen=images(8_000), batch_size=100))
    chosen = images(800, 1).reshape(400, 2, 4, 4, 3)
    few = [values(run(chosen=pair, batch_size=1, seed=seed)) for seed, pair in enumerate(chosen)]
    measured = np.mean([metrics[ALL, "gradient_variance"] for metrics in few])
    np.testing.assert_allclose(measured, many[ALL, "gradient_variance"], rtol=0.08)


def test_a_matched_arm_has_the_expected_gradient_of_its_target():
    chosen = images(12_000)
    weighted, matched, other = (
        values(run(name, chosen=chosen, batch_size=100))[ALL, "gradient_squared_norm"]
        for name in ("weighted", "matched", "undersampled")
    )
    np.testing.assert_allclose(matched, weighted, rtol=0.04)
    assert abs(other / weighted - 1) > 0.2


def test_losses_are_those_of_uniform_timesteps_for_every_arm():
    one, other = values(run("uniform")), values(run("weighted"))
    for term, timesteps in itertools.product(("mse", "vb"), ("0-3", "4-7", "8-11", ALL)):
        assert one[timesteps, term] == other[timesteps, term]
    measured = values(run(count=8192, batch_size=1024))
    chosen = images(8192, 1)
    x_start = to_model_range(torch.from_numpy(chosen))
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(3))
    terms = []
    for t in range(T):
        steps = torch.full((len(x_start),), t)
        x_t = SCHEDULE.q_sample(x_start, steps, noise)
        with torch.no_grad():
            losses = hybrid_loss(SCHEDULE, Toy()(x_t, steps), x_start, x_t, steps, noise)
        terms.append((losses.mse.mean().item(), losses.vb.mean().item()))
    terms = np.array(terms)
    for timesteps, part in {"0-3": slice(0, 4), "8-11": slice(8, 12), ALL: slice(None)}.items():
        np.testing.assert_allclose(measured[timesteps, "mse"], terms[part, 0].mean(), rtol=0.01)
        np.testing.assert_allclose(measured[timesteps, "vb"], terms[part, 1].mean(), rtol=0.03)


def test_bins_are_weighted_by_their_width():
    measured = values(run(bins=5))
    widths = np.diff(bin_edges(T, 5))
    assert widths.tolist() == [2, 2, 3, 2, 3]
    names = [name for name, metric in measured if metric == "mse" and name != ALL]
    np.testing.assert_allclose(measured[ALL, "mse"], np.average([measured[n, "mse"] for n in names], weights=widths))


def test_the_noise_depends_on_the_seed_alone():
    assert run("matched") == run("matched")
    one, other = (values(run(seed=seed, bins=T)) for seed in (0, 1))  # one timestep per bin: only the noise differs
    assert all(one[f"{t}-{t}", "mse"] != other[f"{t}-{t}", "mse"] for t in range(T))


def test_estimates_of_a_squared_norm_are_kept_if_they_are_negative():
    """The expected gradient is zero: the mean of the estimates is zero only with the negative ones."""
    rows = [row for seed in range(40) for row in run(net=Constant(), bins=T, count=16, seed=seed)]
    assert all(np.isfinite(row["value"]) and row["reason"] == "" for row in rows)
    estimates = np.array([row["value"] for row in rows if row["metric"] == "gradient_squared_norm"])
    assert (estimates < 0).any()
    assert abs(estimates.mean()) < 4 * estimates.std() / len(estimates) ** 0.5
    assert estimates[estimates > 0].mean() > 4 * estimates.std() / len(estimates) ** 0.5


def test_a_learned_density_has_losses_but_no_gradients():
    rows = probe(Toy(), SCHEDULE, None, images(16), 3, 8, 0)
    assert np.isnan([row["value"] for row in rows if row["metric"] not in ("mse", "vb")]).all()
    assert values(rows)[ALL, "mse"] == values(run(count=16))[ALL, "mse"]
    assert {row["reason"] for row in rows if np.isnan(row["value"])} == {"the density is learned"}


def test_a_diverged_run_has_the_same_rows_with_nan():
    complete, diverged = run(), diverged_rows(T, 3, step=7)
    assert [(r["timesteps"], r["metric"]) for r in complete] == [(r["timesteps"], r["metric"]) for r in diverged]
    assert {r["metric"] for r in diverged} == {"mse", "vb", "gradient_squared_norm", "gradient_variance"}
    assert all(np.isnan(r["value"]) and r["reason"] == "diverged at step 7" for r in diverged)


def test_gradient_moments_are_unbiased():
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) + 0.3
    moments = GradientMoments()
    for vector in vectors:
        moments.add(vector)
    np.testing.assert_allclose(moments.covariance_trace, np.cov(vectors.double().numpy().T).trace())
    pairs = itertools.combinations(vectors.double().numpy(), 2)
    dots = [a @ b for a, b in pairs]  # products of different vectors are unbiased
    np.testing.assert_allclose(moments.squared_norm, np.mean(dots))


# Images


@pytest.fixture
def dataset(tmp_path):
    from PIL import Image

    from diffusion.data.folder import prepare_folder

    source = tmp_path / "images"
    source.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(source / f"{index:02}.png")
    prepare_folder(tmp_path / "prepared", source, 8)
    return tmp_path / "prepared"


def test_probe_images_are_held_out_and_depend_on_the_seed(dataset):
    everything = np.load(dataset / "images.npy")
    held_out = {image.tobytes() for image in everything[split(30, 12)[1]]}
    measured = probe_images(dataset, held_out=12, count=8, batch_size=4, seed=0)
    assert len(measured) == 8 and {image.tobytes() for image in measured} < held_out
    assert (measured == probe_images(dataset, 12, 8, 4, 0)).all()
    assert not (measured == probe_images(dataset, 12, 8, 4, 1)).all()
    assert len(probe_images(dataset, held_out=12, count=100, batch_size=5, seed=0)) == 10
    assert len(probe_images(dataset, held_out=0, count=100, batch_size=5, seed=0)) == 30


def test_too_few_images_are_refused(dataset):
    with pytest.raises(InputError, match="batch_size 8, .* 12 images: lower batch_size, or raise held_out"):
        probe_images(dataset, held_out=12, count=64, batch_size=8, seed=0)
