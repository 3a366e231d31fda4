"""The section on the mechanism in a verdict."""

from collections.abc import Callable, Sequence

import numpy as np

from convergence.analysis.mechanism import BETWEEN, LOSSES, Mechanism, ProbeEffect, Quantity
from convergence.analysis.wording import count_text
from convergence.tables import ALL, markdown_code, markdown_table

INTRODUCTION = """\
Measured at every checkpoint, on images and noise that all arms share, and averaged over training images before ratios
are taken. Brackets contain 95% t-intervals over paired seeds, not corrected for the number of bins. Losses are the
unweighted terms: above 0%, the candidate's is higher, which is worse. Gradients are those of each arm's own weighted
loss. AdamW removes a constant factor of the loss, so each arm's gradients are divided by the sum over t of p_t w_t, where
p_t is the probability of t and w_t the weight of the mse.

- Share of the variance: p_b tr(Sigma_b) over the variance of the whole gradient, where p_b is the probability of the bin
  and Sigma_b the covariance of the gradient of one image within it. The rest is the variance between the bins.
- Variance: p_b tr(Sigma_b) of the candidate over that of the baseline. It is the product of the next two columns: the
  factor that p_t and w_t alone give, if the gradient of the unweighted mse has the same variance in both arms and at all t
  of the bin, and what remains.
- Noise scale: tr(Sigma) / |g|^2, the batch size in images at which noise and gradient are equally large; candidate over
  baseline. |g|^2 is the mean of estimates that may be negative, and none of them is left out."""
EQUAL_PARAMETERS = (
    "This holds at equal parameters of the net. AdamW divides by the root of the mean squared gradient, which includes "
    "the variance, so a noisier gradient also makes the steps along the expected gradient smaller."
)
NOT_MEASURED = "Not measured: the study has no probes of both arms (section `probe`)."
GRADIENT_COLUMNS: dict[Quantity, str] = {
    "baseline_share": "share of the variance, baseline",
    "candidate_share": "candidate",
    "variance": "variance",
    "by_tables": "by p_t and w_t",
    "remaining": "remaining",
    "noise_scale": "noise scale",
}
Effects = dict[tuple[str, str], ProbeEffect]


def mechanism_section(mechanisms: Sequence[Mechanism]) -> list[str]:
    """Returns the paragraphs of the section: where candidates differ from the baseline in losses and gradients."""
    parts = ["## Mechanism", INTRODUCTION if any(mechanism.effects for mechanism in mechanisms) else NOT_MEASURED]
    for mechanism in mechanisms:
        pair = f"{markdown_code(mechanism.candidate)} against {markdown_code(mechanism.baseline)}"
        sentences = [expected_gradient(mechanism)]
        if not mechanism.effects:
            parts += [f"{pair}:", _items(sentences)]
            continue
        effects = {(effect.timesteps, effect.quantity): effect for effect in mechanism.effects}
        bins = [name for name in dict.fromkeys(name for name, _ in effects) if name not in (ALL, BETWEEN)]
        sentences += [f"Loss, {loss}: {_places(effects, bins, loss)}." for loss in LOSSES if (ALL, loss) in effects]
        if variance := effects.get((ALL, "variance")):
            sentences += [
                f"Variance of the whole gradient: **{_direction(variance)}**, {_text(variance)} times the baseline's.",
                f"Variance, bins: {_places(effects, bins, 'variance')}.",
                f"Variance, remaining: {_places(effects, bins, 'remaining')}.",
                f"Noise scale of the whole gradient: {_text(effects[ALL, 'noise_scale'])} times the baseline's.",
            ]
        subset = "held-out" if mechanism.held_out else "training"
        means = (
            f"means over {count_text(mechanism.checkpoints, 'checkpoint')} ({mechanism.first_images:,.0f} to "
            f"{mechanism.last_images:,.0f} training images), each on {mechanism.n:,} {subset} images"
        )
        parts += [f"{pair}, {means}:", _items(sentences)]
        parts += _tables(effects, [*bins, ALL])
    return parts


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def expected_gradient(mechanism: Mechanism) -> str:
    """Returns how the expected gradients of two arms are related, which follows from the arms' tables alone."""
    baseline, mse, vb = markdown_code(mechanism.baseline), mechanism.mse_factor, mechanism.vb_factor

    def times(factor: float) -> str:
        return f"that of {baseline}" if np.isclose(factor, 1, rtol=1e-9) else f"{factor:.4g} times that of {baseline}"

    if np.isnan(mechanism.scale):
        return "The expected gradients cannot be compared: a density is learned."
    if np.isnan(mse) and np.isnan(vb):
        return "The expected gradients of mse and vb differ from the baseline's by factors that depend on t."
    if np.isnan(mse):
        return f"The expected gradient of vb is {times(vb)}; that of the mse differs by a factor that depends on t."
    if np.isclose(mse, vb, rtol=1e-9) or not any(effect.quantity == "vb" for effect in mechanism.effects):
        text = f"The expected gradient is {times(mse)}."
    elif np.isnan(vb):
        text = f"The expected gradient of the mse is {times(mse)}: apart from this factor, only that of vb differs."
    else:
        text = f"The expected gradient of the mse is {times(mse)}, and that of vb is {times(vb)}."
    return f"{text} {EQUAL_PARAMETERS}"


def _places(effects: Effects, bins: Sequence[str], quantity: str) -> str:
    """Returns in which bins of timesteps a quantity is lower or higher."""
    known = {name: _direction(effects[name, quantity]) for name in bins if (name, quantity) in effects}
    groups = {word: [name for name in known if known[name] == word] for word in ("lower", "higher")}
    texts = [f"{word} at t {', '.join(names)}" for word, names in groups.items() if names]
    if "no difference shown" in known.values():
        texts.append("no difference shown elsewhere" if texts else "no difference shown at any t")
    return "; ".join(texts)


def _direction(effect: ProbeEffect) -> str:
    return "lower" if effect.high < 1 else "higher" if effect.low > 1 else "no difference shown"


def _tables(effects: Effects, bins: Sequence[str]) -> list[str]:
    """Returns a table of losses, and one of gradients if they were measured."""
    losses = [[name, *(_text(effects.get((name, loss)), _change) for loss in LOSSES), effects[name, "mse"].pairs]
              for name in bins]  # fmt: skip
    tables = [markdown_table(["timesteps", *LOSSES, "pairs"], losses)]
    if (ALL, "variance") in effects:
        rows = [*bins[:-1], BETWEEN, ALL]
        gradients = [
            [name, *(_text(effects.get((name, quantity)), _percent if quantity.endswith("share") else _factor)
                     for quantity in GRADIENT_COLUMNS), effects[name, "baseline_share"].pairs]
            for name in rows
        ]  # fmt: skip
        tables.append(markdown_table(["timesteps", *GRADIENT_COLUMNS.values(), "pairs"], gradients))
    return tables


def _factor(value: float) -> str:
    return f"{value:.3g}"


def _change(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f}%"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _text(effect: ProbeEffect | None, number: Callable[[float], str] = _factor) -> str:
    """Returns an effect with its interval: "1.31 (1.1 to 1.56)"."""
    if effect is None:
        return "–"
    if effect.quantity == "by_tables":
        return number(effect.estimate)
    interval = f"{number(effect.low)} to {number(effect.high)}"
    if effect.not_positive:
        interval = f"no interval: |g|^2 is not above 0 in {effect.not_positive} of {count_text(effect.pairs, 'pair')}"
    elif np.isinf(effect.high):
        interval = "no interval"
    return f"{'unknown' if np.isnan(effect.estimate) else number(effect.estimate)} ({interval})"
