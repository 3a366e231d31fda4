"""The section of `verdict.md` on the mechanism: how arms differ in losses and gradients."""

from collections.abc import Mapping, Sequence

import numpy as np

from convergence.analysis.effects import Unit
from convergence.analysis.mechanism import LOSSES, RELATIVE_UPDATE, UPDATE, Mechanism, ProbeEffect, Quantity
from convergence.analysis.wording import count_text, interval_text, number_text
from convergence.tables import ALL, markdown_code, markdown_table

NOT_MEASURED = "Not measured: the study has no probes of both arms (section `probe`)."
INTRODUCTION = """\
Measured at every checkpoint, on images and noise that all arms share. Brackets contain 95% t-intervals over paired
seeds, not corrected for the number of bins. Losses are the unweighted terms, averaged over training images; changes are
in percent, above 0 is worse. Gradients are those of one image in each arm's own weighted loss, averaged over
checkpoints; ratios are the candidate's value divided by the baseline's. AdamW removes a constant factor of the loss, so
the gradients of an arm are divided by the sum over t of p_t w_t, where p_t is the probability of t and w_t the weight
of the mse.

- *Share of the variance*: p_b tr(Sigma_b) divided by the variance of the whole gradient, where p_b is the probability
  of the bin and Sigma_b the covariance within it. The rest is the variance between the bins.
- *Variance*: the ratio of p_b tr(Sigma_b). It is the product of the next two columns.
- *By tables*: what p_t and w_t alone give, the ratio of (sum of p_t w_t in the bin)^2 / p_b. For the same expected
  gradient, a bin that is drawn half as often has twice the weight, and so contributes twice the variance.
- *Remaining*: what p_t and w_t do not explain.
- *Noise scale*: the ratio of tr(Sigma) / |g|^2, which is the batch size in images at which noise and gradient are
  equally large. Estimates of |g|^2 may be negative; all of them are averaged before the ratio is taken."""
UPDATES = """
- *Update*: the L2 norm, over all weights, of the last update before a checkpoint (weights without averaging); geometric
  means over checkpoints. AdamW normalises the gradient, so this norm can differ less between arms than gradients do."""
EQUAL_PARAMETERS = (
    "This holds at equal parameters of the net. AdamW divides by the root of the mean squared gradient, which includes "
    "the variance, so a noisier gradient also makes the steps along the expected gradient smaller."
)
HEAD = ["share of the variance, %: baseline", "candidate", "variance", "by tables", "remaining", "noise scale"]


def mechanism_section(mechanisms: Sequence[Mechanism]) -> list[str]:
    """Returns the paragraphs of the section: at which timesteps each candidate differs from the baseline."""
    updates = UPDATES if any(found.of("update") for found in mechanisms) else ""
    is_measured = any(found.effects for found in mechanisms)
    parts = ["## Mechanism", INTRODUCTION + updates if is_measured else NOT_MEASURED]
    for found in mechanisms:
        pair = f"{markdown_code(found.candidate)} against {markdown_code(found.baseline)}"
        if found.effects:
            subset = "held-out" if found.held_out else "training"
            pair += (
                f", {count_text(found.checkpoints, 'checkpoint')} from {found.first_images:,.0f} to "
                f"{found.last_images:,.0f} training images, probed with {found.n:,} {subset} images"
            )
        sentences = [_expected_gradient(found), *_differences(found)]
        parts += [f"{pair}:", "\n".join(f"- {sentence}" for sentence in sentences), *_tables(found)]
    return parts


def _expected_gradient(found: Mechanism) -> str:
    """Returns how the expected gradients of two arms are related, which depends on densities and weights alone."""
    baseline, mse, vb = markdown_code(found.baseline), found.mse_factor, found.vb_factor

    def times(factor: float) -> str:
        return f"that of {baseline}" if np.isclose(factor, 1, rtol=1e-9) else f"{factor:.4g} times that of {baseline}"

    if np.isnan(found.scale):
        return (
            "The expected gradients cannot be compared: a density is learned, or the nets have different predictions."
        )
    if np.isnan(mse) and np.isnan(vb):
        return "The expected gradients of mse and vb differ from the baseline's by factors that depend on t."
    if np.isnan(mse):
        return f"The expected gradient of vb is {times(vb)}; that of the mse differs by a factor that depends on t."
    if np.isclose(mse, vb, rtol=1e-9) or (found.effects and not found.of("vb")):
        text = f"The expected gradient is {times(mse)}."
    elif np.isnan(vb):
        apart = "" if times(mse) == times(1) else "apart from this factor, "
        text = f"The expected gradient of the mse is {times(mse)}; {apart}only that of vb differs."
    else:
        text = f"The expected gradient of the mse is {times(mse)}, and that of vb is {times(vb)}."
    return f"{text} {EQUAL_PARAMETERS}"


