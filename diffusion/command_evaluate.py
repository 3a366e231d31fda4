"""The verb `evaluate` of `python -m diffusion`: two sets of images, by the code that evaluates checkpoints."""

import argparse
from pathlib import Path

from diffusion.weights import INCEPTION, LITE0, SOURCES

METRICS = ("fd", "fd_infinity", "kid", "precision", "recall")


def evaluate_sets(arguments: argparse.Namespace) -> None:
    """Measure generated images against real ones, and print a line per metric.

    A set is a folder or zip of pictures of one size, or a .npy file of uint8 [N, H, W, 3].
    """
    import math

    import torch

    from diffusion.data import read_images
    from diffusion.evaluation import evaluate, reference_of
    from diffusion.features import extract_features, load_extractor

    generated, real = (read_images(path) for path in (arguments.generated, arguments.real))
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    print(f"{len(generated):,} images of {arguments.generated} against {len(real):,} of {arguments.real}")
    for name in arguments.features:
        extractor = load_extractor(name, "cuda" if cuda else "cpu", arguments.weights, arguments.weights_sha256)
        reference = reference_of(extract_features(real, extractor), extractor.identity)
        print(f"{name}:")
        for row in evaluate(extract_features(generated, extractor), reference, arguments.metrics):
            error = "" if math.isnan(row.stderr) else f" +- {row.stderr:.3g}"
            note = f"  ({row.reason})" if row.reason else ""
            print(f"  {row.metric:12} {row.value:.6g}{error}{note}")


def add_evaluate(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "evaluate", help="measure one set of images against another", description=evaluate_sets.__doc__
    )
    parser.set_defaults(verb=evaluate_sets)
    parser.add_argument("generated", type=Path, help="folder, zip or .npy of generated images")
    parser.add_argument("real", type=Path, help="folder, zip or .npy of real images")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=[LITE0, *SOURCES],
        default=[LITE0],
        metavar="NAME",
        help=f"{LITE0} (default), {INCEPTION} for the FID, or another of torch-fidelity's: {', '.join(SOURCES)}",
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=["fd", "kid", "precision", "recall"], metavar="NAME",
        help=f"of {', '.join(METRICS)} (default: all but fd_infinity)",
    )  # fmt: skip
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the one extractor named, where no network is")
    parser.add_argument("--weights-sha256", metavar="HEX", help="of that file, if not the published weights are meant")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
