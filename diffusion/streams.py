"""Named random streams. Draws from one stream do not change the numbers of another stream."""

import hashlib

import torch


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """Returns the seed of one stream at one step as a 63-bit integer, for example `stream_seed(0, "noise", 1200)`.

    The returned seed depends only on the arguments. Therefore, runs with equal seeds draw equal numbers in every
    stream, and a run can resume at any step.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    # torch accepts a signed 64-bit integer.
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns the random generator of one stream at one step.

    Equal arguments give equal random numbers. A CPU generator and a CUDA generator give different numbers.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, stream, step))
