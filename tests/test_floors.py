"""The package's imports run one way, down the floors of the house, never in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import imsvd_core

PACKAGE = Path(imsvd_core.__file__).parent
#: Files and folders of the package, from the roof to the ground: one imports only what is below.
FLOORS = """
cli
commands
launch
runs
recipes
evaluation
engine
methods export
data arrays variants weights
views networks loss information plots
streaming
discretization results
system
distributed
"""
MATHEMATICS = "discretization information streaming loss variants arrays"


def test_every_import_goes_down():
    floor = {name: n for n, line in enumerate(FLOORS.strip().splitlines()) for name in line.split()}
    for path, imported in _imports().items():
        room = path.split(".")[0]
        assert room in floor, f"{room} stands on no floor"
        for other in imported:
            below = other.split(".")[0]
            assert below == room or floor[below] > floor[room], f"{path} imports {other}"


def test_no_imports_close_a_circle():
    TopologicalSorter(_imports()).prepare()


def test_the_mathematics_needs_torch_alone():
    for name in MATHEMATICS.split():
        place = PACKAGE / name
        for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            roots = {module.split(".")[0] for module in _modules(path)}
            # sympy, which gives finite fields, comes with torch
            third_party = roots - {"imsvd_core", "torch", "sympy"} - set(sys.stdlib_module_names)
            assert not third_party, f"{path.name} imports {third_party}"


def _imports() -> dict[str, set[str]]:
    """Of every module of the package: the modules of the package that it imports."""
    names = {_name(path): path for path in PACKAGE.rglob("*.py")}
    del names[""]
    imports = {}
    for name, path in names.items():
        modules = (module.removeprefix("imsvd_core.") for module in _modules(path))
        imports[name] = {module for module in modules if module in names} - {name}
    return imports


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _modules(path: Path) -> set[str]:
    """All that a file may import; of `from a import b`, a.b if that is a module, else a."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively: name the package"
            for alias in node.names:
                inner = PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                modules.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return modules
