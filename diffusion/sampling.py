"""Sampling from a trained model: DDPM (Ho et al. 2020), DDIM (Song et al. 2021, arXiv 2010.02502) and other solvers.

A model is a function of x_t [B, 3, H, W] and t int64 [B]. A model returns either its prediction, [B, 3, H, W], or the
prediction and then v, [B, 6, H, W]. The variance is computed from v (`diffusion.gaussian.p_mean_variance`).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.gaussian import NoiseSchedule, p_mean_variance, respaced
from diffusion.paths import NoisePath
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


def trailing_timesteps(timesteps: int, steps: int) -> Tensor:
    """Returns evenly spaced timesteps that start at T - 1 (Lin et al. 2023, arXiv 2305.08891, "trailing").

    Args:
        timesteps: T of the path.
        steps: number of timesteps to return.

    Returns:
        timesteps in the order of use, noisiest first, int64 [steps].

    Raises:
        ValueError: if `steps` is not in 1..T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}, but must be between 1 and {timesteps}, the number of timesteps")
    return (timesteps - torch.arange(steps, dtype=torch.float64) * (timesteps / steps)).round().long() - 1


def ddim_sample(model: Denoiser, schedule: NoisePath, latents: Tensor, steps: int) -> Tensor:
    """Samples images by DDIM with eta = 0. Arguments, result [B, 3, H, W] and errors are those of `ode_sample`."""
    return ode_sample(model, schedule, latents, steps)


@torch.inference_mode()
def ode_sample(model: Denoiser, schedule: NoisePath, latents: Tensor, steps: int, method: str = "ddim") -> Tensor:
    """Samples images by a deterministic sampler. Each evaluation of the model clips the predicted x_0 to [-1, 1].

    A variance-preserving path uses the timesteps of `ddim_timesteps`, any other path those of `trailing_timesteps`.

    Args:
        model: see the top of this module.
        schedule: path that the model was trained on.
        latents: standard normal numbers, [B, 3, H, W].
        steps: number of steps.
        method: see `trajectory`.

    Returns:
        images in [-1, 1], [B, 3, H, W]: the x_0 that is predicted in the last step.

    Raises:
        ValueError: if the number of steps is not possible.
    """
    preserving = isinstance(schedule, NoiseSchedule)
    used = (ddim_timesteps if preserving else trailing_timesteps)(schedule.timesteps, steps)
    x = latents if preserving else latents * schedule.sigma[used[0]].item()
    return deque(trajectory(model, schedule, x, used.tolist(), method), maxlen=1)[0]


def trajectory(
    model: Denoiser, schedule: NoisePath, x: Tensor, used: Sequence[int], method: str = "ddim", clip: bool = True
) -> Iterator[Tensor]:
    """Yields x after each step of a deterministic sampler. The last x is x_0.

    All methods move x along predicted x_0 and epsilon: x' = alpha' x_0 + sigma' epsilon.

    - "ddim": both are predicted from x (Song et al. 2021, eq. 12, eta = 0). For a flow, this is Euler's method.
    - "heun": the step is averaged with that of the predictions from x' (Karras et al. 2022, algorithm 1).
    - "dpm": DPM-Solver++(2M): x_0 is extrapolated linearly in ln(alpha / sigma) from the last two predictions, to the
      middle of the step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The last step, to sigma = 0, is that of DDIM.

    Args:
        model: see the top of this module.
        schedule: path that the model was trained on.
        x: x at the first timestep, [B, 3, H, W].
        used: timesteps in the order of use, noisiest first.
        method: "ddim", "heun" or "dpm".
        clip: whether the predicted x_0 is clipped to [-1, 1].
    """
    log_ratio, schedule = (0.5 * schedule.snr.log()).tolist(), schedule.to(x.device)

    def predicted(x: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        t = _repeated(timestep, x)
        x_start = schedule.predict_x_start(model(x, t)[:, : x.shape[1]], x, t)
        if clip:
            x_start = x_start.clamp(-1, 1)
        # Recomputed from the clipped x_0: the model's epsilon belongs to the unclipped x_0.
        return x_start, schedule.predict_epsilon(x_start, x, t)

    def factors(timestep: int) -> tuple[Tensor, Tensor]:
        return schedule.factors(_repeated(timestep, x), x)

    before: tuple[Tensor, float] | None = None  # the previous prediction of x_0, and the length of the previous step
    for now, after in pairwise(used):
        x_start, epsilon = predicted(x, now)
        (alpha, sigma), length = factors(after), log_ratio[after] - log_ratio[now]
        if method == "dpm":
            latest = x_start
            if before:
                x_start = x_start + length / (2 * before[1]) * (x_start - before[0])
                epsilon = schedule.predict_epsilon(x_start, x, _repeated(now, x))
            before = latest, length
        moved = alpha * x_start + sigma * epsilon
        if method == "heun":
            then_x_start, then_epsilon = predicted(moved, after)
            alpha_now, sigma_now = factors(now)
            moved = (
                x
                + (alpha - alpha_now) * (x_start + then_x_start) / 2
                + (sigma - sigma_now) * (epsilon + then_epsilon) / 2
            )
        x = moved
        yield x
    yield predicted(x, used[-1])[0]


@torch.inference_mode()
def ddpm_sample(
    model: Denoiser, schedule: NoisePath, latents: Tensor, steps: int, noise: Callable[[int], Tensor]
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
        ValueError: if the schedule has no posterior, or if `steps` is not in 2..T.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError("DDPM needs the posterior of a variance-preserving noise schedule")
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
