"""How the metrics answer to known damage, beside values that plain torch-fidelity gave for the same images.

    python -m benchmarks.damage /usr/share/datasets/fashion-mnist     # of Debian's package dataset-fashion-mnist

Fashion-MNIST, training images 0 to 1,999 against 2,000 to 3,999, the latter with Gaussian noise or blur.
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
NOISE = {0: 9.134, 4: None, 8: None, 16: 97.5, 32: None, 64: 255.1}  # sigma in grey levels: FD by torch-fidelity
BLUR = {0: 9.134, 0.5: 17.88, 0.75: None, 1: 130.3, 1.5: None, 2: 250.7}  # sigma in pixels
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
    parser.add_argument("directory", type=Path)
    with gzip.open(parser.parse_args().directory / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=HEADER).reshape(-1, SIDE, SIDE)
    extractor = load_extractor(LITE0, "cpu")
    reference = reference_of(extract_features(rgb(images[:2000]), extractor), {})
    print("| damage | FD | its standard error | torch-fidelity | difference | KID | precision | recall |")
    print("|---|---|---|---|---|---|---|---|")
    for what, damage, table in (("noise", with_noise, NOISE), ("blur", with_blur, BLUR)):
        last = -1.0
        for sigma, expected in table.items():
            features = extract_features(rgb(damage(images[2000:4000], sigma)), extractor)
            fd, kid, precision, recall = evaluate(features, reference, METRICS)
            told = f"{expected} | {100 * (fd.value / expected - 1):+.2f}%" if expected else "|"
            print(
                f"| {what} {sigma} | {fd.value:.3f} | {fd.stderr:.3f} | {told} | {kid.value:.5f} +- {kid.stderr:.5f} "
                f"| {precision.value:.3f} | {recall.value:.3f} |",
                flush=True,
            )
            assert fd.value > last, "FD must grow with the damage"
            last = fd.value
    collapsed = np.repeat(extract_features(rgb(images[2000:2020]), extractor), 100, axis=0)
    rows = evaluate(collapsed, reference, METRICS)
    print("20 images x 100:", ", ".join(f"{row.metric} {row.value:.4g}" for row in rows))


if __name__ == "__main__":
    main()
