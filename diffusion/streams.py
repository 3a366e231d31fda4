"""Named random streams. The numbers of one stream do not depend on the draws of another."""

import hashlib

import torch


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """Returns the seed of one stream at one step, e.g. `stream_seed(0, "noise", 1200)`, as a 63-bit integer.

    It depends only on the arguments. Therefore, runs with equal seeds share every stream, and a run can resume at any
    step.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    # torch accepts a signed 64-bit integer.
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns the random generator of one stream at one step.

    Equal arguments give equal numbers, except that CPU and CUDA generators give different ones.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, stream, step))
