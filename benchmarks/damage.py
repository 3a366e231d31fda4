"""Metrics of images with known damage, with the FD that torch-fidelity computes for the same images.

    python -m benchmarks.damage /usr/share/datasets/fashion-mnist     # Debian's package dataset-fashion-mnist

Compares the training images 0 to 1,999 of Fashion-MNIST with the images 2,000 to 3,999, to which Gaussian noise or
blur is added, with 20 images that are repeated, and with other images of five of the ten classes.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.reference import evaluate, reference_of
from diffusion.evaluation.weights import LITE0

SIDE, HEADER, LABELS_HEADER = 28, 16, 8
# Standard deviation -> FD computed by torch-fidelity.
NOISE = {0: 9.134, 4: None, 8: None, 16: 97.5, 32: None, 64: 255.1}  # in grey levels
BLUR = {0: 9.134, 0.5: 17.88, 0.75: None, 1: 130.3, 1.5: None, 2: 250.7}  # in pixels
METRICS = ["fd", "kid", "precision", "recall", "density", "coverage"]


def read(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def with_noise(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def with_blur(images: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(images.astype(np.float64), (0, sigma, sigma)).round().clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="contains the .gz files of Fashion-MNIST")
    directory = parser.parse_args().directory
    images = read(directory / "train-images-idx3-ubyte.gz", HEADER).reshape(-1, SIDE, SIDE)
    labels = read(directory / "train-labels-idx1-ubyte.gz", LABELS_HEADER)
    extractor = load_extractor(LITE0, "cpu")
    reference = reference_of(extract_features(rgb(images[:2000]), extractor), {})
    columns = ["damage", "FD", "standard error of FD", "torch-fidelity", "difference", "KID", *METRICS[2:]]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, damage, table in (("noise", with_noise, NOISE), ("blur", with_blur, BLUR)):
        previous = -1.0
        for sigma, expected in table.items():
            features = extract_features(rgb(damage(images[2000:4000], sigma)), extractor)
            fd, kid, *others = evaluate(features, reference, METRICS)
            comparison = f"{expected} | {100 * (fd.value / expected - 1):+.2f}%" if expected else "|"
            print(
                f"| {name} {sigma} | {fd.value:.3f} | {fd.stderr:.3f} | {comparison} "
                f"| {kid.value:.5f} +- {kid.stderr:.5f} | {' | '.join(f'{row.value:.3f}' for row in others)} |",
                flush=True,
            )
            assert fd.value > previous, "FD must increase with the damage"
            previous = fd.value
    collapsed = np.repeat(extract_features(rgb(images[2000:2020]), extractor), 100, axis=0)
    half = np.flatnonzero(labels[2000:] < 5)[:2000] + 2000
    few_modes = {"20 images x 100": collapsed, "five of ten classes": extract_features(rgb(images[half]), extractor)}
    for name, features in few_modes.items():
        rows = evaluate(features, reference, METRICS)
        print(f"{name}:", ", ".join(f"{row.metric} {row.value:.4g}" for row in rows))


if __name__ == "__main__":
    main()
