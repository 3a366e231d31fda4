"""`convergence evaluate`: compares generated images with real ones."""

import math
from pathlib import Path

import click

from convergence.command.options import PATH, Names, device_option, find_device
from convergence.errors import StudyError
from diffusion.evaluation.weights import INCEPTION, LITE0, SOURCES, weights_file

FEATURES = (LITE0, *SOURCES)
METRICS = ("fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage")


@click.command("evaluate")
@click.argument("generated", type=PATH)
@click.argument("real", type=PATH)
@click.option(
    "--features",
    type=Names(FEATURES),
    default=LITE0,
    metavar="NAME,...",
    help=f"Comma-separated feature extractors, from {', '.join(FEATURES)}. {INCEPTION} gives the FID.",
)
@click.option(
    "--metrics",
    type=Names(METRICS),
    default="fd,kid,precision,recall",
    metavar="NAME,...",
    help=f"Comma-separated metrics, from {', '.join(METRICS)}.",
)
@click.option("--weights", type=PATH, metavar="FILE",
              help="Weights of the feature extractor, for a machine without a network.")  # fmt: skip
@click.option("--weights-sha256", metavar="HEX", help="SHA-256 of that file, if these are not the published weights.")
@device_option
def main(
    generated: Path,
    real: Path,
    features: tuple[str, ...],
    metrics: tuple[str, ...],
    weights: Path | None,
    weights_sha256: str | None,
    device: str,
) -> None:
    """Compare a set of generated images with a set of real ones.

    GENERATED and REAL are each a folder or zip file of images of one size, a .npy file, or a .npz file with the array
    arr_0. Arrays are uint8 [N, H, W, 3]. Prints a line per metric.
    \f

    Raises:
        StudyError: if a SHA-256 is given without a file of weights, or a set has only one image.
    """
    from diffusion.data.folder import read_images
    from diffusion.evaluation import reference
    from diffusion.evaluation.extractors import extract_features, load_extractor

    if weights_sha256 and not weights:
        raise StudyError("--weights-sha256 needs --weights: name the file of weights too")
    for name in features:
        weights_file(name, weights, weights_sha256)  # reports a wrong file before images are read
    fake_images, real_images = read_images(generated), read_images(real)
    for path, images in ((generated, fake_images), (real, real_images)):
        if len(images) < 2:
            raise StudyError(f"{path}: there is one image, and metrics need at least two: add images")
    torch_device = find_device(device)
    sizes = [f"{images.shape[2]}x{images.shape[1]} pixels" for images in (fake_images, real_images)]
    click.echo(
        f"{len(fake_images):,} images ({sizes[0]}) of {generated} against {len(real_images):,} ({sizes[1]}) of {real}"
    )
    for name in features:
        extractor = load_extractor(name, torch_device, weights, weights_sha256)
        real_features = extract_features(real_images, extractor)
        expected = reference.reference_of(real_features, extractor.identity, device=torch_device)
        click.echo(f"{name}:")
        for row in reference.evaluate(extract_features(fake_images, extractor), expected, metrics, torch_device):
            error = "" if math.isnan(row.stderr) else f" +- {row.stderr:.3g}"
            reason = f"  ({row.reason})" if row.reason else ""
            click.echo(f"  {row.metric:12} {row.value:.6g}{error}{reason}")
