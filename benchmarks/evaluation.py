"""Time and memory of an evaluation, compared with torch-fidelity on the same images and features.

    python -m benchmarks.evaluation [--threads 2] [--images 512] [--features 10000]

The images are random, 32x32 pixels; the features are random with a spectrum similar to that of real features. A second
part streams 50,000 images of 128x128 pixels from disk and reports the peak memory of the evaluation.

    python -m benchmarks.evaluation --part statistics --device cuda [--real 20000] [--generated 4000]

This part needs no torch-fidelity. It times the features and the statistics of a reference and of an evaluation on one
device, and counts their large operations.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = str(Path(__file__).resolve().parents[1])
DIMENSIONS = 2048
# Floating-point operations of a matrix product [n, k] x [k, m], and about those of decompositions of [n, k].
OPERATIONS: dict[str, Callable[[int, int, int], float]] = {
    "mm": lambda n, k, m: 2 * n * k * m,
    "addmm": lambda n, k, m: 2 * n * k * m,
    "addmm_": lambda n, k, m: 2 * n * k * m,
    "linalg_qr": lambda n, k, _: 2 * n * k**2 - 2 / 3 * k**3,
    "_linalg_eigh": lambda n, *_: 9 * n**3,
    "_linalg_svd": lambda n, k, _: 4 * max(n, k) * min(n, k) ** 2,
}
SIDE = 128


class Cost(NamedTuple):
    seconds: float
    gigabytes: float  # peak memory of the process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=512, help="images for the extractor, default: %(default)s")
    parser.add_argument("--features", type=int, default=10_000, help="features for the metrics, default: %(default)s")
    parser.add_argument(
        "--stream", type=int, default=50_000, help="images that are streamed from disk, default: %(default)s"
    )
    parser.add_argument("--real", type=int, default=20_000, help="images of the reference, default: %(default)s")
    parser.add_argument("--generated", type=int, default=4_000, help="generated images, default: %(default)s")
    parser.add_argument("--dimensions", type=int, default=DIMENSIONS, help="numbers per image, default: %(default)s")
    parser.add_argument("--device", default="cpu", help="of the part `statistics`, default: %(default)s")
    parser.add_argument("--part", help="`statistics`: this part alone")
    arguments = parser.parse_args()
    if arguments.part == "speed":
        speed(arguments)
    elif arguments.part == "statistics":
        statistics(arguments)
    elif arguments.part:
        memory(arguments, Path(arguments.part))
    else:
        from convergence.snakefile import set_environment

        # The settings of the allocator must be set before Python starts, as the workflow does for its jobs.
        set_environment(ROOT)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        command = [sys.executable, __file__, *sys.argv[1:], "--part"]
        subprocess.run([*command, "speed"], check=True)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "samples.npy")
            write_images(path, arguments.stream)
            subprocess.run([*command, path], check=True)


def measure(call: Callable[[], Any]) -> tuple[Cost, Any]:
    """Call a function twice, because the first call also sets up memory and threads; return minimum and result."""
    costs = []
    for _ in range(2):
        # Resets the peak memory that Linux reports.
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        result = call()
        costs.append(Cost(time.perf_counter() - start, peak_gigabytes()))
    return Cost(*map(min, zip(*costs, strict=True))), result


def peak_gigabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_images(path: Path, count: int) -> None:
    import numpy as np

    images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIDE, SIDE, 3))
    rng = np.random.default_rng(0)
    for first in range(0, count, 1000):
        coarse = rng.integers(0, 256, (min(1000, count - first), 32, 32, 3), np.uint8)
        images[first : first + 1000] = coarse.repeat(4, 1).repeat(4, 2)


def speed(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch
    import torch_fidelity
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    from diffusion.evaluation.extractors import EfficientNetLite0, extract_features, load_extractor
    from diffusion.evaluation.metrics import (
        fit_gaussian,
        frechet,
        frechet_distance,
        kernel_distance,
        mean_kernel,
    )
    from diffusion.evaluation.neighbours import fidelity_and_diversity, neighbour_radii
    from diffusion.evaluation.weights import LITE0, weights_file

    torch.set_num_threads(arguments.threads)
    versions = f"torch {torch.__version__}, torch-fidelity {torch_fidelity.__version__}"
    print(f"{processor()}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}, {versions}\n")

    class PlainLite0(torch_fidelity.FeatureExtractorBase):
        """The same network without our optimisations: batch norms are not folded, tensors not channels_last."""

        def __init__(self, name: str, features_list: list[str], **kwargs: Any):
            super().__init__(name, features_list)
            self.net = EfficientNetLite0()
            self.net.load_state_dict(torch.load(weights_file(LITE0), weights_only=True))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.net(x),)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: np.ndarray):
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(self.images[index]).permute(2, 0, 1)

    torch_fidelity.register_feature_extractor("plain-lite0", PlainLite0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.images, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    extractor = load_extractor(LITE0, "cpu")
    extract_features(images[:64], extractor)
    table = []
    ours, features = measure(lambda: extract_features(images, extractor))
    half = arguments.images // 2
    theirs, metrics = measure(
        lambda: torch_fidelity.calculate_metrics(
            input1=Images(images[:half]), input2=Images(images[half:]), feature_extractor="plain-lite0", fid=True,
            cuda=False, batch_size=64, cache=False, verbose=False, save_cpu_ram=True,
        )
    )  # fmt: skip
    fd = frechet(features[:half], fit_gaussian(features[half:])).value
    print(f"FD of the images: ours {fd:.6f}, calculate_metrics {metrics['frechet_inception_distance']:.6f}\n")
    n = arguments.images
    table.append(("EfficientNet-Lite0, img/s", f"{n / ours.seconds:.1f}", f"{n / theirs.seconds:.1f} (with its FD)"))

    roots = np.logspace(0, -2.5, DIMENSIONS, dtype=np.float32)
    x, y = (rng.standard_normal((arguments.features, DIMENSIONS), dtype=np.float32) * roots for _ in range(2))
    x = x * np.float32(1.1) + np.float32(0.01)
    prepared, gaussian = measure(lambda: fit_gaussian(y))
    alone, distance = measure(lambda: frechet_distance(x, gaussian))
    with_error, _ = measure(lambda: frechet(x, gaussian))

    def fid() -> float:
        statistics = [fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
        return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    theirs, expected = measure(fid)
    table.append(("Frechet distance, s", f"{alone.seconds:.1f}", f"{theirs.seconds:.1f}"))
    table.append(("... with its standard error, s", f"{with_error.seconds:.1f}", ""))
    table.append(("... of the reference, once, s", f"{prepared.seconds:.1f}", ""))
    print(f"FD of the features: ours {distance:.8f}, torch-fidelity {expected:.8f} ({distance / expected - 1:+.1e})\n")

    tensors = torch.from_numpy(x), torch.from_numpy(y)
    once, radii = measure(lambda: neighbour_radii(y))
    ours, _ = measure(lambda: fidelity_and_diversity(x, y, radii))
    theirs, _ = measure(lambda: prc_features_to_metric(*tensors, verbose=False))
    table.append(
        (
            "precision, recall, density and coverage, s (theirs: the first two)",
            f"{ours.seconds:.1f}",
            f"{theirs.seconds:.1f}",
        )
    )
    table.append(("... peak memory of the process, GB", f"{ours.gigabytes:.2f}", f"{theirs.gigabytes:.2f}"))
    table.append(("... radii of the reference, once, s", f"{once.seconds:.1f}", ""))
    once, kernel = measure(lambda: mean_kernel(y))
    ours, _ = measure(lambda: kernel_distance(x, y, kernel))
    theirs, _ = measure(lambda: kid_features_to_metric(*tensors, verbose=False))
    table.append(("KID of all pairs (theirs: 100 subsets of 1,000), s", f"{ours.seconds:.1f}", f"{theirs.seconds:.1f}"))
    table.append(("... of the reference, once, s", f"{once.seconds:.1f}", ""))

    print(f"| {arguments.features:,} features of {DIMENSIONS} | ours | torch-fidelity |\n|---|---|---|")
    for row in table:
        print("| " + " | ".join(row) + " |")


def statistics(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from diffusion.evaluation.extractors import extract_features, load_extractor
    from diffusion.evaluation.reference import evaluate, reference_of
    from diffusion.evaluation.weights import LITE0

    class Operations(TorchDispatchMode):
        """Counts the calls and the floating-point operations of matrix products and decompositions."""

        def __init__(self):
            super().__init__()
            self.counts: Counter[tuple[str, str]] = Counter()
            self.calls: Counter[tuple[str, str]] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            if name in OPERATIONS:
                # Of one matrix: a decomposition.
                *_, a, b = [x for x in args if isinstance(x, torch.Tensor)] * 2
                key = name, str(b.dtype).removeprefix("torch.")
                self.calls[key] += 1
                self.counts[key] += OPERATIONS[name](*a.shape, b.shape[-1])
            return function(*args, **kwargs or {})

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {arguments.threads} threads"
    print(f"{name}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    rng = np.random.default_rng(0)
    roots = np.logspace(0, -2.5, arguments.dimensions, dtype=np.float32)
    real, generated = (
        rng.standard_normal((count, len(roots)), dtype=np.float32) * roots
        for count in (arguments.real, arguments.generated)
    )
    images = rng.integers(0, 256, (arguments.images, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    metrics = ["fd", "kid", "precision", "recall", "density", "coverage"]

    def seconds(label: str, call: Callable[[], Any], operations: Any = None) -> Any:
        """Call a function twice, for the first time with a count of its operations; return its result."""
        for repetition, counter in (("first", operations), ("second", None)):
            start = time.perf_counter()
            with counter or contextlib.nullcontext():
                result = call()
            print(f"{label}, {repetition} call: {time.perf_counter() - start:.2f} s", flush=True)
        return result

    extractor, operations = load_extractor(LITE0, device), Operations()
    seconds(f"features of {len(images):,} images", lambda: extract_features(images, extractor))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    label = f"statistics of {len(real):,} real images"
    reference = seconds(label, lambda: reference_of(real, {}, device=device), operations)
    label = f"metrics of {len(generated):,} generated images"
    rows = seconds(label, lambda: evaluate(generated, reference, metrics, device), operations)
    print("; ".join(f"{row.metric} {row.value:.9g}" for row in rows))
    if device.type == "cuda":
        print(f"peak memory of the statistics and metrics: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print("\n| operation | type | calls | 10^9 floating-point operations |\n|---|---|---|---|")
    for key, count in operations.counts.most_common():
        print(f"| {' | '.join(key)} | {operations.calls[key]} | {count / 1e9:,.0f} |")


def memory(arguments: argparse.Namespace, path: Path) -> None:
    import numpy as np
    import torch

    from diffusion.evaluation.extractors import extract_features, load_extractor
    from diffusion.evaluation.reference import evaluate, reference_of
    from diffusion.evaluation.weights import LITE0

    class Pixels(torch.nn.Linear):
        """A fast replacement for Inception, with as many features."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), 27).flatten(1)[:, :DIMENSIONS]

    torch.set_num_threads(arguments.threads)
    images = np.load(path, mmap_mode="r")
    print(f"\nPeak memory of the process, {len(images):,} images of {SIDE}x{SIDE} ({images.nbytes / 2**30:.1f} GB):")
    extract_features(images[:2000], load_extractor(LITE0, "cpu"))
    print(f"- streaming 2,000 of them through EfficientNet-Lite0: {peak_gigabytes():.2f} GB")
    features = extract_features(images, Pixels(1, 1))
    print(f"- all of them to {features.shape[1]:,} features each: {peak_gigabytes():.2f} GB")
    reference = reference_of(features[::5], {})
    print(f"- the reference of {len(reference.features):,} of them: {peak_gigabytes():.2f} GB")
    start = time.perf_counter()
    for row in evaluate(features, reference, ["fd", "kid", "precision", "recall", "density", "coverage"]):
        print(f"- {row.metric} {row.value:.4g}", end=" ")
    print(f"of all, {time.perf_counter() - start:.0f} s: {peak_gigabytes():.2f} GB")


if __name__ == "__main__":
    main()
