"""The values that pass from one operation of a net to the next."""

from typing import NamedTuple

from torch import Tensor


class Activation(NamedTuple):
    """Images (feature maps) in a net. A bias that is the same for all pixels may be stored separately.

    On a GPU, adding a bias to images takes as long as reading and writing them. A norm can add the bias while it reads
    the images. Therefore, the bias of each convolution is kept separate until a norm uses it.
    """

    values: Tensor
    """Images without the bias, [N, C, H, W]."""
    bias: Tensor | None = None
    """Bias of each channel, float32 [C] or [N, C]; None for 0."""
    sums: Tensor | None = None
    """Sums of the values and of their squares, if they are known (`diffusion.nets.kernels.sums`)."""

    def plus(self, shift: Tensor) -> "Activation":
        """Returns the images plus a shift of each channel, [N, C]."""
        if self.bias is None:
            return Activation(self.values + shift[:, :, None, None])
        return self._replace(bias=self.bias + shift)

    def with_bias(self) -> Tensor:
        """Returns the images including the bias, [N, C, H, W]."""
        return self.values if self.bias is None else self.values + self.bias.to(self.values.dtype)[..., None, None]
