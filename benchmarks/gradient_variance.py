"""How noisy the arms' gradients are, and how alike those of two arms: on one trained net, batch after batch.

    python -m benchmarks.gradient_variance WEIGHTS IMAGES [--batches 100]

WEIGHTS is a checkpoint of a run (weights.safetensors), IMAGES the directory of its dataset. First table: trace of the
covariance of the batch gradient, tr(Sigma), of the whole loss and of its two terms, and the noise scale
tr(Sigma) / |g|^2 (McCandlish et al. 2018, arXiv 1812.06162), per arm. Second table: tr(Sigma) of the difference between
the gradients of `under05` and `uni05` at equal images and noise, for three ways to couple their timesteps.
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
from diffusion.evaluation.probe import Spread
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
    """Independent timesteps, one uniform number each, for the comparison with the coupling that training uses."""
    u = torch.rand(count, dtype=torch.float64, generator=random)
    return torch.searchsorted(probabilities.cumsum(0), u, right=True).clamp(max=len(probabilities) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--batches", type=int, default=100)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.weights, "cpu")
    model, schedule = checkpoint.model.requires_grad_(True), checkpoint.schedule
    parameters = list(model.parameters())
    images = torch.tensor(load_images(arguments.images))
    tables = {name: scheme_tables(schedule, *arm) for name, arm in ARMS.items()}

    def gradients(table: Tables, batch: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Flat gradients of the mse and the vb term; images and noise follow from the number of the batch."""
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator(0, "images", batch))
        x_start = to_model_range(images[chosen])
        noise = torch.randn(x_start.shape, generator=generator(0, "noise", batch))
        x_t = schedule.q_sample(x_start, t, noise)
        weights = (table.mse_weight[t].float(), table.vb_weight[t].float())
        losses = hybrid_loss(schedule, model(x_t, t), x_start, x_t, t, noise, *weights)
        mse = torch.autograd.grad(losses.mse.mean(), parameters, retain_graph=True)
        vb = torch.autograd.grad(losses.vb.mean(), parameters)
        return tuple(torch.cat([g.flatten() for g in term]) for term in (mse, vb))

    def draw(name: str, batch: int) -> Tensor:
        way = draw_stratified if ARMS[name][0].stratified else draw_timesteps
        return way(tables[name].probabilities, BATCH_SIZE, generator(0, "timesteps", batch))

    spreads = {name: (Spread(), Spread(), Spread()) for name in ARMS}
    couplings: dict[str, tuple[Callable, str]] = {
        "maximal coupling (in use)": (draw_timesteps, "timesteps"),
        "one u through both inverse CDFs": (inverse_cdf, "timesteps"),
        "independent": (inverse_cdf, "others"),
    }
    differences = {name: Spread() for name in couplings}
    for batch in range(arguments.batches):
        for name, (whole, of_mse, of_vb) in spreads.items():
            mse, vb = gradients(tables[name], batch, draw(name, batch))
            whole.add(mse + vb)
            of_mse.add(mse)
            of_vb.add(vb)
        for name, (way, stream) in couplings.items():
            uni = way(tables["uni05"].probabilities, BATCH_SIZE, generator(0, "timesteps", batch))
            under = way(tables["under05"].probabilities, BATCH_SIZE, generator(0, stream, batch))
            pair = (sum(gradients(tables[arm], batch, t)) for arm, t in (("under05", under), ("uni05", uni)))
            differences[name].add(next(pair) - next(pair))
        if sys.stderr.isatty():
            print(f"\r{batch + 1}/{arguments.batches} batches", end="", file=sys.stderr, flush=True)

    of_arms = pd.DataFrame(
        {
            "tr(Sigma)": {name: whole.trace for name, (whole, _, _) in spreads.items()},
            "of mse": {name: mse.trace for name, (_, mse, _) in spreads.items()},
            "of vb": {name: vb.trace for name, (_, _, vb) in spreads.items()},
            "noise scale": {
                name: whole.trace / whole.square if whole.square > 0 else float("inf")
                for name, (whole, _, _) in spreads.items()
            },
            "largest vb weight": {name: table.vb_weight.max().item() for name, table in tables.items()},
        }
    )
    of_couplings = pd.DataFrame({"tr(Sigma) of the difference": {n: s.trace for n, s in differences.items()}})
    print(f"{arguments.batches} batches of {BATCH_SIZE}, {arguments.weights}\n")
    for table in (of_arms, of_couplings):
        print(table.to_string(float_format=lambda value: f"{value:.4g}"), end="\n\n")


if __name__ == "__main__":
    main()
