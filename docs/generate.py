"""Writes the parts of the documentation that are derived from the code.

`python docs/generate.py` writes docs/study.md (the keys of a study file), docs/schema.json (its JSON schema), and
docs/imports.dot and docs/imports.svg (which module imports which). Graphviz is required for the last file.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convergence.schema import Experiment
from convergence.tables import markdown_table

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
INTRODUCTION = """\
# Keys of a study file

A study is one file `experiments/<name>.yaml` with the keys of [Experiment](#experiment). All keys are optional except
those marked as required. Mistakes are reported before any job starts. Editors complete keys and mark mistakes if the
first line of the file is `# yaml-language-server: $schema=../docs/schema.json`, as in the studies of this project.

Write numbers in decimal digits: `16`, `0.5`, `1e-4`. Other notations of YAML (`0x10`, `1:30`) are not read as numbers.
`010` is an error: write `10` for the number, or `"010"` for text. Names such as `no` or `2024` need no quotes.

This page and `schema.json` are generated from `convergence/schema.py` and `diffusion/config.py` by
`python docs/generate.py`.
"""
LARGE = 10**6  # limits from here on are not shown
COLUMNS = ["key", "value", "default", "meaning"]
PACKAGES = {"diffusion": "#dbe9f6", "convergence": "#e3f2dc", "workflow": "#fdebd3"}


def json_schema() -> str:
    """Returns the JSON schema of a study file (draft 2020-12).

    Titles are left out, because editors would show them. The defaults of sections are left out, because editors would
    insert these defaults.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Study file"}
    return json.dumps(schema | _simplified(Experiment.model_json_schema()), indent=1) + "\n"


def _simplified(value: Any) -> Any:
    if isinstance(value, list):
        return [_simplified(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _simplified(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str))
        and not (key == "default" and (item is None or item == {} or "$ref" in value or "anyOf" in value))
    }


def study_page() -> str:
    """Returns the page that documents the keys of a study file, in Markdown, with one table per section."""
    schema = Experiment.model_json_schema()
    definitions = {"Experiment": schema, **schema["$defs"]}
    parts, names = [INTRODUCTION], ["Experiment"]
    for name in names:  # grows while it is read
        section = _mapping(definitions[name])
        if not section.get("properties"):
            continue
        required, description = section.get("required", []), " ".join(section["description"].split())
        rows = [
            [f"`{key}`", _kind(value), _default(value, key in required), value.get("description", "")]
            for key, value in section["properties"].items()
        ]
        parts.append(f"## {name}\n\n{description}\n\n{markdown_table(COLUMNS, rows)}\n")
        references = re.findall(r"#/\$defs/(\w+)", json.dumps(section["properties"]))
        names += [reference for reference in dict.fromkeys(references) if reference not in names]
    return "\n".join(parts)


def _mapping(section: dict[str, Any]) -> dict[str, Any]:
    """Returns the form of a section that has keys; some sections can also be written as a string."""
    return next((form for form in section.get("anyOf", []) if "properties" in form), section)


def _kind(value: dict[str, Any]) -> str:
    """Returns the type and range of a value in words."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return "no parameters" if name == "NoParameters" else f"[{name}](#{name.lower()})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if alternatives := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(_kind(one) for one in alternatives if one.get("type") != "null")
    if value["type"] == "array":
        return f"list of {_kind(value['items'])}" if "items" in value else "list"
    if "properties" in value:
        return f"keys of [{value['title']}](#{value['title'].lower()})"
    if value["type"] == "object":
        inner = next(iter(value.get("patternProperties", {}).values()), value.get("additionalProperties"))
        return f"name: {_kind(inner)}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    shown = {key: value[key] for key in bounds if key in value and value[key] < LARGE}
    ranges = " and ".join(f"{bounds[key]} {limit:g}" for key, limit in shown.items())
    words = {"string": "path" if value.get("format") == "path" else "text", "boolean": "true or false"}
    return f"{words.get(value['type'], value['type'])} {ranges}".strip()


def _default(value: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = value.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"


def imports() -> dict[str, set[str]]:
    """Returns module -> the modules of this project that the module imports. Imports inside functions count.

    The rules of Snakemake count as one module, `workflow.rules`, and their scripts as another, `workflow.scripts`.
    """
    code: dict[str, str] = {}
    for path in sorted(path for package in ("diffusion", "convergence") for path in (ROOT / package).rglob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            code[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    code["workflow.scripts"] = "\n".join(path.read_text("utf-8") for path in (ROOT / "workflow/scripts").glob("*.py"))
    rules = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow/rules").glob("*.smk"))
    code["workflow.rules"] = "\n".join(re.findall(r"^from .* import .*$", rules, re.MULTILINE))
    graph = {module: _imported(text) & code.keys() - {module} for module, text in code.items()}
    graph["workflow.rules"].add("workflow.scripts")
    return graph


def _imported(code: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def import_graph() -> str:
    """Returns the graph of imports in the language of graphviz.

    A subpackage is one node that lists its modules. An arrow is left out if a longer path of arrows connects its two
    nodes.
    """
    modules = imports()
    members: dict[str, list[str]] = {}
    graph: dict[str, set[str]] = {}
    for module, imported in modules.items():
        node = _node(module)
        members.setdefault(node, []).append(module)
        graph.setdefault(node, set()).update({_node(name) for name in imported} - {node})
    lines = [
        "digraph imports {",
        '  nodesep=0.15; ranksep=0.35; newrank=true; fontname="DejaVu Sans";',
        '  node [shape=box, style="rounded,filled", fontname="DejaVu Sans", fontsize=11, height=0.3, width=0];',
        '  edge [color="#00000066", arrowsize=0.6];',
    ]
    for package, colour in PACKAGES.items():
        lines.append(f'  subgraph "cluster_{package}" {{ label="{package}"; style=rounded; color=gray60;')
        for node in [node for node in graph if node.startswith(f"{package}.")]:
            lines.append(f'    "{node}" [label={_label(node, members[node])}, fillcolor="{colour}"];')
        lines.append("  }")
    for node, targets in graph.items():
        indirect = {name for target in targets for name in _reachable(graph, target)}
        lines += [f'  "{node}" -> "{target}";' for target in sorted(targets - indirect)]
    return "\n".join([*lines, "}", ""])


def _node(module: str) -> str:
    """Returns `package.module`, or `package.subpackage` for a module in a subpackage."""
    return ".".join(module.split(".")[:2])


def _label(node: str, modules: list[str]) -> str:
    """Returns the name of a node, and the modules of a subpackage below it, three per line."""
    name = node.partition(".")[2]
    inner = [module.removeprefix(f"{node}.") for module in modules if module != node]
    rows = [", ".join(inner[start : start + 3]) for start in range(0, len(inner), 3)]
    small = "".join(f'<br/><font point-size="9">{row}</font>' for row in rows)
    return f"<{f'<b>{name}/</b>' if inner else name}{small}>"


def _reachable(graph: dict[str, set[str]], node: str) -> set[str]:
    """Returns all nodes that a node imports, directly or through others."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        names = graph[waiting.pop()] - found
        found |= names
        waiting += names
    return found


if __name__ == "__main__":
    (DOCS / "study.md").write_text(study_page(), encoding="utf-8")
    (DOCS / "schema.json").write_text(json_schema(), encoding="utf-8")
    (DOCS / "imports.dot").write_text(import_graph(), encoding="utf-8")
    subprocess.run(["dot", "-Tsvg", DOCS / "imports.dot", "-o", DOCS / "imports.svg"], check=True)
