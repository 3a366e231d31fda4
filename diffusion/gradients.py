"""Gradients of the hybrid loss of a net."""

import torch
from torch import Tensor, nn

from diffusion.devices import CudaGraphed, compute_copy
from diffusion.losses import hybrid_loss
from diffusion.paths import NoisePath


class LossGradients:
    """Computes gradients of the hybrid loss (Nichol & Dhariwal 2021) with respect to the parameters of a net.

    On a GPU, the computation is one CUDA graph, except for a net with dropout, whose random masks are not captured.

    Args:
        model: net that is called with images [B, 3, H, W] and timesteps [B]. The object refers to this net: call
            `refresh` after its parameters have changed.
        schedule: path on which the net is trained, with what the net predicts.
        precision: "fp32", "bf16" or "auto" (see `diffusion.devices.compute_dtype`).
    """

    def __init__(self, model: nn.Module, schedule: NoisePath, precision: str):
        self.net = compute_copy(model, precision)
        self.parameters, self.copies = list(model.parameters()), list(self.net.parameters())
        self.schedule = schedule.to(self.parameters[0].device)
        # The other parameters are the same tensors in the net and in its copy.
        self.copied = [i for i, (p, c) in enumerate(zip(self.parameters, self.copies, strict=True)) if p is not c]
        self.dropout = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
        graphed = self.parameters[0].device.type == "cuda" and not self.dropout
        self.compute = CudaGraphed(self._compute) if graphed else self._compute
        self.compute_losses = CudaGraphed(self._losses) if graphed else self._losses

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the parameters of the net to the copy that computes."""
        if self.copied:
            torch._foreach_copy_([self.copies[i] for i in self.copied], [self.parameters[i] for i in self.copied])

    def __call__(
        self, x_start: Tensor, noise: Tensor, t: Tensor, mse_weight: Tensor, vb_weight: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the gradients of the loss, one per parameter, and the mse and vb of each image, [2, B].

        mse and vb are the unweighted terms of the loss: the mean squared error of epsilon and the variational bound.
        The loss is the sum over the images of mse_weight * mse + vb_weight * vb. The next call may overwrite all
        results.

        Args:
            x_start: images, [B, 3, H, W].
            noise: epsilon, [B, 3, H, W].
            t: timesteps, [B].
            mse_weight: weight of the mse of each image, [B].
            vb_weight: weight of the vb of each image, [B].
        """
        *gradients, terms = self.compute(x_start, noise, t, mse_weight, vb_weight)
        return gradients, terms

    @torch.no_grad()
    def losses(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the mse and vb of each image, [2, B], as a call does, without gradients."""
        (terms,) = self.compute_losses(x_start, noise, t)
        return terms.clone()

    def _losses(self, x_start: Tensor, noise: Tensor, t: Tensor) -> list[Tensor]:
        x_t = self.schedule.q_sample(x_start, t, noise)
        losses = hybrid_loss(self.schedule, self.net(x_t, t).float(), x_start, x_t, t, noise)
        return [torch.stack([losses.mse, losses.vb])]

    def _compute(
        self, x_start: Tensor, noise: Tensor, t: Tensor, mse_weight: Tensor, vb_weight: Tensor
    ) -> list[Tensor]:
        (terms,) = self._losses(x_start, noise, t)
        mse, vb = terms
        loss = (mse_weight * mse + vb_weight * vb).sum()
        found = torch.autograd.grad(loss, self.copies)
        gradients = [_with_strides(g, p) for g, p in zip(found, self.parameters, strict=True)]
        if self.copied:
            wide = [torch.empty_like(self.parameters[i], requires_grad=False) for i in self.copied]
            torch._foreach_copy_(wide, [gradients[i] for i in self.copied])
            for i, gradient in zip(self.copied, wide, strict=True):
                gradients[i] = gradient
        return [*gradients, terms.detach()]


def _with_strides(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Gives the gradient of a 1x1 convolution the strides of its weight, which the fused optimizer needs.

    The memory is the same, because only dimensions of size 1 have other strides.
    """
    if gradient.shape[2:] != (1, 1):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())
