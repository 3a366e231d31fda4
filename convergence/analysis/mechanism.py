"""The mechanism: at which timesteps two arms differ in their losses and in the noise of their gradients.

A probe measures the gradient of an arm's own loss at timesteps that are drawn within a bin. A bin with probability p_b
contributes p_b tr(Sigma_b) to the variance of the whole gradient; the rest is the variance between the bins. AdamW
removes a constant factor of the loss. So the gradients of an arm are divided by its *scale*, the sum over t of p_t w_t,
where w_t is the weight of the mse. Where p_t w_t of two arms is proportional, this removes exactly their factor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from convergence.analysis.curves import mean_over_images
from convergence.analysis.effects import JSON_CONFIG
from convergence.analysis.intervals import t_interval
from convergence.failures import failed
from convergence.tables import ALL

if TYPE_CHECKING:  # importing torch takes seconds
    from diffusion.schemes import Tables

BETWEEN = "between bins"
LOSSES = ("mse", "vb")
Quantity = Literal["mse", "vb", "baseline_share", "candidate_share", "variance", "by_tables", "remaining", "noise_scale"]


@dataclass(frozen=True)
class ProbeEffect:
    """What the probes of two arms show about one quantity, over all seeds.

    Shares are fractions of the variance of an arm's whole gradient. All other quantities are factors, candidate /
    baseline. An unknown number is NaN, and an unknown bound is infinite.
    """

    __pydantic_config__ = JSON_CONFIG

    timesteps: str
    """A bin of timesteps such as "0-99", "all", or "between bins"."""
    quantity: Quantity
    """`mse`, `vb`: the unweighted terms of the loss. `variance`: what the bin contributes to the variance of the whole
    gradient, on the common scale. It is the product of `by_tables`, the factor that would result if the gradient of the
    unweighted mse had the same variance in both arms and at all timesteps of the bin, and of `remaining`.
    `noise_scale`: tr(Sigma) / |g|^2."""
    estimate: float
    low: float
    high: float
    pairs: int
    not_positive: int = 0
    """Pairs in which the pooled estimate of |g|^2 of an arm is not above 0: these have no noise scale."""


@dataclass(frozen=True)
class Mechanism:
    """Why a candidate and the baseline may differ: their expected gradients, and what the probes show."""

    __pydantic_config__ = JSON_CONFIG

    baseline: str
    candidate: str
    scale: float
    """The sum over t of p_t w_t, the expected weight of the mse, candidate / baseline; NaN if a density is learned."""
    mse_factor: float
    """The factor between the expected gradients of the mse at equal parameters; NaN if they are not proportional."""
    vb_factor: float
    """The same for the vb term."""
    checkpoints: int = 0
    """Number of checkpoints that are averaged."""
    first_images: int | float = 0
    """Training images of the first of them."""
    last_images: int | float = 0
    n: int = 0
    """Images of a probe."""
    held_out: bool = False
    """Whether training does not see these images."""
    effects: tuple[ProbeEffect, ...] = ()


def mechanisms(
    probes: pd.DataFrame, baseline: str, candidates: Sequence[str], tables: Mapping[str, "Tables | None"]
) -> tuple[Mechanism, ...]:
    """Compares each candidate with the baseline.

    Args:
        probes: the long table of probes (`convergence.tables.PROBE_COLUMNS`) of one study, which may be empty.
        baseline: an arm.
        candidates: other arms.
        tables: the tables of each arm; None if its density is learned.
    """
    draws = {arm: _draws(table) for arm, table in tables.items() if table}
    return tuple(_mechanism(probes, baseline, candidate, draws) for candidate in candidates)


class _Draws(NamedTuple):
    """What an arm's tables determine, each [T]; the weights are divided by the arm's scale."""

    scale: float
    probabilities: np.ndarray
    mse: np.ndarray
    """p_t w_t: the weight of timestep t in the expected gradient of the mse."""
    vb: np.ndarray
    square: np.ndarray
    """p_t w_t^2 of the mse: its weight in the second moment of the gradient."""


def _draws(tables: "Tables") -> _Draws:
    columns = (tables.probabilities, tables.mse_weight, tables.vb_weight)
    p, mse, vb = (np.asarray(column, float) for column in columns)
    scale = (p * mse).sum()
    return _Draws(scale, p, p * mse / scale, p * vb / scale, p * (mse / scale) ** 2)


def _factor(baseline: np.ndarray, candidate: np.ndarray) -> float:
    """Returns the factor between two arrays [T] if it is the same at every t, up to rounding; otherwise NaN."""
    if not (baseline.any() and candidate.any()):
        return np.nan
    factor = candidate.sum() / baseline.sum()
    return float(factor) if np.allclose(candidate, factor * baseline, rtol=1e-9, atol=0) else np.nan


def _mechanism(probes: pd.DataFrame, baseline: str, candidate: str, draws: Mapping[str, _Draws]) -> Mechanism:
    scale = mse_factor = vb_factor = np.nan
    if baseline in draws and candidate in draws:
        base, cand = draws[baseline], draws[candidate]
        scale = float(cand.scale / base.scale)
        mse_factor, vb_factor = scale * _factor(base.mse, cand.mse), scale * _factor(base.vb, cand.vb)
    found = Mechanism(baseline, candidate, scale, mse_factor, vb_factor)
    rows = probes[probes["arm"].isin([baseline, candidate])]
    rows = rows[~failed(rows).groupby([rows["arm"], rows["seed"]]).transform("any")]
    rows = rows[rows.groupby("seed")["arm"].transform("nunique") == 2]
    means, images = _means(rows)
    if not len(images):
        return found
    effects = [*_loss_effects(means, baseline, candidate)]
    if baseline in draws and candidate in draws:
        effects += _gradient_effects(*(_gradient(means, arm, draws[arm]) for arm in (baseline, candidate)))
    return replace(
        found,
        checkpoints=len(images),
        first_images=images[0].item(),
        last_images=images[-1].item(),
        n=int(rows["n"].max()),
        held_out=bool(rows["held_out"].all()),
        effects=tuple(effects),
    )


def _means(rows: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Averages each quantity of each run over the training images that all runs cover; losses as logs.

    Returns:
        The means, a row per seed, with the columns (metric, arm, timesteps); and the training images.
    """
    covered = rows.groupby(["arm", "seed"])["images"]
    first, last = covered.min().max(), covered.max().min()
    is_loss = rows["metric"].isin(LOSSES)
    rows = rows.assign(value=rows["value"].mask(is_loss, np.log(rows["value"].where(rows["value"] > 0))))
    curves = rows.pivot(index="images", columns=["metric", "arm", "timesteps", "seed"], values="value")
    curves = curves.interpolate(method="index", limit_area="inside").loc[first:last]  # arms may have other checkpoints
    images = curves.index.to_numpy()
    if not len(images):
        return pd.DataFrame(), images
    means = pd.Series(mean_over_images(curves.to_numpy().T, images), curves.columns).unstack("seed")
    return means.reindex(rows.set_index(["metric", "arm", "timesteps"]).index.unique()).T, images


