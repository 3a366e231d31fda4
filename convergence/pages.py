"""Makes the pages of the report: the front page, and the pages data, provenance and cost of each study."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

from convergence.analysis.cost import Cost
from convergence.tables import markdown_table, markdown_text

STYLE = """\
body { font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.35rem 0.8rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
code, pre { font-family: monospace; background: #f3f3f3; border-radius: 3px; padding: 0 0.25rem; }
pre { padding: 0.8rem; overflow-x: auto; }
"""


def to_html(markdown: str, title: str) -> str:
    """Converts Markdown to a complete HTML page, which loads no other file."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def front_page(introduction: str, answers: Mapping[str, str | None]) -> str:
    """Returns the first page of the report in reStructuredText.

    Args:
        introduction: reStructuredText with a line `.. answers`, which the answers replace.
        answers: name of a study -> the answer of its verdict in plain text; None if the study compares nothing.
    """
    paragraphs = [
        f"*{_escape(study)}*: {_escape(answer) if answer else 'compares nothing.'}" for study, answer in answers.items()
    ]
    return introduction.replace(".. answers", "\n\n".join(paragraphs))


def _escape(text: str) -> str:
    """Returns plain text as reStructuredText."""
    return re.sub(r"([\\*`_|])", r"\\\1", text)


def data_page(study: str, manifest: Mapping[str, Any]) -> str:
    """Returns the page about the dataset of a study: source, number and size of images, licence and SHA-256.

    Args:
        study: name of the study.
        manifest: content of manifest.json of the dataset.

    Returns:
        the page in Markdown.
    """
    row = [
        markdown_text(manifest["source"]), f"{manifest['count']:,}", manifest["image_size"],
        markdown_text(manifest.get("licence") or "–"), f"`{manifest['sha256']}`",
    ]  # fmt: skip
    head = ["source", "images", "size", "licence", "SHA-256 of the pixels"]
    parts = [f"# Data of {study}", markdown_table(head, [row])]
    return "\n\n".join([*parts, markdown_text(manifest["attribution"])] if manifest.get("attribution") else parts)


def provenance_page(
    study: str, provenances: Iterable[Mapping[str, Any]], experiment: str, warnings: Iterable[str]
) -> str:
    """Returns the page with the code, the machines and the settings that produced the results of a study.

    Args:
        study: name of the study.
        provenances: content of `provenance.json` of each checkpoint of the study.
        experiment: text of the study file.
        warnings: warnings of the verdict, for instance that the code has changed since training.

    Returns:
        the page in Markdown.
    """
    origins: dict[tuple[str, ...], list[str]] = {}
    for facts in provenances:
        dirty = " with uncommitted changes" if facts["git_dirty"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
        origin = (
            f"`{facts['git_commit'] or 'none: no git repository contains this code'}`{dirty}",
            *(f"`{facts[key]}`" if facts.get(key) else "–" for key in ("source_hash", "tables_hash")),
            *map(markdown_text, (facts["host"], facts["device"], versions)),
        )
        origins.setdefault(origin, []).append(facts["finished"])
    rows = [[*origin, len(times), min(times), max(times)] for origin, times in origins.items()]
    head = [
        "commit", "source hash", "tables hash", "host", "device", "versions", "checkpoints", "first finished",
        "last finished",
    ]  # fmt: skip
    note = (
        "The source hash is that of the code that training uses. The tables hash is that of an arm's timestep density "
        "and loss weights. The untrained net has no tables."
    )
    parts = [f"# Provenance of {study}", *(f"**Warning.** {markdown_text(warning)}" for warning in warnings)]
    fence = max(["```", *(f"{run}`" for run in re.findall("`+", experiment))], key=len)
    parts += [markdown_table(head, rows), note, "## Study file", f"{fence}yaml\n{experiment.strip()}\n{fence}"]
    return "\n\n".join(parts)


def cost_page(study: str, metrics: pd.DataFrame, costs: Sequence[Cost]) -> str:
    """Returns the page with the cost of each arm of a study: seconds per 1000 training images, timed alone.

    Args:
        study: name of the study.
        metrics: table of the metrics of the study (`convergence.tables`).
        costs: cost of each arm; not empty.

    Returns:
        the page in Markdown.
    """
    runs = metrics.groupby(["arm", "seed"], sort=False)["images"].max()
    rows = []
    for cost in costs:
        images = runs[cost.arm]
        hours = images.sum() / 1000 * cost.seconds_per_1000_images / 3600
        rows.append([cost.arm, *cost.cells, len(images), f"{images.mean():,.0f}", f"{hours:,.3g}"])
    head = ["arm", "seconds per 1000 images", "ratio to the baseline", "runs", "images per run", "hours of all runs"]
    rounds, device = costs[0].rounds, markdown_text(costs[0].device)
    note = (
        f"Training steps of all arms were timed alone, in turns, in {rounds} rounds on {device}. The 95% intervals are "
        "over rounds, and cover neither other machines nor other times. Hours are these seconds times the training "
        "images: of one process, without sampling and evaluation. The jobs of a study take longer when they share "
        "cores or a GPU; *Statistics* in the menu of the report shows their time."
    )
    return "\n\n".join([f"# Cost of {study}", markdown_table(head, rows), note])
