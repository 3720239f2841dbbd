"""Imports run downwards in one order of modules, and to the five runtime packages only."""

import ast
import sys
from pathlib import Path

import ibpcore
import ibpcore_cli

ORDER = [
    "errors",
    "ranks",
    "interval",
    "kernels",
    "relaxations",
    "steps",
    "layers",
    "folding",
    "initialization",
    "networks",
    "tracing",
    "translations",
    "convert",
    "building",
    "models",
    "precision",
    "pieces",
    "margins",
    "crown",
    "bounds",
    "roots",
    "radius",
    "soundness",
    "attacks",
    "attackable",
    "autoattack",
    "regularizers",
    "schedules",
    "metrics",
    "config",
    "methods",
    "data",
    "pickles",
    "checkpoint",
    "importing",
    "locks",
    "journals",
    "inspection",
    "loggers",
    "losses",
    "states",
    "training",
    "costs",
    "selftest",
    "certification",
    "fronts",
    "plots",
    "exporting",
    "runs",
    "hub",
    "claims",
    "pictures",
    "heatmap",
    "coloring",
    "pages",
    "attacking",
    "results",
    "processes",
    "sweeps",
    "comparison",
    "reports",
]
RUNTIME = {"torch", "torchvision", "numpy", "safetensors", "click"}
LAZY = {"matplotlib", "pyautoattack", "wandb", "huggingface_hub"}
SINCE_3_11 = {"tomllib"}
PACKAGE = Path(ibpcore.__file__).parent
COMMANDS = Path(ibpcore_cli.__file__).parent


def imported(file: Path) -> list[str]:
    """Full names of the modules that a file imports."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part(name: str) -> str:
    """`ibpcore.data.images.ImageSet` -> `data`; a bare `ibpcore` name -> ''."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in ORDER else ""


def own_part(file: Path) -> str:
    """`ibpcore/data/images.py` -> `data`."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_its_place():
    found = {own_part(file) for file in PACKAGE.rglob("*.py")}
    assert found - {"__init__"} == set(ORDER)


def test_imports_run_downwards():
    for file in PACKAGE.rglob("*.py"):
        own = own_part(file)
        if own == "__init__":
            continue
        for name in imported(file):
            if name.startswith("ibpcore"):
                assert part(name), f"{file.name} imports {name}, not a module"
                assert ORDER.index(part(name)) <= ORDER.index(own), f"{own} imports {name}"


def test_the_solvers_know_no_network():
    files = [*(PACKAGE / "roots").glob("*.py")]
    names = {part(n) for file in files for n in imported(file) if n.startswith("ibpcore")}
    assert len(files) > 4
    assert names == {"errors", "roots"}


def test_only_the_runtime_packages_are_imported():
    for file in [*PACKAGE.rglob("*.py"), *COMMANDS.rglob("*.py")]:
        tops = {name.split(".")[0] for name in imported(file)}
        foreign = tops - set(sys.stdlib_module_names) - {"ibpcore", "ibpcore_cli"} - SINCE_3_11
        assert foreign <= RUNTIME | LAZY, f"{file.name} imports {foreign}"


def test_every_package_is_installed():
    found = {
        ".".join(file.parent.relative_to(PACKAGE.parent).parts)
        for file in PACKAGE.rglob("__init__.py")
    }
    text = (Path(__file__).parent.parent / "setup.cfg").read_text()
    listed = {line.strip() for line in text.splitlines() if line.startswith("    ibpcore")}
    assert found <= listed
