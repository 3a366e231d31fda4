"""Where a result comes from: code, versions, machine."""

import datetime
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusion.files import atomic_write

PACKAGES = ["torch", "torchvision", "torch-fidelity", "snakemake", "numpy", "scipy"]


def write_provenance(path: Path, device: str, **facts: Any) -> None:
    """Write the facts of a result, with commit (null outside git), host, device and versions, as JSON."""
    root = Path(__file__).resolve().parents[1]
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    content = facts | {
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "host": platform.node(),
        "device": device,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
