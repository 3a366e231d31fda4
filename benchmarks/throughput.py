"""Training and sampling speed of our U-Net, compared with the UNet2DModel of diffusers with the same architecture.

    pip install diffusers
    python -m benchmarks.throughput openmoji [--seconds 10] [--rounds 3] [--csv throughput.csv]
    python -m benchmarks.throughput openmoji --profile

Architecture, batch size and precision are those of a study. Ours is the complete training step of a run: images,
timesteps, noise, loss, optimiser and EMA. Theirs is the loop of diffusers' example of unconditional training: a
shuffled data loader, DDPMScheduler, mse of the noise, AdamW, EMAModel. Theirs does not learn the variance, which is
slightly less work. Each measurement runs in its own process; ours and theirs alternate. The table shows medians over
the rounds; the ratio is the median of the ratios of the rounds.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergence.jobs import use_torch
from convergence.snakefile import set_environment
from convergence.study_file import load_experiment
from diffusion.config import RunConfig
from diffusion.devices import MAX_IMAGES_ON_CPU

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 2048
COLUMNS = ["net", "work", "images_per_second", "ratio", "share_of_peak", "gigabytes", "first_step_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name of a file in experiments/")
    parser.add_argument("--batch", type=int, help="images per training step, default: those of the study")
    parser.add_argument("--sample-batch", type=int, help="images sampled at the same time, default: those of the study")
    parser.add_argument("--seconds", type=float, default=10, help="duration of each measurement, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parser.add_argument("--profile", action="store_true", help="profile our training step instead")
    parser.add_argument("--one", nargs=2, metavar=("NET", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        print(profile(options))
    elif options.one:
        print(json.dumps(measure(WORK[tuple(options.one)], options)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure both networks alternately and print the medians as a table."""
    import pandas as pd

    from diffusion.nets.size import unet_size

    set_environment(str(ROOT))
    run = settings(options.study, options.batch)
    forward = 2 * unet_size(run.model, run.dataset.image_size).multiply_adds
    peak = peak_flops(run)
    rows = []
    for work, flops in (("train", 3 * forward), ("sample", load(options.study).sample.steps * forward)):
        measured: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
        for _ in range(options.rounds):
            for net, results in measured.items():
                command = [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:], "--one", net, work]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        medians = {
            net: {key: statistics.median(result[key] for result in results) for key in results[0]}
            for net, results in measured.items()
        }
        ours, theirs = ([result["images_per_second"] for result in results] for results in measured.values())
        ratios = {"ours": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), "diffusers": 1.0}
        for net, median in medians.items():
            share = median["images_per_second"] * flops / peak
            rows.append({"net": net, "work": work, **median, "ratio": ratios[net], "share_of_peak": share})
    table = pd.DataFrame(rows)[COLUMNS]
    print(f"{options.study}: batch {run.train.batch_size}, {device_name()}, torch {torch.__version__}, ", end="")
    print(f"{forward / 1e9:.3g} GFLOP forward, peak {peak / 1e12:.3g} TFLOP/s (a matrix product in this run)\n")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    if options.csv:
        table.to_csv(options.csv, index=False)


def load(study: str) -> Any:
    return load_experiment(ROOT / "experiments" / f"{study}.yaml")


def settings(study: str, batch: int | None) -> RunConfig:
    """The settings of the study's first arm, with another batch size if one is given."""
    experiment = load(study)
    run = experiment.run(next(iter(experiment.arms)))
    if batch:
        train = run.train.model_copy(update={"batch_size": batch, "micro_batch": None})
        run = run.model_copy(update={"train": train})
    return run


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(precision: str) -> torch.autocast:
    """The context in which the net of diffusers computes in the precision of a study."""
    low = precision == "bf16" or (precision == "auto" and device() == "cuda")
    return torch.autocast(device(), torch.bfloat16, enabled=low)


def device_name() -> str:
    return torch.cuda.get_device_name() if device() == "cuda" else f"{os.cpu_count()} x {platform.machine()}"


