"""The mechanism: at which timesteps two arms differ in their losses and in the noise of their gradients.

A probe measures, at one checkpoint and for one bin of timesteps, the losses of an arm and the gradient of the arm's
own loss. Let p_b be the probability of bin b, and Sigma_b the covariance of the gradient of one image within bin b.
Bin b contributes p_b tr(Sigma_b) to the variance of the whole gradient. The rest of this variance is the variance
between the bins.

AdamW removes a constant factor of the loss. So the gradients of an arm are divided by the *scale* of the arm: the sum
over t of p_t w_t, where p_t is the probability of timestep t and w_t is the weight of the mse at t. If p_t w_t of two
arms is proportional, this division removes exactly the constant factor between the arms.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from convergence.analysis.curves import mean_over_images
from convergence.analysis.effects import JSON_CONFIG, interval_in_unit
from convergence.analysis.intervals import t_interval
from convergence.failures import failed
from convergence.tables import ALL

if TYPE_CHECKING:  # importing torch takes seconds
    from diffusion.schemes import Tables

BETWEEN = "between bins"
Quantity = Literal[
    "mse", "vb", "baseline_share", "candidate_share", "variance", "by_tables", "remaining", "noise_scale",
    "baseline_update", "candidate_update", "update",
    "baseline_relative_update", "candidate_relative_update", "relative_update",
]  # fmt: skip
LOSSES: tuple[Quantity, ...] = ("mse", "vb")
NORMS = ["update_norm", "weight_norm"]
UNRECORDED = "not recorded"
# The baseline's, the candidate's, and their ratio.
UPDATE: tuple[Quantity, ...] = ("baseline_update", "candidate_update", "update")
RELATIVE_UPDATE: tuple[Quantity, ...] = ("baseline_relative_update", "candidate_relative_update", "relative_update")


@dataclass(frozen=True)
class ProbeEffect:
    """The effect of a candidate on one quantity that probes measure, over all seeds.

    An unknown estimate is NaN. An unknown bound is infinite, or 0 if it is the lower bound of a factor.
    """

    __pydantic_config__ = JSON_CONFIG

    timesteps: str
    """A bin of timesteps such as "0-99"; "all" timesteps; "between bins" for the variance between the bins."""
    quantity: Quantity
    """The quantity that is compared.

    In percent:

    - `mse`, `vb`: change of this unweighted term of the loss.
    - `baseline_share`, `candidate_share`: share of the bin in the variance of the arm's whole gradient.

    As factors, candidate / baseline:

    - `variance`: contribution of the bin to the variance of the gradient, after division of the gradient by the scale.
    - `by_tables`: the factor of `variance` that follows from the densities and loss weights alone.
    - `remaining`: `variance` / `by_tables`.
    - `noise_scale`: tr(Sigma) / |g|^2, where g is the expected gradient.
    - `update`, `relative_update`: the two quantities below.

    Values of one arm, without a unit:

    - `baseline_update`, `candidate_update`: L2 norm over all weights of the last update before a checkpoint.
    - `baseline_relative_update`, `candidate_relative_update`: this norm divided by the norm of the weights.
    """
    estimate: float
    low: float
    high: float
    pairs: int
    not_positive: int = 0
    """Number of pairs without a noise scale, because the estimate of |g|^2 of one arm, averaged over checkpoints, is
    not above 0."""


@dataclass(frozen=True)
class Mechanism:
    """Why a candidate and the baseline may differ: factors of their expected gradients, and effects from probes."""

    __pydantic_config__ = JSON_CONFIG

    baseline: str
    candidate: str
    scale: float
    """Scale of the candidate divided by the scale of the baseline. The scale is the sum over t of p_t w_t, where w_t is
    the weight of the mse. NaN if a density is learned."""
    mse_factor: float
    """Expected gradient of the mse at equal parameters, candidate / baseline. NaN if no single factor holds at every t,
    or if a density is learned."""
    vb_factor: float
    """Expected gradient of the vb at equal parameters, candidate / baseline. NaN as for `mse_factor`."""
    checkpoints: int = 0
    """Number of checkpoints between `first_images` and `last_images`."""
    first_images: int | float = 0
    """Start of the range of training images that the probes of all runs cover; `last_images` is its end."""
    last_images: int | float = 0
    n: int = 0
    """Number of images of a probe."""
    held_out: bool = False
    """Whether the images of the probes are held out from training."""
    effects: tuple[ProbeEffect, ...] = ()

    def of(self, quantity: Quantity) -> dict[str, ProbeEffect]:
        """Returns the effects on one quantity: bin of timesteps -> effect."""
        return {effect.timesteps: effect for effect in self.effects if effect.quantity == quantity}


def mechanisms(
    probes: pd.DataFrame, baseline: str, candidates: Sequence[str], tables: Mapping[str, "Tables"]
) -> tuple[Mechanism, ...]:
    """Returns the mechanism of each candidate, compared with the baseline.

    Args:
        probes: the long table of probes (`convergence.rows.PROBE_COLUMNS`) of one study, with or without the rows that
            `update_rows` returns; may be empty.
        baseline: name of the arm to compare with.
        candidates: names of the other arms.
        tables: arm -> its density and loss weights. Arms with a learned density have no entry.
    """
    return tuple(_mechanism(probes, baseline, candidate, tables) for candidate in candidates)


def _mechanism(probes: pd.DataFrame, baseline: str, candidate: str, tables: Mapping[str, "Tables"]) -> Mechanism:
    arms = (baseline, candidate)
    draws = tuple(_draws(tables[arm]) for arm in arms if arm in tables)
    scale = mse_factor = vb_factor = np.nan
    if len(draws) == 2:
        scale = draws[1].mse.sum() / draws[0].mse.sum()
        mse_factor, vb_factor = _factor(draws[0].mse, draws[1].mse), _factor(draws[0].vb, draws[1].vb)
    found = Mechanism(baseline, candidate, float(scale), mse_factor, vb_factor)
    is_norm = probes["metric"].isin(NORMS)
    pairs, norms = _pairs(probes[~is_norm], arms), _pairs(probes[is_norm], arms)
    if pairs is None:
        return found
    return replace(
        found,
        checkpoints=len(pairs.images),
        first_images=pairs.images[0].item(),
        last_images=pairs.images[-1].item(),
        n=int(probes["n"].max()),
        held_out=bool(probes["held_out"].all()),
        effects=(
            *_loss_effects(pairs),
            *(_gradient_effects(pairs, draws) if len(draws) == 2 else ()),
            *(_update_effects(norms) if norms else ()),
        ),
    )


def update_rows(probe: pd.DataFrame, provenance: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the norms of the last update and of the weights as rows of the table of probes.

    Args:
        probe: the rows of the probe of one checkpoint.
        provenance: content of `provenance.json` of this checkpoint. It has no norms if an earlier version trained it.
    """
    whole = probe[(probe["timesteps"] == ALL) & (probe["metric"] == "mse")]
    values = pd.Series([provenance.get(norm) for norm in NORMS], dtype=float)
    rows = pd.concat([whole] * len(NORMS), ignore_index=True).assign(metric=NORMS, value=values)
    reason = rows["reason"].astype(object).fillna("")
    return rows.assign(reason=reason.mask(values.isna() & (reason == ""), UNRECORDED))


