"""Feature extractors: pretrained nets that map images to features. All metrics are computed from these features."""

import contextlib
import hashlib
import io
import itertools
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion.errors import InputError
from diffusion.evaluation.weights import LITE0, LITE0_SHA256, SOURCES, hub_directory, weights_file
from diffusion.prefetch import prefetched
from diffusion.progress import Progress, log_ready

logger = logging.getLogger(__name__)

LITE0_STAGES = (  # (kernel, stride, expansion, channels, blocks), Tan & Le 2019, arXiv 1905.11946, table 1
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
CPU_BATCH, GPU_BATCH = 16, 256  # the activations of the first fit into a CPU's cache; the second keeps a GPU busy


class _SameConv2d(nn.Conv2d):
    """Convolution without bias, with the padding "SAME" of TensorFlow for inputs of even size.

    If the padding is odd, the additional pixel is at the bottom and at the right.
    """

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
    """Inverted residual block (Sandler et al. 2018, arXiv 1801.04381), with the parameter names of the weights file.

    The block consists of a 1x1 convolution to more channels, a depthwise convolution, and a 1x1 convolution to
    `out_channels`.
    """

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


class Extractor(nn.Module):
    """A net that maps images uint8 [B, 3, H, W] in 0..255 to features float32 [B, D]."""

    identity: dict[str, str]
    """Names, versions and hashes of everything that determines the features."""


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 up to its pooled features, D = 1280.

    Source: Tan & Le 2019, arXiv 1905.11946. The Lite variant has no squeeze-and-excitation and uses ReLU6.
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
        self._fc = nn.Linear(1280, 1000)  # unused, but part of the weights file

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images uint8 [B, 3, H, W] in 0..255 to features float32 [B, 1280]."""
        # Bicubic interpolation overshoots the range 0..255 at edges.
        x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True).clamp_(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = _relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return _relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def fold_batch_norms(net: nn.Module) -> None:
    """Merges each BatchNorm2d of a net in eval mode into the convolution that is registered directly before it."""
    for parent in net.modules():
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


def _load_lite0(path: Path) -> Extractor:
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    fold_batch_norms(net.eval())
    net = net.to(memory_format=torch.channels_last)
    net.identity = {
        "extractor": LITE0,
        "weights_sha256": LITE0_SHA256,
        "resize": "bicubic antialiased 224x224, clamped",
        "normalisation": "(x - 127) / 128",
    }
    return net


class _TorchFidelityExtractor(Extractor):
    """An extractor of torch-fidelity, with the layer that torch-fidelity uses for the Frechet distance."""

    def __init__(self, name: str, path: Path | None):
        super().__init__()
        # The import takes seconds, and the default extractor does not need it.
        import torch_fidelity
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
        from torch_fidelity.utils import create_feature_extractor

        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join([LITE0, *FEATURE_EXTRACTORS_REGISTRY])
            raise InputError(f"unknown feature extractor '{name}': choose from {known}")
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                self.net = create_feature_extractor(
                    name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=path and str(path)
                )
        except (OSError, EOFError, RuntimeError, ImportError, UnpicklingError) as error:
            target = hub_directory() / (SOURCES[name].file if name in SOURCES else "")
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the weights of feature extractor '{name}' cannot be loaded ({reason}): download them on a machine "
                f"with a network and copy them to {target}, or use '{LITE0}'"
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


def load_extractor(
    name: str, device: str | torch.device, path: str | Path | None = None, sha256: str | None = None
) -> Extractor:
    """Loads a feature extractor.

    The weights of "efficientnet-lite0" (D = 1280) are part of the installation. The other extractors
    ("inception-v3-compat", D = 2048, "dinov2-vit-b-14", "clip-vit-b-32", ...) are those of torch-fidelity. The
    weights of these extractors are downloaded on first use, unless `path` is given.

    Args:
        name: name of the extractor.
        device: device of the net.
        path: file with the weights.
        sha256: SHA-256 digest of the file at `path`. Only needed if the file does not contain the published weights.

    Returns:
        the net in eval mode, without gradients.

    Raises:
        FileError: if the weights are missing at `path`, or damaged.
        InputError: if the extractor is unknown, or if its weights cannot be downloaded.
    """
    # Extractors that a caller has registered with torch-fidelity are not in SOURCES.
    verifiable = name == LITE0 or (name in SOURCES and (path or SOURCES[name].sha256))
    file = weights_file(name, Path(path) if path else None, sha256) if verifiable else None
    net = _load_lite0(file) if name == LITE0 and file else _TorchFidelityExtractor(name, file)
    # Kernels differ between minor versions of torch, not between patch versions.
    net.identity["torch"] = ".".join(torch.__version__.split(".")[:2])
    return net.requires_grad_(False).eval().to(device)


def device_of(extractor: Extractor) -> torch.device:
    """Returns the device of the weights of an extractor."""
    return next(extractor.parameters()).device


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disables TF32 while the block or the decorated function runs.

    TF32 has a precision of three digits, so features and metrics on a GPU would differ from those on a CPU.
    """
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def extract_features(
    images: np.ndarray, extractor: Extractor, batch_size: int | None = None, indices: np.ndarray | None = None
) -> np.ndarray:
    """Computes the features of images batch by batch.

    Args:
        images: images, uint8 [N, H, W, 3]. A memory map stays on disk: pages that have been read are released.
        extractor: feature extractor.
        batch_size: images per batch. If None, 16 on a CPU and 256 on a GPU.
        indices: indices of the images to use, in this order, int64 [M]. If None, all images are used.

    Returns:
        features, float32 [M, D]; [0, D] if there are no images.

    Raises:
        InputError: if the images have another shape or dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise InputError(f"images: must be uint8 [N, H, W, 3], but are {images.dtype} {list(images.shape)}")
    device = device_of(extractor)
    batch_size = batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    if indices is None:
        indices = np.arange(len(images))
    progress = Progress("images through the extractor", len(indices))

    def read(batch: np.ndarray) -> torch.Tensor:
        selected = np.asarray(images[batch])
        _release_pages(images)
        return torch.from_numpy(selected)

    batches = [indices[first : first + batch_size] for first in range(0, max(len(indices), 1), batch_size)]
    features, done = torch.empty(0), 0
    with torch.inference_mode(), full_precision(), prefetched(read, batches, device) as pixels:
        for batch in pixels:
            batch_features = extractor(batch.permute(0, 3, 1, 2))
            if done == 0:
                features = batch_features.new_empty(len(indices), batch_features.shape[1], dtype=torch.float32)
            # The features stay on the device until the end: to fetch them, the host would wait for the device.
            features[done : done + len(batch)] = batch_features
            done += len(batch)
            log_ready()
            if done:
                progress.update(done)
    return features.cpu().numpy()


def _release_pages(images: np.ndarray) -> None:
    """Releases the pages of a memory map that have been read. Otherwise, the pages count as memory of this process."""
    if isinstance(images.base, mmap.mmap) and not images.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
        images.base.madvise(mmap.MADV_DONTNEED)
