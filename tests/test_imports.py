"""Imports run downwards through the packages, in no circle, and to the runtime packages only."""

import ast
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import ibpcore
import ibpcore_cli

LEVELS = [
    {"cgroups", "choices", "errors", "precision", "progress", "threads", "wording"},
    {"distributed", "bounds", "roots"},
    {"io", "data"},
    {"nn"},
    {"certification", "interop"},
    {"attacks"},
    {"inspection"},
    {"training", "visualization"},
    {"experiments", "selftest"},
    {"hub"},
]
"""From the ground up. Within a level packages may import each other, though not in a circle."""
RUNTIME = {"torch", "torchvision", "numpy", "safetensors", "click"}
LAZY = {"matplotlib", "pyautoattack", "wandb", "huggingface_hub", "optuna"}
SINCE_3_11 = {"tomllib"}
PACKAGE = Path(ibpcore.__file__).parent
PUBLIC = PACKAGE / "__init__.py"
COMMANDS = Path(ibpcore_cli.__file__).parent
MODULES = {
    ".".join(("ibpcore", *file.relative_to(PACKAGE).with_suffix("").parts)): file
    for file in PACKAGE.rglob("*.py")
}


def imported(file: Path) -> list[str]:
    """Full names of what a file imports."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_of(name: str) -> str:
    """`ibpcore.data.images.ImageSet` -> `ibpcore.data.images`; a package is its `__init__`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        for found in (module, f"{module}.__init__"):
            if found in MODULES:
                return found
    raise AssertionError(f"no module {name}")


def part_of(module: str) -> str:
    """`ibpcore.data.images` -> `data`."""
    return module.split(".")[1]


IMPORTS = {
    module: {module_of(name) for name in imported(file) if name.startswith("ibpcore")}
    for module, file in MODULES.items()
    if module != "ibpcore.__init__"
}
PARTS = {
    part: {
        part_of(found) for module in IMPORTS if part_of(module) == part for found in IMPORTS[module]
    }
    - {part}
    for part in {part_of(module) for module in IMPORTS}
}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """What is left when all that import nothing left are taken away, again and again."""
    left = dict(arrows)
    while free := [name for name, found in left.items() if not (found & left.keys()) - {name}]:
        for name in free:
            del left[name]
    return sorted(left)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


def test_every_package_has_its_level():
    assert set(PARTS) == set().union(*LEVELS)


def test_imports_run_downwards():
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    for module, found in IMPORTS.items():
        for other in found:
            assert other != "ibpcore.__init__", f"{module} imports the whole package"
            below = level[part_of(other)] <= level[part_of(module)]
            assert below, f"{module} imports {other}"


def test_no_packages_import_each_other_in_a_circle():
    assert circle(PARTS) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(IMPORTS) == []


def test_bounds_know_no_module():
    for module, file in MODULES.items():
        if part_of(module) == "bounds":
            names = {
                node.attr
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Attribute)
            }
            assert "Module" not in names, f"{module} knows nn.Module"


def test_the_solvers_know_no_network():
    modules = [module for module in IMPORTS if part_of(module) == "roots"]
    assert len(modules) > 4
    assert PARTS["roots"] == {"errors"}


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


def test_the_public_names_are_the_imports_that_type_checkers_see():
    (block,) = [node for node in ast.parse(PUBLIC.read_text()).body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == ibpcore._HOMES
    assert sorted(seen) == sorted(ibpcore.__all__)
    for name, home in ibpcore._HOMES.items():
        assert getattr(ibpcore, name) is getattr(import_module(home), name)
    assert {*ibpcore._HOMES, "__version__"} <= set(dir(ibpcore))
    assert ibpcore.__version__ == version("ibpcore")
    with pytest.raises(AttributeError, match="no attribute 'cnn8'"):
        _ = ibpcore.cnn8
