"""Computes the size of any net. Torch is imported only to measure a net of one's own."""

from functools import cache

from diffusion.config import Model, NamedNet, Net, with_learn_sigma
from diffusion.errors import InputError
from diffusion.nets.size import Size, dit_size, unet_size

MAX_BYTES = 300 * 10**9  # memory of the largest GPUs
NUMBER_BYTES = 4
NUMBERS_PER_PARAMETER = 4  # weights, their moving average, and the two moments of AdamW


@cache
def net_size(model: Net, image_size: int) -> Size:
    """Returns the size of the net that `model` describes, for images of `image_size` x `image_size` pixels.

    Raises:
        InputError: if a net of one's own cannot be computed.
    """
    if isinstance(model, Model):
        return unet_size(model, image_size)
    return dit_size(model.dit, image_size) if model.dit else _measured(model, image_size)


def check_net_size(model: Net, image_size: int) -> None:
    """Checks that the memory of the largest GPUs is sufficient to train a net with one image at a time.

    Raises:
        InputError: if the net needs more memory, or a net of one's own cannot be computed.
    """
    size = net_size(model, image_size)
    memory = NUMBER_BYTES * (NUMBERS_PER_PARAMETER * size.parameters + size.activations)
    if memory > MAX_BYTES:
        keys = "channels, channel_mult, res_blocks" if isinstance(model, Model) else "its width, its depth"
        raise InputError(
            f"a net of {size.parameters:,} parameters needs {memory / 1e9:,.0f} GB, but no GPU has more than "
            f"{MAX_BYTES / 1e9:.0f} GB: lower {keys} or image_size"
        )


def _measured(model: NamedNet, image_size: int) -> Size:
    """Returns the size of a net, counted while the net is called on tensors that have no memory (meta device).

    Raises:
        InputError: if the net cannot be built or called, or its output does not have the shape of images.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    from diffusion.build import build_net

    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    name, parameters = model.chosen
    learn_sigma = bool(parameters["learn_sigma"])  # auto: the larger net
    try:
        with torch.device("meta"):
            net, x = (
                build_net(image_size, with_learn_sigma(model, learn_sigma)),
                torch.empty(1, 3, image_size, image_size),
            )
            with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
                output = net(x, torch.zeros(1, dtype=torch.int64))
    except InputError:
        raise
    except Exception as error:  # of any type: the class is not part of this project
        raise InputError(f"{name}: {' '.join(str(error).split())}: change its keys or its class") from None
    wanted = [1, 6 if learn_sigma else 3, image_size, image_size]
    if list(output.shape) != wanted:
        raise InputError(f"{name}: its output has the shape {list(output.shape)}, not {wanted}: change its class")
    weights = {parameter.untyped_storage()._cdata: parameter.numel() for parameter in net.parameters()}
    activations = sum(
        tensor.untyped_storage().size() // tensor.element_size() for key, tensor in kept.items() if key not in weights
    )
    return Size(sum(weights.values()), counter.get_total_flops() // 2, activations)
