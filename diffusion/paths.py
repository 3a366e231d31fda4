"""Paths from images to noise, what a net predicts on a path, and in which space its loss is.

A path is two tables alpha and sigma, float64 [T], with x_t = alpha_t x_0 + sigma_t epsilon. Timestep t = 0 has the
least noise. A prediction is two tables a and b, [T]: the target of the net is y = a_t x_0 + b_t epsilon. `PATHS` and
`PREDICTIONS` map names to functions that return such pairs of tables. With d = a sigma - b alpha, the output F of a net
that predicts y gives

    x_0 = (sigma F - b x_t) / d,    epsilon = (a x_t - alpha F) / d.

So a squared error of x_0, epsilon or the velocity is |F - y|^2 times a factor. docs/mathematics.md derives this.
"""

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from diffusion.errors import InputError

Pair = tuple[Tensor, Tensor]


def flow(timesteps: int, shift: float) -> Pair:
    """Returns alpha and sigma of a straight path, each [T]: alpha = 1 - sigma (Liu et al. 2022, Lipman et al. 2022).

    Timestep t is the middle u = (t + 1/2) / T of an interval of time, and sigma = shift u / (1 + (shift - 1) u) (Esser
    et al. 2024, arXiv 2403.03206, eq. 23).
    """
    u = (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps
    sigma = shift * u / (1 + (shift - 1) * u)
    return 1 - sigma, sigma


def karras(timesteps: int, min: float, max: float, rho: float) -> Pair:
    """Returns alpha = 1 and the noise levels from `min` to `max`, each [T] (Karras et al. 2022, eq. 5)."""
    share = torch.linspace(0, 1, timesteps, dtype=torch.float64)
    sigma = (min ** (1 / rho) + share * (max ** (1 / rho) - min ** (1 / rho))) ** rho
    return torch.ones_like(sigma), sigma


PATHS: dict[str, Callable[..., Pair]] = {"flow": flow, "karras": karras}


def epsilon(alpha: Tensor, sigma: Tensor) -> Pair:
    """Returns a = 0 and b = 1, each [T]: the net predicts the noise (Ho et al. 2020)."""
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def x_start(alpha: Tensor, sigma: Tensor) -> Pair:
    """Returns a = 1 and b = 0, each [T]: the net predicts the image (Ho et al. 2020, sec. 3.2)."""
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def v(alpha: Tensor, sigma: Tensor) -> Pair:
    """Returns a = -sigma and b = alpha, each [T] (Salimans & Ho 2022, arXiv 2202.00512)."""
    return -sigma, alpha


def velocity(alpha: Tensor, sigma: Tensor) -> Pair:
    """Returns a = -1 and b = 1, each [T]: the derivative of x_t with respect to sigma on a straight path.

    Source: Lipman et al. 2022, arXiv 2210.02747. Code with alpha = t predicts the same with the opposite sign.
    """
    return -torch.ones_like(alpha), torch.ones_like(alpha)


def edm(alpha: Tensor, sigma: Tensor, data_std: float) -> Pair:
    """Returns a and b, each [T], of the target (x_0 - c_skip x_t) / c_out (Karras et al. 2022, table 1).

    For data with the standard deviation `data_std`, the target has the variance 1 and is uncorrelated with x_t.
    """
    std = edm_std(alpha, sigma, data_std)
    return sigma / (data_std * std), -data_std * alpha / std


def edm_std(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    """Returns the standard deviation of x_t for data with `data_std`, [T]: 1 / c_in of Karras et al. 2022."""
    return (alpha.square() * data_std**2 + sigma.square()).sqrt()


PREDICTIONS: dict[str, Callable[..., Pair]] = {
    "epsilon": epsilon, "x_start": x_start, "v": v, "velocity": velocity, "edm": edm
}  # fmt: skip


class NoisePath:
    """A path, what the net predicts on it, and the space of its loss.

    Args:
        alpha: factor of x_0 in x_t, [T], above 0.
        sigma: factor of epsilon in x_t, [T], above 0.
        predict: function of alpha and sigma that returns a and b, such as a value of `PREDICTIONS`.
        loss_in: space of the loss: "prediction", "epsilon", "x_start" or "velocity".

    Attributes:
        timesteps: number of timesteps T.
        alpha, sigma: as above, float64 [T]. All attributes below are also float64 [T].
        a, b, d: tables of the prediction, with d = a sigma - b alpha.
        snr: signal-to-noise ratio, (alpha / sigma)^2.
        alphas_cumprod: share of x_0 in the variance of x_t, SNR / (1 + SNR).
        epsilon_factor: |epsilon - predicted epsilon|^2 / |F - y|^2.
        loss_factor: squared error in the space of the loss / |F - y|^2.

    Raises:
        InputError: if a factor is not above 0, or if x_0 cannot be computed from the prediction (d = 0).
    """

    def __init__(
        self, alpha: Tensor, sigma: Tensor, predict: Callable[..., Pair] = epsilon, loss_in: str = "prediction"
    ):
        self.timesteps, self.alpha, self.sigma = len(alpha), alpha, sigma
        self.predict, self.loss_in = predict, loss_in
        self.a, self.b = predict(alpha, sigma)
        self.d = self.a * sigma - self.b * alpha
        usable = (alpha > 0) & (sigma > 0) & (self.d != 0) & (alpha + sigma + self.d).isfinite()
        if not usable.all():
            t = int((~usable).nonzero()[0])
            raise InputError(
                f"x_0 cannot be computed from x_t and the prediction at t = {t}, where alpha is {alpha[t]:.3g}, sigma "
                f"{sigma[t]:.3g} and d = a sigma - b alpha {self.d[t]:.3g}: use less extreme parameters"
            )
        self.snr = (alpha / sigma).square()
        self.alphas_cumprod = self.snr / (1 + self.snr)
        error = {"prediction": self.d, "epsilon": alpha, "x_start": sigma, "velocity": alpha + sigma}
        self.epsilon_factor = (error["epsilon"] / self.d).square()
        self.loss_factor = (error[loss_in] / self.d).square()

    def to(self, device: torch.device | str) -> Self:
        """Returns a copy with all tables on `device`. Timesteps on `device` index tables without synchronization."""
        moved = copy.copy(self)
        moved.__dict__.update({k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})
        return moved

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t for the given x_0 (`x_start`) and noise. Images [B, C, H, W], t [B]."""
        return gather(self.alpha, t, x_start) * x_start + gather(self.sigma, t, x_start) * noise

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns y, what the net should predict for x_t. Images [B, C, H, W], t [B]."""
        return gather(self.a, t, x_start) * x_start + gather(self.b, t, x_start) * noise

    def predict_x_start(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns x_0 for the given x_t and output of the net. Images [B, C, H, W], t [B]."""
        return gather(-self.b / self.d, t, x_t) * x_t + gather(self.sigma / self.d, t, x_t) * output

    def predict_epsilon(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the noise in x_t for the given x_0 (`q_sample` solved for the noise). Images [B, C, H, W], t [B]."""
        return (gather(1 / self.alpha, t, x_t) * x_t - x_start) / gather(self.sigma / self.alpha, t, x_t)

    def factors(self, t: Tensor, like: Tensor) -> Pair:
        """Returns alpha and sigma at t for samplers, each [B, 1, 1, 1], as `gather` does."""
        return gather(self.alpha, t, like), gather(self.sigma, t, like)

    @property
    def untrained_mse(self) -> float:
        """Bound of the mean |y|^2 for images in [-1, 1]: the mse of a net whose output is 0, at the worst timestep."""
        return (self.a.square() + self.b.square()).max().item()


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Returns the values of a table [T] at timesteps t [B] as a tensor [B, 1, ..., 1].

    The tensor has the number of dimensions, the dtype and the device of `like`.
    """
    return table.to(like.device)[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
