"""Questions and answers, as the text of `verdict.md` holds them."""

import re

METHOD_TITLE = "How this was computed"


def sections(verdict: str) -> dict[str, str]:
    """The question and the answer on each study in the text of `verdict.md`."""
    parts = re.split(r"^## (.+)$", verdict, flags=re.MULTILINE)
    told = {name: text.split("\n### ")[0].strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: text for name, text in told.items() if name != METHOD_TITLE}


def answer(section: str) -> str:
    """The answer in a text of `sections`: one line of Markdown, "" where it has none."""
    found = re.search(r"^\*\*Answer\.\*\* (.*)$", section, re.MULTILINE)
    return found[1] if found else ""


def plain(markdown: str) -> str:
    """A text of `answer` without its marks."""
    return markdown.replace("*", "").replace("`", "")
