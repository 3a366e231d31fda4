"""Paired comparisons of training schemes of diffusion models.

Each name in `__all__` is imported at its first use. `compare` compares two arms (training schemes) of a table of FID
curves.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Comparison": "analysis.results",
    "Effect": "analysis.effects",
    "StudyVerdict": "analysis.results",
    "compare": "analysis.comparison",
    "read_verdict": "analysis.results",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'convergence' has no attribute '{name}'")
    return getattr(import_module(f"convergence.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
