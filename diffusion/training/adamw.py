"""The optimizer AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

It calls the function that `torch.optim.AdamW` calls. That class is not used because it imports torch's compiler, which
takes as long as the import of torch itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

EPSILON = 1e-8


class AdamW:
    """AdamW, fused, with the default epsilon of torch.

    Args:
        parameters: tensors [...] that the optimizer changes in place.
        weight_decay: decoupled weight decay.
        betas: decays per step of the moving averages of the gradient and of its square, in [0, 1).

    Attributes:
        state: parameter -> number of steps, float32 [], and the moving averages of the gradient and of its square, of
            the shape of the parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float, betas: tuple[float, float]):
        self.weight_decay, self.betas = weight_decay, betas
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }
            for p in parameters
        }

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Changes the parameters by one step.

        Args:
            gradients: gradient of each parameter, of its shape.
            learning_rate: learning rate of this step.
        """
        steps, averages, squares = (
            [moments[name] for moments in self.state.values()] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        adamw(
            list(self.state), list(gradients), averages, squares, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=self.betas[0], beta2=self.betas[1], eps=EPSILON, lr=learning_rate, weight_decay=self.weight_decay,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict of tensors [...], which later steps change. Parameters are numbered from 0."""
        return {"state": dict(enumerate(self.state.values()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the state by `state`, which `state_dict` returned. The tensors [...] are not copied."""
        self.state = {p: {**moments} for p, moments in zip(self.state, state["state"].values(), strict=True)}
