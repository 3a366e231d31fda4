"""The noise of a comparison that comes from the samples: the jackknife against simulations that sample again."""

import numpy as np
import pytest

from convergence.analysis.curves import mean_over_images, to_level
from convergence.analysis.sampling_noise import sampling_sd
from diffusion.evaluation.reference import evaluate, reference_of

IMAGES = np.array([1000.0, 2000.0, 4000.0])
D = 8


def nets(seed: int) -> np.ndarray:
    """Linear nets, [2, K, D, D]: features = latents @ net. Both arms approach the identity, the candidate later."""
    noise = np.random.default_rng(seed).standard_normal((2, len(IMAGES), D, D))
    distance = np.array([[0.8, 0.5, 0.3], [0.9, 0.6, 0.35]])[..., None, None]
    return np.eye(D) * (1 - distance / 2) + distance * noise / np.sqrt(D) / 2


def measure(nets: np.ndarray, latents: np.ndarray, reference, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels [2, K] and the influences of the samples on them, [2, K, N]."""
    scale = "plain" if metric in ("kid", "precision") else "log"
    rows = [[evaluate(np.float32(latents @ net), reference, [metric])[0] for net in arm] for arm in nets]
    values = np.array([[row.value for row in arm] for arm in rows])
    influences = np.array([[row.influences for row in arm] for arm in rows])
    slope = 1 / values if scale == "log" else to_level(np.ones_like(values), metric, scale)
    return to_level(values, metric, scale), influences * slope[..., None]


@pytest.mark.parametrize("metric", ["fd", "kid", "precision"])
def test_the_part_of_the_samples_is_the_spread_over_other_latents(metric):
    rng = np.random.default_rng(0)
    reference = reference_of(rng.standard_normal((500, D)).astype(np.float32), {})
    seeds = [nets(seed) for seed in (1, 2)]
    differences, estimates = [], []
    for _ in range(60):
        measured = [measure(net, rng.standard_normal((100, D)), reference, metric) for net in seeds]
        levels = np.array([levels for levels, _ in measured])
        differences.append(mean_over_images(levels[:, 1] - levels[:, 0], IMAGES))
        estimates.append(sampling_sd(np.array([influences for _, influences in measured]), IMAGES))
    truth = np.sqrt(np.var(differences, axis=0, ddof=1).mean())
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(truth, rel=0.25)
    # The noise of one arm is larger: most of it cancels in the difference.
    alone = np.array([influences for _, influences in measured])
    alone[:, 0] = 0
    assert sampling_sd(alone, IMAGES) > 1.5 * truth
