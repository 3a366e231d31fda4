"""Metrics of images with known damage, with the FD that torch-fidelity computes for the same images.

    python -m benchmarks.damage /usr/share/datasets/fashion-mnist     # Debian's package dataset-fashion-mnist

Compares the training images 0 to 1,999 of Fashion-MNIST with the images 2,000 to 3,999, to which Gaussian noise or
blur is added.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.reference import evaluate, reference_of
from diffusion.evaluation.weights import LITE0

SIDE, HEADER = 28, 16
# Standard deviation -> FD computed by torch-fidelity.
NOISE = {0: 9.134, 4: None, 8: None, 16: 97.5, 32: None, 64: 255.1}  # in grey levels
BLUR = {0: 9.134, 0.5: 17.88, 0.75: None, 1: 130.3, 1.5: None, 2: 250.7}  # in pixels
METRICS = ["fd", "kid", "precision", "recall"]


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def with_noise(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def with_blur(images: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(images.astype(np.float64), (0, sigma, sigma)).round().clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="contains train-images-idx3-ubyte.gz")
    with gzip.open(parser.parse_args().directory / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=HEADER).reshape(-1, SIDE, SIDE)
    extractor = load_extractor(LITE0, "cpu")
    reference = reference_of(extract_features(rgb(images[:2000]), extractor), {})
    print("| damage | FD | standard error of FD | torch-fidelity | difference | KID | precision | recall |")
    print("|---|---|---|---|---|---|---|---|")
    for name, damage, table in (("noise", with_noise, NOISE), ("blur", with_blur, BLUR)):
        previous = -1.0
        for sigma, expected in table.items():
            features = extract_features(rgb(damage(images[2000:4000], sigma)), extractor)
            fd, kid, precision, recall = evaluate(features, reference, METRICS)
            comparison = f"{expected} | {100 * (fd.value / expected - 1):+.2f}%" if expected else "|"
            print(
                f"| {name} {sigma} | {fd.value:.3f} | {fd.stderr:.3f} | {comparison} "
                f"| {kid.value:.5f} +- {kid.stderr:.5f} | {precision.value:.3f} | {recall.value:.3f} |",
                flush=True,
            )
            assert fd.value > previous, "FD must increase with the damage"
            previous = fd.value
    collapsed = np.repeat(extract_features(rgb(images[2000:2020]), extractor), 100, axis=0)
    rows = evaluate(collapsed, reference, METRICS)
    print("20 images x 100:", ", ".join(f"{row.metric} {row.value:.4g}" for row in rows))


if __name__ == "__main__":
    main()