def _loss_effects(means: pd.DataFrame, baseline: str, candidate: str) -> Iterator[ProbeEffect]:
    for loss in LOSSES:
        changes = means[loss][candidate] - means[loss][baseline]
        yield from (_effect(name, loss, changes[name]) for name in changes if changes[name].notna().any())


class _Gradient(NamedTuple):
    """What each bin contributes to the moments of an arm's whole gradient, on the common scale: [seeds, bins]."""

    variance: pd.DataFrame
    squared_norm: pd.DataFrame
    share: pd.DataFrame
    """Of the variance of the whole gradient; with the column `BETWEEN`."""
    by_tables: pd.Series
    """[bins] the variance if that of the gradient of the unweighted mse is 1 at all timesteps."""


def _gradient(means: pd.DataFrame, arm: str, draws: _Draws) -> _Gradient:
    variance, squared_norm = means["gradient_variance"][arm], means["gradient_squared_norm"][arm]
    bins = {name: _timesteps(name) for name in variance}
    probability = pd.Series({name: draws.probabilities[t].sum() for name, t in bins.items()})
    variance = (variance * probability / draws.scale**2).mask(probability == 0, 0, axis=1)
    share = variance.div(variance[ALL], axis=0)
    share[BETWEEN] = 1 - share.drop(columns=ALL).sum(axis=1)
    by_tables = pd.Series({name: draws.square[t].sum() for name, t in bins.items()})
    return _Gradient(variance, squared_norm * probability / draws.scale**2, share, by_tables)


def _timesteps(name: str) -> slice:
    if name == ALL:
        return slice(None)
    first, last = map(int, name.split("-"))
    return slice(first, last + 1)


def _gradient_effects(base: _Gradient, cand: _Gradient) -> Iterator[ProbeEffect]:
    with np.errstate(divide="ignore", invalid="ignore"):  # a bin that an arm never draws
        variance = np.log(cand.variance / base.variance)
        by_tables = np.log(cand.by_tables / base.by_tables)
    for name in base.share:
        yield _effect(name, "baseline_share", base.share[name])
        yield _effect(name, "candidate_share", cand.share[name])
    for name in variance.columns[np.isfinite(by_tables)]:
        factor = float(np.exp(by_tables[name]))
        yield _effect(name, "variance", variance[name])
        yield ProbeEffect(name, "by_tables", factor, factor, factor, pairs=0)
        yield _effect(name, "remaining", variance[name] - by_tables[name])
        yield _noise_scale(name, base, cand)


def _noise_scale(name: str, base: _Gradient, cand: _Gradient) -> ProbeEffect:
    """Returns the effect on tr(Sigma) / |g|^2; no pair is left out because its |g|^2 is not above 0."""
    moments = [(arm.variance[name], arm.squared_norm[name]) for arm in (base, cand)]
    not_positive = int(((moments[0][1] <= 0) | (moments[1][1] <= 0)).sum())
    if not not_positive:
        baseline, candidate = (np.log(variance / squared_norm) for variance, squared_norm in moments)
        return _effect(name, "noise_scale", candidate - baseline)
    baseline, candidate = (variance.sum() / squared_norm.sum() for variance, squared_norm in moments)
    ratio = candidate / baseline if min(baseline, candidate) > 0 else np.nan
    return ProbeEffect(name, "noise_scale", float(ratio), 0.0, np.inf, len(base.variance), not_positive)


def _effect(timesteps: str, quantity: Quantity, values: pd.Series) -> ProbeEffect:
    """Returns the mean over seeds with its t-interval; values are logs, except for shares."""
    interval = t_interval(values.to_numpy())
    estimate, low, high = interval if quantity.endswith("share") else np.exp(interval)
    return ProbeEffect(timesteps, quantity, float(estimate), float(low), float(high), len(values))
