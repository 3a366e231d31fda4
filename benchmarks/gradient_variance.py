"""Noise of the gradients of several arms, and of the difference between two arms, for one trained network.

    python -m benchmarks.gradient_variance WEIGHTS IMAGES [--batches 100]

WEIGHTS is a checkpoint of a run (weights.safetensors), IMAGES the directory of its dataset. The first table shows, per
arm, the trace tr(Sigma) of the covariance of the batch gradient, for the loss and for its two terms, and the noise
scale tr(Sigma) / |g|^2 (McCandlish et al. 2018, arXiv 1812.06162). The second table shows tr(Sigma) of the difference
between the gradients of `under05` and `uni05` for the same images and noise, with three couplings of their timesteps.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from diffusion.checkpoints import load_checkpoint
from diffusion.config import Scheme
from diffusion.data.arrays import load_images
from diffusion.data.batches import to_model_range
from diffusion.evaluation.probe import GradientMoments
from diffusion.losses import hybrid_loss
from diffusion.schemes import Tables, scheme_tables
from diffusion.streams import generator
from diffusion.timesteps import draw_stratified, draw_timesteps

BATCH_SIZE = 32
P2 = {"p2": {"gamma": 0.5, "k": 1}}
UNI05 = Scheme(mse_weight=P2)
ARMS = {
    "uniform": (Scheme(), None),
    "uni05": (UNI05, None),
    "uni05, stratified": (Scheme(mse_weight=P2, stratified=True), None),
    "under05": (Scheme(timesteps=P2), None),
    "matched05": (Scheme(timesteps=P2), UNI05),
    "matched05, correct_vb: false": (Scheme(timesteps=P2, correct_vb=False), UNI05),
}


def inverse_cdf(probabilities: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Draw independent timesteps, one uniform number each, to compare with the coupling that training uses."""
    u = torch.rand(count, dtype=torch.float64, generator=random)
    return torch.searchsorted(probabilities.cumsum(0), u, right=True).clamp(max=len(probabilities) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="weights.safetensors of a checkpoint")
    parser.add_argument("images", type=Path, help="directory of a prepared dataset")
    parser.add_argument("--batches", type=int, default=100, help="default: %(default)s")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.weights, "cpu")
    model, schedule = checkpoint.model.requires_grad_(True), checkpoint.schedule
    parameters = list(model.parameters())
    images = torch.tensor(load_images(arguments.images))
    tables = {name: scheme_tables(schedule, *arm) for name, arm in ARMS.items()}

    def gradients(table: Tables, batch: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Flat gradients of the mse and the vb term; images and noise depend on the number of the batch alone."""
        indices = torch.randint(len(images), (BATCH_SIZE,), generator=generator(0, "images", batch))
        x_start = to_model_range(images[indices])
        noise = torch.randn(x_start.shape, generator=generator(0, "noise", batch))
        x_t = schedule.q_sample(x_start, t, noise)
        weights = (table.mse_weight[t].float(), table.vb_weight[t].float())
        losses = hybrid_loss(schedule, model(x_t, t), x_start, x_t, t, noise, *weights)
        mse = torch.autograd.grad(losses.mse.mean(), parameters, retain_graph=True)
        vb = torch.autograd.grad(losses.vb.mean(), parameters)
        return tuple(torch.cat([g.flatten() for g in term]) for term in (mse, vb))

    def draw(name: str, batch: int) -> Tensor:
        draw_from = draw_stratified if ARMS[name][0].stratified else draw_timesteps
        return draw_from(tables[name].probabilities, BATCH_SIZE, generator(0, "timesteps", batch))

    moments = {name: [GradientMoments() for _ in ("loss", "mse", "vb")] for name in ARMS}
    couplings: dict[str, tuple[Callable, str]] = {
        "maximal coupling (in use)": (draw_timesteps, "timesteps"),
        "one u through both inverse CDFs": (inverse_cdf, "timesteps"),
        "independent": (inverse_cdf, "others"),
    }
    differences = {name: GradientMoments() for name in couplings}
    for batch in range(arguments.batches):
        for name, accumulators in moments.items():
            mse, vb = gradients(tables[name], batch, draw(name, batch))
            for accumulator, gradient in zip(accumulators, (mse + vb, mse, vb), strict=True):
                accumulator.add(gradient)
        for name, (draw_from, stream) in couplings.items():
            uni = draw_from(tables["uni05"].probabilities, BATCH_SIZE, generator(0, "timesteps", batch))
            under = draw_from(tables["under05"].probabilities, BATCH_SIZE, generator(0, stream, batch))
            pair = (sum(gradients(tables[arm], batch, t)) for arm, t in (("under05", under), ("uni05", uni)))
            differences[name].add(next(pair) - next(pair))
        if sys.stderr.isatty():
            print(f"\r{batch + 1}/{arguments.batches} batches", end="", file=sys.stderr, flush=True)

    arm_table = pd.DataFrame(
        {
            "tr(Sigma)": {name: loss.covariance_trace for name, (loss, _, _) in moments.items()},
            "of mse": {name: mse.covariance_trace for name, (_, mse, _) in moments.items()},
            "of vb": {name: vb.covariance_trace for name, (_, _, vb) in moments.items()},
            "noise scale": {
                name: loss.covariance_trace / loss.squared_norm if loss.squared_norm > 0 else float("inf")
                for name, (loss, _, _) in moments.items()
            },
            "largest vb weight": {name: table.vb_weight.max().item() for name, table in tables.items()},
        }
    )
    coupling_table = pd.DataFrame(
        {"tr(Sigma) of the difference": {name: gradients.covariance_trace for name, gradients in differences.items()}}
    )
    print(f"{arguments.batches} batches of {BATCH_SIZE}, {arguments.weights}\n")
    for table in (arm_table, coupling_table):
        print(table.to_string(float_format=lambda value: f"{value:.4g}"), end="\n\n")


if __name__ == "__main__":
    main()
