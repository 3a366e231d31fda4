"""Training speed of the reference: the research code of P2 weighting (Choi et al. 2022), with its own functions.

    git clone https://github.com/jychoi118/P2-weighting
    python -m benchmarks.reference P2-weighting [--batch 256] [--micro-batch 64] [--seconds 10]

The net, the noise schedule and the batch size are those of a study; the precision is fp16 with a scaled loss on a GPU,
and fp32 on a CPU. The step is that of the reference's TrainLoop, on random images: forward and backward passes in
micro-batches, AdamW and EMA. It runs in one process, without mpi4py and blobfile.
"""

import argparse
import importlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed

from benchmarks.throughput import device, measure, random_images
from diffusion.config import RunConfig


def of_reference(name: str) -> Any:
    return importlib.import_module(f"guided_diffusion.{name}")


def recipe(run: RunConfig) -> dict[str, Any]:
    """Returns the settings of a run in the reference's names, for `create_model_and_diffusion`."""
    model = run.model
    return {
        "image_size": run.dataset.image_size,
        "num_channels": model.channels,
        "channel_mult": ",".join(map(str, model.channel_mult)),
        "num_res_blocks": model.res_blocks,
        # The reference needs at least one resolution; at one pixel there is no layer.
        "attention_resolutions": ",".join(map(str, model.attention_resolutions or [1])),
        "num_head_channels": model.head_channels,
        "dropout": model.dropout,
        "resblock_updown": model.resblock_updown,
        "use_scale_shift_norm": model.scale_shift_norm,
        "learn_sigma": True,
        "rescale_learned_sigmas": True,
        "diffusion_steps": run.diffusion.timesteps,
        "noise_schedule": run.diffusion.schedule.chosen[0],
        "p2_gamma": 0.5,
        "p2_k": 1,
        "use_fp16": device() == "cuda",
    }


def reference_train(run: RunConfig, options: argparse.Namespace) -> Callable[[], int]:
    """Returns the reference's training step."""
    train, script = run.train, of_reference("script_util")
    settings = script.model_and_diffusion_defaults() | recipe(run)
    model, diffusion = script.create_model_and_diffusion(**settings)
    loop = of_reference("train_util").TrainLoop(
        model=model.to(device()),
        diffusion=diffusion,
        data=None,
        batch_size=train.batch_size,
        microbatch=options.micro_batch,
        lr=train.learning_rate,
        ema_rate=str(train.ema_decay),
        log_interval=1000,
        save_interval=1000,
        resume_checkpoint="",
        use_fp16=settings["use_fp16"],
    )
    images = torch.from_numpy(random_images(run)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    batches = itertools.cycle(images.split(train.batch_size))

    def step() -> int:
        batch = next(batches)
        loop.run_step(batch, {})
        return len(batch)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a clone of the reference, which contains guided_diffusion/")
    parser.add_argument("--study", default="ffhq128", help="name of a file in experiments/, default: %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="images per training step, default: %(default)s")
    parser.add_argument("--micro-batch", type=int, default=64, help="images at the same time, default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10, help="duration of the measurement, default: %(default)s")
    options = parser.parse_args()
    if not (options.path / "guided_diffusion").is_dir():
        parser.error(f"{options.path} is not a clone of the reference: it contains no guided_diffusion/")
    sys.path.insert(0, str(options.path))
    for name in ("mpi4py", "blobfile"):  # imported, but not used by one process that reads no checkpoint
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name])["MPI"] = None
    backend = "nccl" if device() == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as directory:
        of_reference("logger").configure(dir=directory, format_strs=[])
        store = torch.distributed.FileStore(f"{directory}/store", 1)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        found = measure(reference_train, options)
        torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