class _Draws(NamedTuple):
    """Arrays [T] that follow from the density and the loss weights of an arm."""

    probabilities: np.ndarray
    mse: np.ndarray
    """p_t w_t, the weight of the mse at t in the expected gradient."""
    vb: np.ndarray


def _draws(tables: "Tables") -> _Draws:
    columns = (tables.probabilities, tables.mse_weight, tables.vb_weight)
    p, mse, vb = (np.asarray(column, float) for column in columns)
    return _Draws(p, p * mse, p * vb)


def _factor(baseline: np.ndarray, candidate: np.ndarray) -> float:
    """Returns candidate / baseline of arrays [T] if this factor is equal at every t, up to rounding; otherwise NaN."""
    if not (baseline.any() and candidate.any()):
        return np.nan
    factor = candidate.sum() / baseline.sum()
    return float(factor) if np.allclose(candidate, factor * baseline, rtol=1e-9, atol=0) else np.nan


class _Pairs(NamedTuple):
    """Probes of the pairs of S seeds, over the training images [K] that the probes of all runs cover."""

    bins: list[str]
    """Names of the bins; the last one is `ALL`, which is all timesteps."""
    images: np.ndarray
    values: dict[str, np.ndarray]
    """Metric -> values [2, bins, S, K] of the baseline and of the candidate."""


def _pairs(probes: pd.DataFrame, arms: tuple[str, str]) -> _Pairs | None:
    """Pairs the probes of two arms by seed, without failed runs; returns None if there is no pair."""
    rows = probes[probes["arm"].isin(arms)]
    rows = rows[~failed(rows).groupby([rows["arm"], rows["seed"]]).transform("any").astype(bool)]
    rows = rows[rows.groupby("seed")["arm"].transform("nunique") == 2]
    covered = rows.groupby(["arm", "seed"])["images"]
    first, last = covered.min().max(), covered.max().min()
    if rows.empty or first > last:
        return None
    bins = sorted(rows["timesteps"].unique(), key=lambda name: name == ALL)
    seeds = sorted(rows["seed"].unique())
    curves = rows.pivot(index="images", columns=["metric", "arm", "timesteps", "seed"], values="value")
    curves = curves.interpolate(method="index", limit_area="inside").loc[first:last]  # arms may have other checkpoints
    order = pd.MultiIndex.from_product([arms, bins, seeds])
    shape = (2, len(bins), len(seeds), len(curves))
    values = {metric: curves[metric][order].to_numpy().T.reshape(shape) for metric in rows["metric"].unique()}
    return _Pairs(bins, curves.index.to_numpy(), values)


