"""The floors of the house, what its docstrings must tell, and that nothing in it is dead."""

import ast
import importlib
import inspect
import keyword
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vulture import Vulture

from diffusion.losses import WEIGHTS
from diffusion.timesteps import DENSITIES

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
    "unet": {"norm", "config"},
    "devices": set(),
    "data": set(),
    "prepare": {"config", "files", "progress"},
    "progress": set(),
    "files": set(),
    "weights": {"files"},
    "metrics": set(),
    "features": {"weights", "progress"},
    "timesteps": {"gaussian"},
    "losses": {"gaussian"},
    "sampling": {"gaussian", "streams"},
    "schemes": {"config", "gaussian", "losses", "timesteps"},
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


def public(module: str) -> list[tuple[str, object, object]]:
    """(name, function, whose docstring) of what a module defines for others, methods among them."""
    found = []
    content = importlib.import_module(f"diffusion.{module}")
    for name, of in vars(content).items():
        if name.startswith("_") or getattr(of, "__module__", None) != content.__name__:
            continue
        if inspect.isclass(of):
            methods = [(key, f) for key, f in vars(of).items() if inspect.isfunction(f) and not key.startswith("_")]
            found += [(f"{name}.{key}", function, of) for key, function in methods]
        elif inspect.isfunction(inspect.unwrap(of)):
            found.append((name, inspect.unwrap(of), of))
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("kernels", "__main__")])
def test_docstrings_tell_the_shapes_of_tensors(module):
    silent = []
    for name, function, whose in public(module):
        kinds = [str(of) for of in function.__annotations__.values()]
        told = f"{function.__doc__} {whose.__doc__}"
        if any(re.search(r"Tensor|ndarray", kind) for kind in kinds) and not re.search(r"\[[^\]]*\]|as `", told):
            silent.append(name)
    assert not silent


@pytest.mark.parametrize("function", [*DENSITIES.values(), *WEIGHTS.values()])
def test_every_scheme_names_its_source(function):
    assert re.search(r"(19|20)\d\d|^1 ", function.__doc__)


def test_nothing_is_dead():
    found = Vulture(ignore_decorators=["@field_validator", "@model_validator"], ignore_names=["model_config"])
    found.scavenge([PACKAGE, ROOT / "workflow", ROOT / "benchmarks"])
    # The rules use what no Python file does; the others are attributes that libraries read.
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    found.scan("\n".join(set(re.findall(r"[A-Za-z_]\w*", rules)) - set(keyword.kwlist)))
    read_by_libraries = {"padding", "_fc", "benchmark", "get_provided_features_list", "kwargs", "train_version"}
    dead = {f"{item.filename}: {item.name}" for item in found.get_unused_code() if item.name not in read_by_libraries}
    assert not dead