def sample_batch(options: argparse.Namespace) -> int:
    """Images that are sampled at the same time."""
    chosen = options.sample_batch or load(options.study).sample.batch_size
    return chosen or (256 if device() == "cuda" else MAX_IMAGES_ON_CPU)


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def peak_flops(run: RunConfig) -> float:
    """Operations per second of a large matrix product, with the threads and the precision of the run."""
    torch.set_num_threads(run.train.threads)
    side = 8192 if device() == "cuda" else 2048
    best = float("inf")
    with autocast(run.train.precision):
        # The product has the autocast type, so that the measurement includes no cast.
        a = torch.randn(side, side, device=device()) @ torch.eye(side, device=device())
        for _ in range(5):
            synchronize()
            start = time.perf_counter()
            a @ a
            synchronize()
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def measure(setup: Callable[[RunConfig, argparse.Namespace], Callable[[], int]], options: Any) -> dict[str, float]:
    """Measure the first step including the setup, then the steps of some seconds; needs its own process."""
    run = settings(options.study, options.batch)
    use_torch(run.train.threads, int(device() == "cuda"))
    start = time.perf_counter()
    step = setup(run, options)
    step()
    synchronize()
    first = time.perf_counter() - start
    per_second = rate(step, options.seconds)
    memory = (
        torch.cuda.max_memory_allocated()
        if device() == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {
        "images_per_second": per_second,
        "gigabytes": memory / 1e9,
        "first_step_seconds": first,
    }


def rate(step: Callable[[], int], seconds: float) -> float:
    """Images per second of a step, which returns its number of images, measured for about this many seconds."""
    start = time.perf_counter()
    step()
    synchronize()
    steps = max(3, round(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    done = sum(step() for _ in range(steps))
    # The loop itself does not wait for the GPU.
    synchronize()
    return done / (time.perf_counter() - start)


def random_images(run: RunConfig) -> np.ndarray:
    # At least one complete batch, because the data loader drops incomplete ones.
    count, size = max(IMAGES, run.train.batch_size), run.dataset.image_size
    return np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)


def ours_train(run: RunConfig, options: argparse.Namespace) -> Callable[[], int]:
    from diffusion.training.state import TrainState, train_step

    state = TrainState(run, 0, device())
    batches = state.batches(random_images(run))

    def step() -> int:
        train_step(state, batches)
        return run.train.batch_size

    return step


def ours_sample(run: RunConfig, options: argparse.Namespace) -> Callable[[], int]:
    from diffusion.checkpoints import Checkpoint, sample_checkpoint
    from diffusion.training.state import untrained

    model, schedule = untrained(run, 0)
    model = model.to(device()).to(memory_format=torch.channels_last).eval()
    checkpoint = Checkpoint(model, schedule, run.dataset.image_size)
    sample = load(options.study).sample
    count = sample_batch(options)
    once = sample.model_copy(update={"images": count, "batch_size": count})

    def step() -> int:
        sample_checkpoint(checkpoint, once, device())
        return count

    return step


def their_net(run: RunConfig) -> Any:
    """The U-Net of diffusers with the channels, blocks, attention and resampling of ours."""
    from diffusers import UNet2DModel

    model, size = run.model, run.dataset.image_size
    attention = [size >> level in model.attention_resolutions for level in range(len(model.channel_mult))]
    resample = "resnet" if model.resblock_updown else "conv"
    # Blocks without attention have a fixed type of resampling; blocks with attention support both types.
    plain = "Resnet{}sampleBlock2D" if model.resblock_updown else "{}Block2D"
    return UNet2DModel(
        sample_size=size,
        layers_per_block=model.res_blocks,
        block_out_channels=[model.channels * multiplier for multiplier in model.channel_mult],
        down_block_types=["AttnDownBlock2D" if here else plain.format("Down") for here in attention],
        up_block_types=["AttnUpBlock2D" if here else plain.format("Up") for here in reversed(attention)],
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="scale_shift" if model.scale_shift_norm else "default",
        attention_head_dim=model.head_channels,
        dropout=model.dropout,
    ).to(device())


def diffusers_train(run: RunConfig, options: argparse.Namespace) -> Callable[[], int]:
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    model, scheduler, train = their_net(run).train(), DDPMScheduler(run.diffusion.timesteps), run.train
    ema = EMAModel(model.parameters(), decay=train.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    images = torch.from_numpy(random_images(run)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def batches() -> Iterator[Tensor]:
        while True:
            yield from torch.utils.data.DataLoader(images, train.batch_size, shuffle=True, drop_last=True)

    source = batches()

    def step() -> int:
        micro = train.micro_batch or train.batch_size
        optimizer.zero_grad()
        for x_start in next(source).to(device()).split(micro):
            noise = torch.randn_like(x_start)
            t = torch.randint(run.diffusion.timesteps, (len(x_start),), device=x_start.device)
            with autocast(train.precision):
                output = model(scheduler.add_noise(x_start, noise, t), t).sample
            (F.mse_loss(output.float(), noise) * len(x_start) / train.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        return train.batch_size

    return step


def diffusers_sample(run: RunConfig, options: argparse.Namespace) -> Callable[[], int]:
    from diffusers import DDIMScheduler

    model, scheduler, sample = their_net(run).eval(), DDIMScheduler(run.diffusion.timesteps), load(options.study).sample
    scheduler.set_timesteps(sample.steps)
    count, size = sample_batch(options), run.dataset.image_size

    @torch.inference_mode()
    def step() -> int:
        x = torch.randn(count, 3, size, size, device=device())
        for t in scheduler.timesteps:
            with autocast(sample.precision):
                output = model(x, t).sample
            x = scheduler.step(output, t, x).prev_sample
        return count

    return step


WORK = {
    ("ours", "train"): ours_train,
    ("ours", "sample"): ours_sample,
    ("diffusers", "train"): diffusers_train,
    ("diffusers", "sample"): diffusers_sample,
}


def profile(options: argparse.Namespace) -> str:
    """Profile of our training step, by operation."""
    from torch.profiler import ProfilerActivity

    run = settings(options.study, options.batch)
    use_torch(run.train.threads, int(device() == "cuda"))
    step = ours_train(run, options)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device() == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(10):
            step()
        synchronize()
    return profiler.key_averages().table(sort_by=f"self_{device()}_time_total", row_limit=40, max_name_column_width=80)


if __name__ == "__main__":
    main()
