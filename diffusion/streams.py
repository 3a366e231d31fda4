"""Random streams: each is named, and none depends on what another drew."""

import hashlib

import torch


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """The 63-bit integer that seeds one stream at one step, e.g. `stream_seed(0, "noise", 1200)`.

    Arms of equal seed share every stream, and a run can resume at any step, because nothing else enters.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    # torch takes a signed 64-bit integer.
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one stream at one step. Equal arguments give equal numbers on one kind of device; CPU and CUDA
    differ."""
    return torch.Generator(device).manual_seed(stream_seed(seed, stream, step))
