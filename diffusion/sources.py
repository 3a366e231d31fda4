"""Computes a hash of the source code that determines the result of training."""

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
MODULES = (
    "averages", "gaussian", "paths", "timesteps", "losses", "schemes", "streams", "devices", "build", "gradients",
    "nets/*", "data/arrays", "data/batches", "training/adamw", "training/parallel", "training/segment",
    "training/state",
)  # fmt: skip
# The rest of these modules defines keys, whose values are part of a run's name: a new key does not change the hash.
PARTS = {
    "config": (
        "GROUP_NORM_GROUPS", "Density.learned", "Diffusion.ancestral", "Diffusion.has_bound", "LearningRateDecay.steps",
        "Model.chosen", "Train.averages", "Scheme.corrected",
    ),
    "section": ("Choice.chosen",),
}  # fmt: skip


@cache
def source_hash() -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 digest of the code that determines the result of training.

    Comments, docstrings, whitespace and the version of Python do not change the hash. The function reads the source
    files at the first call in a process. The function does not import torch.
    """
    paths = sorted(path for module in MODULES for path in PACKAGE.glob(f"{module}.py"))
    code = [f"{path.relative_to(PACKAGE).as_posix()} {normalized(path.read_text('utf-8'))}" for path in paths]
    for module, names in PARTS.items():
        tree = ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))
        code += [f"{module}.py {name} {_text(_definition(tree, name))}" for name in names]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def normalized(source: str) -> str:
    """Returns the syntax tree of Python source code as text, without docstrings and line numbers."""
    return _text(ast.parse(source))


def _definition(tree: Any, name: str) -> ast.AST:
    """Returns the part of a syntax tree that defines `name`: a class, function or constant, or "Class.method"."""
    first, _, rest = name.partition(".")
    node = next(node for node in tree.body if first in _names(node))
    return _definition(node, rest) if rest else node


def _names(node: ast.stmt) -> list[str]:
    """Returns the names that a statement defines."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []


def _text(node: object) -> str:
    """Returns a node of a syntax tree as text, without docstrings and empty fields.

    `ast.dump` is not used, because its text contains empty fields that new versions of Python add.
    """
    if isinstance(node, list):
        return f"[{', '.join(_text(item) for item in node if not _is_docstring(item))}]"
    if isinstance(node, ast.AST):
        fields = ", ".join(f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({fields})"
    return repr(node)


def _is_docstring(node: object) -> bool:
    """Returns whether a node is a statement that consists only of a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
