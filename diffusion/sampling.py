"""Sampling from a trained model: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021, arXiv 2010.02502).

A model is called as model(x, t) with x [B, 3, H, W] and t [B], and gives epsilon with or without the variance's v.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, gather, p_mean_variance, respaced
from diffusion.streams import generator

Denoiser = Callable[[Tensor, Tensor], Tensor]


def ddim_timesteps(timesteps: int, steps: int) -> Tensor:
    """Every (T / steps)-th timestep from 0, in the order of use, noisiest first. int64 [steps].

    Raises:
        ValueError: no whole stride gives that many timesteps.
    """
    for stride in range(1, timesteps + 1):
        chosen = torch.arange(0, timesteps, stride)
        if len(chosen) == steps:
            return chosen.flip(0)
    raise ValueError(f"no whole stride through {timesteps} timesteps takes {steps} steps")


def ddpm_timesteps(timesteps: int, steps: int) -> Tensor:
    """Timesteps spread evenly from 0 to T - 1, both included, in the order of use. int64 [steps].

    Raises:
        ValueError: steps is not in 2..T.
    """
    if not 2 <= steps <= timesteps:
        raise ValueError(f"{steps} steps do not fit {timesteps} timesteps: choose 2 to {timesteps}")
    return torch.linspace(0, timesteps - 1, steps, dtype=torch.float64).round().long().flip(0)


@torch.inference_mode()
def ddim_sample(model: Denoiser, schedule: NoiseSchedule, latents: Tensor, steps: int) -> Tensor:
    """Deterministic DDIM (eta = 0), x_0 clipped at every step (Song et al. 2021, eq. 12).

    Args:
        schedule: that the model was trained with.
        latents: x_T, standard normal, [B, 3, H, W].
        steps: number of model evaluations; see `ddim_timesteps`.

    Returns:
        images [B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: as `ddim_timesteps`.
    """
    used = ddim_timesteps(schedule.timesteps, steps)
    coarse = respaced(schedule, used.flip(0)).to(latents.device)
    x = latents
    for step, stamp in enumerate(used.tolist()):
        t, i = _repeated(stamp, x), _repeated(steps - 1 - step, x)
        x_start = p_mean_variance(coarse, model(x, t), x, i).pred_x_start
        # Clipping x_0 changes the noise that the image implies.
        epsilon = coarse.predict_epsilon(x_start, x, i)
        a_prev = gather(coarse.alphas_cumprod_prev, i, x)
        x = a_prev.sqrt() * x_start + (1 - a_prev).sqrt() * epsilon
    return x


@torch.inference_mode()
def ddpm_sample(
    model: Denoiser, schedule: NoiseSchedule, latents: Tensor, steps: int, noise: Callable[[int], Tensor]
) -> Tensor:
    """Ancestral sampling with the model's variance, x_0 clipped at every step (Ho et al. 2020, algorithm 2).

    Args:
        schedule: that the model was trained with.
        latents: x_T, standard normal, [B, 3, H, W].
        steps: number of model evaluations; see `ddpm_timesteps`.
        noise: gives the standard normal noise [B, 3, H, W] of step 0..steps-1 (none is added in the last).

    Returns:
        images [B, 3, H, W], nearly in [-1, 1].

    Raises:
        ValueError: as `ddpm_timesteps`.
    """
    used = ddpm_timesteps(schedule.timesteps, steps)
    coarse = respaced(schedule, used.flip(0)).to(latents.device)
    x = latents
    for step, stamp in enumerate(used.tolist()):
        t, i = _repeated(stamp, x), _repeated(steps - 1 - step, x)
        mean, log_variance, _ = p_mean_variance(coarse, model(x, t), x, i)
        x = mean + (0.5 * log_variance).exp() * noise(step) if step < steps - 1 else mean
    return x


def latents(seed: int, indices: range, shape: tuple[int, int, int], stream: str = "latents") -> Tensor:
    """Standard normal latents of some samples, each dependent on (seed, its index) alone.

    float32 [B, *shape], on the CPU.

    Args:
        shape: of one, (C, H, W).
        stream: name of the random stream (`diffusion.streams`).
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, stream, index)) for index in indices])


def _repeated(t: int, x: Tensor) -> Tensor:
    # Filled on the device: a copy from the host would wait for it.
    return torch.full((len(x),), t, device=x.device)
