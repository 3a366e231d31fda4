"""The operations of a net that have two implementations.

`diffusion.nets.plain` consists of functions of torch, and runs on CPUs, and on GPUs without Triton.
`diffusion.nets.fused` consists of Triton kernels that pass over the memory of a GPU as rarely as possible. Both compute
the same formulas.
"""

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.nets.activation import Activation


@functools.cache
def implementation(device_type: str) -> ModuleType:
    """Returns `diffusion.nets.fused` for "cuda" if Triton can compile kernels, otherwise `diffusion.nets.plain`."""
    from diffusion.nets import plain

    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return plain
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return plain  # too few registers, and no bf16
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # On Debian, the default scheme may name a directory that does not contain the headers.
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    headers = any(Path(sysconfig.get_path("include", scheme), "Python.h").exists() for scheme in schemes)
    if not (compiler and headers):
        missing = "Python's headers" if compiler else "a C compiler"
        logging.getLogger(__name__).warning("Triton needs %s: install it, or the net is slow on the GPU", missing)
        return plain
    from diffusion.nets import fused

    return fused


def convolution(module: Any, x: Tensor) -> Activation:
    """Returns the convolution of images x [N, C, H, W] by a `torch.nn.Conv2d`."""
    bias, later = split_bias(module)
    return Activation(F.conv2d(x, module.weight, bias, module.stride, module.padding), later)


def split_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Decides where the bias of a convolution module is added.

    Returns:
        the bias [C] for the convolution itself, and the bias [C] for the `Activation` of the result. At most one of the
        two is not None.
    """
    return implementation(module.weight.device.type).split_bias(module)


def with_sums(x: Activation) -> Activation:
    """Returns x with its sums if norms need them, so that several norms of x do not compute them again."""
    return implementation(x.values.device.type).with_sums(x)


def norm(
    module: nn.GroupNorm,
    parts: Sequence[Activation],
    time: Tensor | None = None,
    silu: bool = False,
    resample: str = "",
) -> tuple[Tensor, tuple[Activation, ...]]:
    """Returns act(norm(x) (1 + scale) + shift), where act is SiLU or the identity, and x for a skip connection.

    Args:
        module: weight, bias and number of groups of the norm (Wu & He 2018, arXiv 1803.08494).
        parts: x in one or two parts, which have different channels of the same images [N, C, H, W].
        time: scale and then shift of each channel, [N, 2C]; None for 0.
        silu: whether act is SiLU.
        resample: how both results change their resolution: "halved" (means of 2x2 pixels), "doubled" (each pixel 2x2
            times) or "" (no change). Only x in one part can change its resolution.

    Returns:
        the result [N, C, H', W'], and x in one or several parts for `residual`.
    """
    return implementation(module.weight.device.type).norm(module, parts, time, silu, resample)


def residual(skip: nn.Module, parts: Sequence[Activation], h: Activation) -> Activation:
    """Returns skip(x) + h.

    Args:
        skip: 1x1 convolution, or `torch.nn.Identity`.
        parts: x, as `norm` returned it.
        h: images [N, C, H, W].
    """
    return implementation(h.values.device.type).residual(skip, parts, h)


def projections(layers: Sequence[nn.Sequential], embedding: Tensor) -> Sequence[Tensor]:
    """Returns the projection of the timestep embedding by each of several layers.

    Args:
        layers: SiLU and then a linear layer of the embedding.
        embedding: timestep embedding, [N, E].

    Returns:
        a tensor [N, F] for each layer, where F is the number of outputs of the layer.
    """
    return implementation(embedding.device.type).projections(layers, embedding)
