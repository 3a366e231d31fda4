"""Writes what the documentation takes from the code: the keys of an experiment file, and the picture of the house.

python docs/generate.py        # study.md, house.dot, house.svg (the last needs graphviz)
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from convergence.schema import Experiment
from convergence.tables import markdown_table

INTRODUCTION = """\
# Every key of an experiment file

Made from `diffusion/config.py` by `python docs/generate.py`. A study is one file, `experiments/<name>.yaml`; what it
leaves out has the default. Keys without a default are needed. A mistake is told before anything is spent.
"""
FLOORS = {"diffusion": "diffusion/: the library", "workflow": "workflow/: what is done with it"}
LABELS = {
    "workflow.rules": "Snakefile, rules/*.smk",
    "workflow.scripts": "scripts/, one for each rule",
    "convergence.command.images": "python -m diffusion",
}


def study_page() -> str:
    """The reference of the experiment file, in Markdown: a table for each section of the schema, as they are named."""
    schema = Experiment.model_json_schema()
    parts, left, known = [INTRODUCTION], ["Experiment"], {"Experiment": schema, **schema["$defs"]}
    while left:
        name = left.pop(0)
        section = known.pop(name, {})
        if not section.get("properties"):  # written already, or without parameters
            continue
        needed, described = section.get("required", []), " ".join(section["description"].split())
        rows = [
            [f"`{key}`", _kind(of), _default(of, key in needed), of.get("description", "")]
            for key, of in section["properties"].items()
        ]
        parts.append(f"## {name}\n\n{described}\n\n{markdown_table(['key', 'value', 'default', ''], rows)}\n")
        left += re.findall(r"#/\$defs/(\w+)", json.dumps(section["properties"]))
    return "\n".join(parts)


def _kind(of: dict[str, Any]) -> str:
    """Type and range of a value, in words."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        return "no parameters" if name == "NoParameters" else f"[{name}](#{name.lower()})"
    if "const" in of:
        return f"`{of['const']}`"
    if "enum" in of:
        return ", ".join(f"`{value}`" for value in of["enum"])
    if either := of.get("anyOf") or of.get("oneOf"):
        return " or ".join(_kind(one) for one in either if one.get("type") != "null")
    if of["type"] == "array":
        return f"list of {_kind(of['items'])}" if "items" in of else "list"
    if of["type"] == "object":
        inner = next(iter(of.get("patternProperties", {}).values()), of.get("additionalProperties"))
        return f"name: {_kind(inner) if isinstance(inner, dict) else 'value'}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    ranges = " and ".join(f"{sign} {of[key]:g}" for key, sign in bounds.items() if key in of)
    words = {"string": "path" if of.get("format") == "path" else "text", "boolean": "true or false"}
    kind = words.get(of["type"], of["type"])
    return f"{kind} {ranges}".strip()


def _default(of: dict[str, Any], required: bool) -> str:
    if required:
        return "needed"
    default = of.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"


def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in it; Snakemake's rules are one, their scripts too."""
    found: dict[str, set[str]] = {}
    for path in sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py")):
        module = "workflow.scripts" if path.parent.name == "scripts" else f"{path.parent.name}.{path.stem}"
        if path.stem != "__init__":
            found.setdefault(module, set()).update(_imported(path.read_text(encoding="utf-8")))
    rules = [path.read_text(encoding="utf-8") for path in (ROOT / "workflow/rules").glob("*.smk")]
    lines = re.findall(r"^from .* import .*$", "\n".join(rules), re.MULTILINE)
    found["workflow.rules"] = _imported("\n".join(lines)) | {"workflow.scripts"}
    return {module: {name for name in names if name in found} - {module} for module, names in found.items()}


def _imported(code: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def house() -> str:
    """The graph of the imports in the language of graphviz. What follows from other arrows is left out."""
    graph = imports()

    def below(module: str, seen: set[str]) -> set[str]:
        for name in graph[module] - seen:
            below(name, seen.add(name) or seen)
        return seen

    lines = ["digraph house {", "  rankdir=TB; nodesep=0.15; ranksep=0.45;"]
    lines += [
        '  node [shape=box, style="rounded,filled", fontname="DejaVu Sans", fontsize=11];',
        "  edge [color=gray40];",
    ]
    colours = {"diffusion": "#dbe9f6", "workflow": "#fdebd3"}
    for package, title in FLOORS.items():
        lines += [f"  subgraph cluster_{package} {{", f'    label="{title}"; fontname="DejaVu Sans"; color=gray70;']
        for module in graph:
            if module.startswith(package):
                label = LABELS.get(module, module.partition(".")[2])
                lines.append(f'    "{module}" [label="{label}", fillcolor="{colours[package]}"];')
        lines.append("  }")
    for module, names in graph.items():
        indirect = set().union(*(below(name, set()) - {name} for name in names))
        lines += [f'  "{module}" -> "{name}";' for name in sorted(names - indirect)]
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    (DOCS / "study.md").write_text(study_page(), encoding="utf-8")
    (DOCS / "house.dot").write_text(house(), encoding="utf-8")
    subprocess.run(["dot", "-Tsvg", DOCS / "house.dot", "-o", DOCS / "house.svg"], check=True)
