"""Sampling from a trained model: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021, arXiv 2010.02502).

A model is a function of x_t [B, 3, H, W] and t int64 [B]. A model returns either epsilon, [B, 3, H, W], or epsilon and
then v, [B, 6, H, W]. The variance is computed from v (`diffusion.gaussian.p_mean_variance`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, gather, p_mean_variance, respaced
from diffusion.streams import stream_seed

Denoiser = Callable[[Tensor, Tensor], Tensor]


def ddim_timesteps(timesteps: int, steps: int) -> Tensor:
    """Returns the timesteps 0, s, 2s, ... below T, where s is the smallest integer stride that gives `steps` timesteps.

    Args:
        timesteps: T of the noise schedule.
        steps: number of timesteps to return.

    Returns:
        timesteps in the order of use, noisiest first, int64 [steps].

    Raises:
        ValueError: if no integer stride gives `steps` timesteps.
    """
    for stride in range(1, timesteps + 1):
        used = torch.arange(0, timesteps, stride)
        if len(used) == steps:
            return used.flip(0)
    raise ValueError(f"no integer stride through {timesteps} timesteps gives {steps} steps")


def ddpm_timesteps(timesteps: int, steps: int) -> Tensor:
    """Returns evenly spaced timesteps from 0 to T - 1 (inclusive), rounded to integers.

    Args:
        timesteps: T of the noise schedule.
        steps: number of timesteps to return.

    Returns:
        timesteps in the order of use, noisiest first, int64 [steps].

    Raises:
        ValueError: if `steps` is not in 2..T.
    """
    if not 2 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}, but must be between 2 and {timesteps}, the number of timesteps")
    return torch.linspace(0, timesteps - 1, steps, dtype=torch.float64).round().long().flip(0)


@torch.inference_mode()
def ddim_sample(model: Denoiser, schedule: NoiseSchedule, latents: Tensor, steps: int) -> Tensor:
    """Samples images by DDIM with eta = 0 (Song et al. 2021, eq. 12). Each step clips the predicted x_0 to [-1, 1].

    Args:
        model: see the top of this module.
        schedule: noise schedule that the model was trained with.
        latents: standard normal x_T, [B, 3, H, W].
        steps: number of model evaluations; see `ddim_timesteps`.

    Returns:
        images in [-1, 1], [B, 3, H, W].

    Raises:
        ValueError: if no integer stride through the timesteps gives `steps` steps.
    """
    used = ddim_timesteps(schedule.timesteps, steps)
    subset = respaced(schedule, used.flip(0)).to(latents.device)
    x = latents
    for step, timestep in enumerate(used.tolist()):
        t, i = _repeated(timestep, x), _repeated(steps - 1 - step, x)
        x_start = p_mean_variance(subset, model(x, t), x, i).pred_x_start
        # Recomputed from the clipped x_0: the model's epsilon belongs to the unclipped x_0.
        epsilon = subset.predict_epsilon(x_start, x, i)
        a_prev = gather(subset.alphas_cumprod_prev, i, x)
        x = a_prev.sqrt() * x_start + (1 - a_prev).sqrt() * epsilon
    return x


@torch.inference_mode()
def ddpm_sample(
    model: Denoiser, schedule: NoiseSchedule, latents: Tensor, steps: int, noise: Callable[[int], Tensor]
) -> Tensor:
    """Samples images by ancestral sampling (Ho et al. 2020, algorithm 2). Each step clips the predicted x_0 to [-1, 1].

    Args:
        model: see the top of this module. If the model returns v, the variance is computed from v.
        schedule: noise schedule that the model was trained with.
        latents: standard normal x_T, [B, 3, H, W].
        steps: number of model evaluations; see `ddpm_timesteps`.
        noise: function that returns standard normal noise [B, 3, H, W] for a step in 0..steps-2. The last step,
            steps - 1, adds no noise.

    Returns:
        images, [B, 3, H, W], approximately in [-1, 1].

    Raises:
        ValueError: if `steps` is not in 2..T.
    """
    used = ddpm_timesteps(schedule.timesteps, steps)
    subset = respaced(schedule, used.flip(0)).to(latents.device)
    x = latents
    for step, timestep in enumerate(used.tolist()):
        t, i = _repeated(timestep, x), _repeated(steps - 1 - step, x)
        mean, log_variance, _ = p_mean_variance(subset, model(x, t), x, i)
        x = mean + (0.5 * log_variance).exp() * noise(step) if step < steps - 1 else mean
    return x


def latents(seed: int, run_seed: int, indices: range, shape: tuple[int, int, int], stream: str = "latents") -> Tensor:
    """Returns standard normal latents. Each latent depends only on the two seeds, the stream and the sample's index.

    Args:
        seed: seed of the samples.
        run_seed: seed of the run whose net is sampled. Runs with different seeds have independent latents.
        indices: indices of the samples.
        shape: shape of one latent, (C, H, W).
        stream: name of the random stream (see `diffusion.streams`).

    Returns:
        latents, float32 [B, C, H, W], on the CPU. B is the number of indices.
    """
    drawn, generator = torch.empty(len(indices), *shape), torch.Generator()
    for latent, index in zip(drawn, indices, strict=True):
        latent.normal_(generator=generator.manual_seed(stream_seed(seed, f"{stream}/{run_seed}", index)))
    return drawn


def _repeated(t: int, x: Tensor) -> Tensor:
    # Filled on the device: a copy from the host would synchronize.
    return torch.full((len(x),), t, device=x.device)
