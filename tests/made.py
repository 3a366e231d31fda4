"""Artificial images and features for several tests."""

import numpy as np


def scenes(n: int, seed: int, size: int = 32) -> np.ndarray:
    """Images uint8 [n, size, size, 3] of a coloured disc and a bar on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((n, size, size, 3), np.uint8)
    for image in images:
        colours = rng.random((3, 3))
        canvas = colours[0] * (x * rng.random() + y * rng.random())[..., None]
        canvas[(x - rng.random()) ** 2 + (y - rng.random()) ** 2 < 0.06] = colours[1]
        canvas[np.abs(x - rng.random()) < 0.05] = colours[2]
        image[:] = (canvas.clip(0, 1) * 255).round()
    return images


def correlated(n: int, d: int, seed: int) -> np.ndarray:
    """Features float32 [n, d] with a nonzero mean and, like real features, a spectrum of three decades."""
    mixing = np.random.default_rng(99).standard_normal((d, d)) * np.logspace(0, -3, d)[:, None]
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ mixing + rng.random(d)).astype(np.float32)