def _differences(found: Mechanism) -> list[str]:
    """Returns at which timesteps losses and variances differ, and whether the whole gradient is noisier."""
    sentences = [f"Loss, {loss}: {_places(found.of(loss), 0)}." for loss in LOSSES if found.of(loss)]
    variance, remaining = found.of("variance"), found.of("remaining")
    if variance:
        sentences += [
            f"Variance of the whole gradient: **{_direction(variance[ALL], 1)}**, {_text(variance[ALL])} times the "
            f"baseline's; by bins: {_places(variance, 1)}.",
            f"Of this, p_t and w_t do not explain: {_places(remaining, 1)}.",
            f"Noise scale of the whole gradient, divided by the baseline's: {_text(found.of('noise_scale')[ALL])}.",
        ]
    if update := found.of("update").get(ALL):
        sentences.append(f"Size of an update: **{_direction(update, 1)}**, {_text(update)} times the baseline's.")
    return sentences


def _places(effects: Mapping[str, ProbeEffect], same: float) -> str:
    """Returns in which bins of timesteps a quantity is lower or higher."""
    known = {name: _direction(effect, same) for name, effect in effects.items() if name != ALL}
    groups = {word: [name for name in known if known[name] == word] for word in ("lower", "higher")}
    texts = [f"{word} at t {', '.join(names)}" for word, names in groups.items() if names]
    if "no difference shown" in known.values():
        texts.append("no difference shown elsewhere" if texts else "no difference shown at any t")
    return "; ".join(texts)


def _direction(effect: ProbeEffect, same: float) -> str:
    return "lower" if effect.high < same else "higher" if effect.low > same else "no difference shown"


def _tables(found: Mechanism) -> list[str]:
    """Returns a table of losses, a table of gradients and a table of updates, as far as they were measured."""
    losses, shares = [found.of("mse"), found.of("vb")], [found.of("baseline_share"), found.of("candidate_share")]
    ratios = [found.of(quantity) for quantity in ("variance", "by_tables", "remaining", "noise_scale")]
    tables = []
    for head, columns in (([*LOSSES], losses), (HEAD, [*shares, *ratios])):
        if columns[0]:
            rows = [[name, *(_text(column.get(name)) for column in columns), effect.pairs]
                    for name, effect in columns[0].items()]  # fmt: skip
            tables.append(markdown_table(["timesteps", *head, "pairs"], rows))
    if found.of("update"):
        sizes = (("norm of the update", UPDATE), ("divided by the norm of the weights", RELATIVE_UPDATE))
        rows = [[name, *_sizes(found, quantities)] for name, quantities in sizes]
        tables.append(markdown_table(["update", "baseline", "candidate", "candidate / baseline", "pairs"], rows))
    return tables


def _sizes(found: Mechanism, quantities: Sequence[Quantity]) -> list[str | int]:
    """Returns the cells of a row on updates: the values of both arms, their ratio, and the number of pairs."""
    *arms, ratio = (found.of(quantity)[ALL] for quantity in quantities)
    values = [f"{e.estimate:.3g} ({'no interval' if e.pairs == 1 else f'{e.low:.3g} to {e.high:.3g}'})" for e in arms]
    return [*values, _text(ratio), ratio.pairs]


def _text(effect: ProbeEffect | None) -> str:
    """Returns an effect with its interval, such as "1.31 (1.10 to 1.56)"."""
    if effect is None:
        return "–"
    if effect.quantity == "by_tables":
        return number_text(effect.estimate, "factor")
    if effect.not_positive:
        known = "unknown" if np.isnan(effect.estimate) else number_text(effect.estimate, "factor")
        return f"{known} (no interval: |g|^2 is not above 0 in {effect.not_positive} of {effect.pairs} pairs)"
    if effect.quantity.endswith("share"):
        low = max(effect.low, min(effect.estimate, 0))  # no share is below 0, but estimates can be
        interval = "no interval" if effect.pairs == 1 else f"{low:.1f} to {effect.high:.1f}"
        return f"{effect.estimate:.1f} ({interval})" if effect.timesteps != ALL else "100"
    unit: Unit = "percent" if effect.quantity in LOSSES else "factor"
    return interval_text(effect.estimate, effect.low, effect.high, unit)
