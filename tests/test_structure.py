"""The floors of the house: which module may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusion"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Ours that a module may import, beside StudyError from the package itself; other modules stand above these.
ALLOWED = {
    "config": set(),
    "streams": set(),
    "gaussian": set(),
    "norm": {"kernels"},
    "kernels": {"norm"},
    "unet": {"norm"},
    "devices": set(),
    "data": set(),
    "prepare": {"files"},
    "files": set(),
    "weights": set(),
    "metrics": set(),
    "features": {"weights"},
    "timesteps": {"gaussian"},
    "losses": {"gaussian"},
    "sampling": {"gaussian", "streams"},
}


def imports(module: str) -> set[str]:
    """Dotted names of all that a module imports, anywhere in it: `diffusion.gaussian.at`, `torch`."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(part for part in ("diffusion" if node.level else "", node.module) if part)
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", ALLOWED)
def test_lower_floors_import_only_what_lies_below(module):
    ours = {name for name in imports(module) if name.split(".")[0] == "diffusion"} - {"diffusion.StudyError"}
    assert {(name.split(".") + [""])[1] for name in ours} <= ALLOWED[module]


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_the_library_knows_nothing_of_the_workflow(module):
    assert {name.split(".")[0] for name in imports(module)}.isdisjoint({"workflow", "snakemake", "mlflow"})


def test_config_needs_no_torch():
    code = "import sys, diffusion.config; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