def _loss_effects(pairs: _Pairs) -> Iterator[ProbeEffect]:
    for loss in LOSSES:
        for name, (baseline, candidate) in zip(pairs.bins, pairs.values[loss].swapaxes(0, 1), strict=True):
            if (baseline > 0).all() and (candidate > 0).all():  # a net that does not predict the variance has no vb
                yield from _effects([name], loss, mean_over_images(np.log(candidate / baseline), pairs.images)[None])


def _gradient_effects(pairs: _Pairs, draws: Sequence[_Draws]) -> Iterator[ProbeEffect]:
    parts = [slice(None) if name == ALL else _timesteps(name) for name in pairs.bins]
    # [2, bins] of baseline and candidate
    probability = np.array([[arm.probabilities[part].sum() for part in parts] for arm in draws])
    weight = np.array([[arm.mse[part].sum() / arm.mse.sum() for part in parts] for arm in draws])
    factor = (probability / np.array([[arm.mse.sum() ** 2] for arm in draws]))[..., None, None]
    variance = np.where(factor > 0, factor * pairs.values["gradient_variance"], 0)
    squared_norm = factor * pairs.values["gradient_squared_norm"]

    share = 100 * (variance / variance[:, -1:]).mean(axis=-1)
    share = np.insert(share, -1, 100 - share[:, :-1].sum(axis=1), axis=1)
    names = [*pairs.bins[:-1], BETWEEN, ALL]
    yield from _effects(names, "baseline_share", share[0])
    yield from _effects(names, "candidate_share", share[1])

    in_both = np.flatnonzero((weight > 0).all(axis=0))
    names = [pairs.bins[index] for index in in_both]
    variance, squared_norm = variance[:, in_both], squared_norm[:, in_both]
    ratio = np.log(variance[1] / variance[0]).mean(axis=-1)
    # For the same expected gradient, a bin that is drawn half as often has twice the weight and twice the variance.
    by_tables = np.diff(np.log(weight[:, in_both] ** 2 / probability[:, in_both]), axis=0)[0]
    yield from _effects(names, "variance", ratio)
    for name, value in zip(names, np.exp(by_tables).tolist(), strict=True):
        yield ProbeEffect(name, "by_tables", value, value, value, pairs=0)
    yield from _effects(names, "remaining", ratio - by_tables[:, None])
    for index, name in enumerate(names):
        yield _noise_scale(name, variance[:, index].mean(axis=-1), squared_norm[:, index].mean(axis=-1))


def _timesteps(name: str) -> slice:
    first, last = map(int, name.split("-"))
    return slice(first, last + 1)


def _noise_scale(timesteps: str, variance: np.ndarray, squared_norm: np.ndarray) -> ProbeEffect:
    """Returns the effect on the noise scale from means over checkpoints [2, S] of baseline and candidate.

    If |g|^2 of a run is not above 0, no pair is left out. Instead, the variance and |g|^2 of each arm are summed over
    all seeds before the ratio is computed. The effect then has no interval.
    """
    not_positive = int((squared_norm <= 0).any(axis=0).sum())
    if not not_positive:
        baseline, candidate = np.log(variance / squared_norm)
        return next(_effects([timesteps], "noise_scale", (candidate - baseline)[None]))
    estimate, over_seeds = np.nan, squared_norm.sum(axis=1)
    if (over_seeds > 0).all():
        baseline, candidate = variance.sum(axis=1) / over_seeds
        estimate = float(candidate / baseline)
    return ProbeEffect(timesteps, "noise_scale", estimate, 0.0, np.inf, variance.shape[1], not_positive)


def _update_effects(norms: _Pairs) -> Iterator[ProbeEffect]:
    """Yields the effects on the size of updates: means of logs over the checkpoints with known norms in all runs."""
    update, weights = (np.log(norms.values[norm][:, 0]) for norm in NORMS)  # [2, S, K]
    known = np.isfinite(update + weights).all(axis=(0, 1))
    if not known.any():
        return
    for quantities, logs in ((UPDATE, update), (RELATIVE_UPDATE, update - weights)):
        baseline, candidate = logs[..., known].mean(axis=-1)
        for quantity, values in zip(quantities, (baseline, candidate, candidate - baseline), strict=True):
            yield from _effects([ALL], quantity, values[None])


def _effects(bins: Sequence[str], quantity: Quantity, values: np.ndarray) -> Iterator[ProbeEffect]:
    """Yields an effect per bin: the mean over seeds of values [bins, S], with its t-interval.

    The values are logs, except for shares.
    """
    for name, of_seeds in zip(bins, values, strict=True):
        interval = t_interval(of_seeds)
        if not quantity.endswith("share"):
            interval = interval_in_unit(interval, "percent" if quantity in LOSSES else "factor", quantity)
        estimate, low, high = map(float, interval)
        yield ProbeEffect(name, quantity, estimate, low, high, len(of_seeds))
