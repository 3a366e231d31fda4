"""A hash of the code that training computes with."""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# Configuration is not in the list: its values are part of a run's name.
MODULES = (
    "gaussian", "timesteps", "losses", "schemes", "streams", "devices", "build", "nets/*", "data/arrays",
    "data/batches", "training/parallel", "training/state",
)  # fmt: skip


@cache
def source_hash() -> str:
    """Returns 16 hexadecimal digits of a SHA-256 digest of the code that training computes with.

    Comments, docstrings and whitespace do not change it, nor does the version of Python. Torch is not imported. The
    files are read at the first call of a process.
    """
    paths = sorted(path for module in MODULES for path in PACKAGE.glob(f"{module}.py"))
    code = "\n".join(f"{path.relative_to(PACKAGE).as_posix()} {normalized(path.read_text('utf-8'))}" for path in paths)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def normalized(source: str) -> str:
    """Returns the syntax tree of Python source as text, without docstrings and without positions in the file."""
    return _text(ast.parse(source))


def _text(node: object) -> str:
    """Returns a node as text. `ast.dump` is not used, because it prints new, empty fields in each Python version."""
    if isinstance(node, list):
        return f"[{', '.join(_text(item) for item in node if not _is_docstring(item))}]"
    if isinstance(node, ast.AST):
        fields = ", ".join(f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({fields})"
    return repr(node)


def _is_docstring(node: object) -> bool:
    """Whether a node is a string that stands alone as a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
