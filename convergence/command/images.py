"""The command `python -m diffusion`: one verb, one function and its parser."""

import argparse
import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from convergence.errors import StudyError, exit_on_user_error
from diffusion.evaluation.weights import INCEPTION, LITE0, SOURCES

logger = logging.getLogger(__name__)

GRID_IMAGES = 64
GRID_PIXELS = 64  # of an image in it: smaller ones are enlarged
METRICS = ("fd", "fd_infinity", "kid", "precision", "recall")
PUBLISHED = ("image_size", "head_channels", "heads", "schedule", "timesteps")


def sample(arguments: argparse.Namespace) -> None:
    """Sample a checkpoint, ours or a published one, to samples.npy and samples.png.

    Raises:
        OSError: the samples do not fit the disk.
        StudyError: the checkpoint is no such net or diverged, arguments do not fit it, or the GPU is too small.
    """
    import math

    import torch

    from diffusion.checkpoints import load_checkpoint, preview, sample_checkpoint
    from diffusion.config import Sample, check_sampling_steps
    from diffusion.files import save_npy
    from diffusion.published import load_published
    from diffusion.validation import first_mistake

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = _device(arguments.device)
    path: Path = arguments.checkpoint
    published = {name: value for name in PUBLISHED if (value := getattr(arguments, name)) is not None}
    if path.suffix == ".safetensors":
        if published:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in published)
            raise StudyError(f"{path} says itself which net it holds: leave out {given}")
        checkpoint = load_checkpoint(path, device)
    elif "image_size" in published:
        checkpoint = load_published(path, device, **published)
    else:
        raise StudyError(f"{path}: a published checkpoint does not say how large its images are: give --image-size")
    if checkpoint.diverged:
        raise StudyError(f"{path}: this run diverged, and no images come from it: name a checkpoint of another run")
    names = ("sampler", "steps", "images", "batch_size", "precision", "seed")
    try:
        settings = Sample(**{name: getattr(arguments, name) for name in names})
        check_sampling_steps(settings, checkpoint.schedule.timesteps)
    except ValueError as error:
        raise StudyError(first_mistake(error, Sample)) from None

    arguments.out.mkdir(parents=True, exist_ok=True)
    array, grid = arguments.out / "samples.npy", arguments.out / "samples.png"
    if shutil.disk_usage(arguments.out).free < settings.images * 3 * checkpoint.image_size**2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(array))
    try:
        images = sample_checkpoint(checkpoint, settings, device)
    except torch.OutOfMemoryError:
        raise StudyError("the images that are sampled at once do not fit the GPU: say a smaller --batch-size") from None
    save_npy(array, images)
    shown = min(settings.images, GRID_IMAGES)
    columns = math.ceil(math.sqrt(shown))
    scale = max(1, GRID_PIXELS // checkpoint.image_size)
    preview(images, grid, columns, math.ceil(shown / columns), scale)
    logger.info("%d samples are in %s, %d of them as a grid in %s", settings.images, array, shown, grid)


def _add_sample(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("sample", help="draw images from a checkpoint", description=_summary(sample))
    parser.set_defaults(verb=sample)
    parser.add_argument("checkpoint", type=_file, help="weights.safetensors of a run, or a published .pt")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives samples.npy and samples.png")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="of the sampler (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the latents (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images at once (default: what a GPU's memory holds)"
    )
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: bf16 on a GPU, else fp32"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="of the CPU (default: as torch chooses)")
    group = parser.add_argument_group("a published .pt", "what such a file does not say of itself")
    group.add_argument("--image-size", type=int, metavar="N", help="height and width of its images; required")
    heads = group.add_mutually_exclusive_group()
    heads.add_argument("--head-channels", type=int, metavar="N", help="channels of an attention head (default: 64)")
    heads.add_argument("--heads", type=int, metavar="N", help="attention heads at every width, instead")
    group.add_argument("--schedule", choices=["linear", "cosine"], help="of the noise (default: linear)")
    group.add_argument("--timesteps", type=int, metavar="T", help="that it was trained with (default: 1000)")


def export(arguments: argparse.Namespace) -> None:
    """Write the weights of a run as a plain state dict that guided-diffusion loads.

    Raises:
        StudyError: the files are of other kinds, the weights are damaged, or the run diverged.
    """
    from diffusion.checkpoints import load_checkpoint
    from diffusion.published import write_published

    source, target = arguments.weights, arguments.out
    if source.suffix != ".safetensors" or target.suffix != ".pt":
        raise StudyError(f"export goes from a .safetensors to a .pt, not from {source} to {target}: name such files")
    checkpoint = load_checkpoint(source, "cpu")
    if checkpoint.diverged:
        raise StudyError(
            f"{source}: this run diverged, and its weights are of no use: name a checkpoint of another run"
        )
    write_published(target, checkpoint.model.state_dict())
    logger.info("%s: images of %d pixels, %d timesteps", target, checkpoint.image_size, checkpoint.schedule.timesteps)


def _add_export(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("export", help="write weights in the published layout", description=_summary(export))
    parser.set_defaults(verb=export)
    parser.add_argument("weights", type=_file, help="weights.safetensors of a run")
    parser.add_argument("out", type=Path, help="the .pt to write")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure generated images against real ones, and print a line per metric.

    A set is a folder or zip of pictures of one size, or a .npy file of uint8 [N, H, W, 3].

    Raises:
        StudyError: a set cannot be read, or weights are not to be had.
    """
    import math

    from diffusion.data.folder import read_images
    from diffusion.evaluation.extractors import extract_features, load_extractor
    from diffusion.evaluation.reference import evaluate as measure
    from diffusion.evaluation.reference import reference_of

    if arguments.weights_sha256 and not arguments.weights:
        raise StudyError("--weights-sha256 is of a file: name that with --weights")
    generated, real = (read_images(path) for path in (arguments.generated, arguments.real))
    device = _device(arguments.device)
    print(f"{len(generated):,} images of {arguments.generated} against {len(real):,} of {arguments.real}")
    for name in arguments.features:
        extractor = load_extractor(name, device, arguments.weights, arguments.weights_sha256)
        reference = reference_of(extract_features(real, extractor), extractor.identity)
        print(f"{name}:")
        for row in measure(extract_features(generated, extractor), reference, arguments.metrics):
            error = "" if math.isnan(row.stderr) else f" +- {row.stderr:.3g}"
            note = f"  ({row.reason})" if row.reason else ""
            print(f"  {row.metric:12} {row.value:.6g}{error}{note}")


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "evaluate", help="measure one set of images against another", description=_summary(evaluate)
    )
    parser.set_defaults(verb=evaluate)
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


def main(argv: list[str] | None = None) -> None:
    """Run one verb; a mistake ends in one sentence on stderr and exit code 1 (2 where the arguments are wrong)."""
    parser = argparse.ArgumentParser("python -m diffusion", description="Work on single checkpoints, without a study.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_sample(verbs)
    _add_export(verbs)
    _add_evaluate(verbs)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    with exit_on_user_error():
        arguments.verb(arguments)


def _summary(verb: Callable[[argparse.Namespace], None]) -> str:
    return (verb.__doc__ or "").partition("Raises:")[0]


def _device(name: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise StudyError(f"torch {torch.__version__} finds no GPU here: say --device cpu")
    return "cuda" if available and name != "cpu" else "cpu"


def _file(text: str) -> Path:
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}: mend the path")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but it is {text}")
    return int(text)


if __name__ == "__main__":
    main()
