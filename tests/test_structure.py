"""The structure of the packages: layers of imports, documented shapes, no unused code, lazy exports."""

import importlib
import inspect
import keyword
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vulture import Vulture

import convergence
import diffusion
from diffusion.losses import WEIGHTS
from diffusion.timesteps import DENSITIES

ROOT = Path(__file__).parent.parent
# Triton must be installed to import the kernels, and importing a `__main__` module runs it.
MODULES = sorted(
    module.name
    for package in (diffusion, convergence)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith((".kernels", ".__main__"))
)


def test_imports_keep_the_contracts_of_pyproject():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imported(*statements: str) -> set[str]:
    """Top-level packages that a fresh process has imported after the statements."""
    code = "; ".join(["import sys", *statements, "print(*{name.split('.')[0] for name in sys.modules})"])
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize(
    "module",
    ["diffusion", "diffusion.config", "diffusion.files", "convergence", "convergence.schema", "convergence.layout"],
)
def test_settings_and_paths_import_no_torch(module):
    assert imported(f"import {module}").isdisjoint({"torch", "numpy", "PIL", "pandas", "mlflow", "snakemake"})


@pytest.mark.parametrize("package", [diffusion, convergence], ids=lambda package: package.__name__)
def test_exported_names_resolve(package):
    names = package.__all__
    assert None not in [getattr(package, name) for name in names]
    assert set(names) <= set(dir(package))


def test_names_that_other_code_uses_are_exported():
    names = {"NoiseSchedule", "linear_betas", "cosine_betas", "p2_weight", "hybrid_loss", "ddim_timesteps"}
    assert names | {"ddim_sample", "UNet", "frechet_distance"} <= set(diffusion.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'diffusion' has no attribute 'Unet'"):
        diffusion.Unet  # noqa: B018
    with pytest.raises(ImportError):
        exec("from diffusion import Unet")


def test_exports_are_imported_at_first_use():
    assert "torch" in imported("import diffusion", "diffusion.UNet")


def public_functions(module: str) -> list[tuple[str, object, str]]:
    """(name, function, docstring) of the public functions and methods that a module defines.

    The docstring of a method includes that of its class.
    """
    content, functions = importlib.import_module(module), []
    for name, value in vars(content).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        if inspect.isclass(value):
            methods = [(key, method) for key, method in vars(value).items() if inspect.isfunction(method)]
            functions += [
                (f"{name}.{key}", method, f"{value.__doc__} {method.__doc__}")
                for key, method in methods
                if not key.startswith("_")
            ]
        elif inspect.isfunction(inspect.unwrap(value)):
            functions.append((name, inspect.unwrap(value), f"{value.__doc__}"))
    return functions


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_state_the_shapes_of_tensors(module):
    missing = []
    for name, function, docstring in public_functions(module):
        annotations = " ".join(map(str, function.__annotations__.values()))
        if re.search(r"Tensor|ndarray", annotations) and not re.search(r"\[[^\]]*\]|as `", docstring):
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("function", [*DENSITIES.values(), *WEIGHTS.values()])
def test_every_scheme_names_its_source(function):
    assert re.search(r"[A-Z]\w+ .*\b(19|20)\d\d\b", function.__doc__)


def test_no_code_is_unused():
    found = Vulture(
        ignore_decorators=["@field_validator", "@model_validator", "@model_serializer", "@*.command"],
        ignore_names=["model_config", "__getattr__", "__dir__"],
    )
    found.scavenge([ROOT / package for package in ("diffusion", "convergence", "workflow", "benchmarks")])
    # Names that only the rules use, exported names, and attributes that other libraries read.
    rules = "\n".join(path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")])
    names = {*re.findall(r"[A-Za-z_]\w*", rules), *diffusion.__all__, *convergence.__all__} - set(keyword.kwlist)
    found.scan("\n".join(names))
    read_by_libraries = {"padding", "_fc", "benchmark", "get_provided_features_list", "kwargs", "train_version"}
    read_by_libraries |= {"list_commands", "get_command", "format_commands", "maxlevel", "maxstring", "maxother"}
    read_by_libraries |= {"unraisablehook", "signals_to_handle", "evaluation"}  # plan_changes iterates over the fields
    unused = {f"{item.filename}: {item.name}" for item in found.get_unused_code() if item.name not in read_by_libraries}
    assert not unused
