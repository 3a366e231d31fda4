"""Pages of the report: the answer, what a study was trained on, where its results come from, what they cost; and
their HTML.
"""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

from convergence.answers import answer, sections
from convergence.tables import markdown_table

STYLE = """\
body { font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.35rem 0.8rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
code, pre { font-family: monospace; background: #f3f3f3; border-radius: 3px; padding: 0 0.25rem; }
pre { padding: 0.8rem; overflow-x: auto; }
"""


def to_html(markdown: str, title: str) -> str:
    """A page that needs nothing beside itself."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def front_page(introduction: str, verdict: str) -> str:
    """The first page of the report in reStructuredText: an introduction, in which `.. answers` stands for the answer on
    each study in the text of `verdict.md`."""
    told = [f"*{study}*: {answer(text) or 'compares nothing.'}" for study, text in sections(verdict).items()]
    # Code within bold, and names that end in an underscore, mean something else there.
    plain = "\n\n".join(told).replace("`", "").replace("_", r"\_")
    return introduction.replace(".. answers", plain)


def data_page(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """What each study was trained on and compared with, in Markdown; study -> manifest of its dataset."""
    rows = [
        [study, of["source"], f"{of['count']:,}", of["image_size"], of.get("licence") or "–", f"`{of['sha256']}`"]
        for study, of in manifests.items()
    ]
    head = ["study", "source", "images", "size", "licence", "sha256 of the pixels"]
    credits = sorted({of["attribution"] for of in manifests.values() if of.get("attribution")})
    return "\n\n".join(["# Data", markdown_table(head, rows), *credits])


def provenance_page(provenances: Mapping[str, Iterable[Mapping[str, Any]]], experiments: Mapping[str, str]) -> str:
    """Code, machine and settings behind each study, in Markdown.

    Args:
        provenances: study -> `provenance.json` of its checkpoints.
        experiments: study -> text of its experiment file.
    """
    parts = ["# Provenance"]
    for study, experiment in experiments.items():
        origins: dict[tuple[str, ...], list[str]] = {}
        for of in provenances[study]:
            dirty = " with uncommitted changes" if of["git_dirty"] else ""
            versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items() if version)
            origin = (f"`{of['git_commit'] or 'outside git'}`{dirty}", of["host"], of["device"], versions)
            origins.setdefault(origin, []).append(of["finished"])
        rows = [[*origin, len(times), min(times), max(times)] for origin, times in origins.items()]
        head = ["commit", "host", "device", "versions", "checkpoints", "first finished", "last finished"]
        parts += [f"## {study}", markdown_table(head, rows), f"```yaml\n{experiment.strip()}\n```"]
    return "\n\n".join(parts)


def cost_page(metrics: pd.DataFrame) -> str:
    """Training time of each arm, in Markdown, from the long table of metrics."""
    runs = metrics.groupby(["study", "arm", "seed"], sort=False)[["images", "seconds"]].max()
    rows = [
        [
            study, arm, len(of), f"{of['images'].mean():,.0f}", f"{of['seconds'].mean():,.0f}",
            f"{of['images'].sum() / of['seconds'].sum():,.0f}" if of["seconds"].sum() else "–",
            f"{of['seconds'].sum() / 3600:,.2f}",
        ]
        for (study, arm), of in runs.groupby(["study", "arm"], sort=False)
    ]  # fmt: skip
    head = ["study", "arm", "runs", "images per run", "seconds per run", "images per second", "hours in all"]
    note = (
        "Seconds of training alone, as measured in each run; where jobs shared cores or a GPU, each took longer than "
        "it would alone. Sampling and evaluation are not in them: *Statistics*, in the report's menu, has all jobs."
    )
    return "\n\n".join(["# Cost", markdown_table(head, rows), note])
