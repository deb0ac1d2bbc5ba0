"""The package's imports run one way, down the floors, never sideways."""

import ast
from pathlib import Path

import imsvd_core

PACKAGE = Path(imsvd_core.__file__).parent
FLOORS = """
cli
evaluations efficiency
launch.reproduce
launch.status
launch.graph launch.queue
launch
launch.plan
launch.submit
training launch.job launch.config
recipes arrays prepared export
evaluation.knn evaluation.linear evaluation.svm evaluation.detection methods variants arrays.tables
evaluation.features evaluation.detector loop loss information voc
coco
gradients streaming folders record
discretization distributed networks views datasets optim checkpoints results plots
files signals launch.shield attributes arrays.designs arrays.bounds
"""


def test_every_import_goes_down():
    floor = {
        name: level
        for level, line in enumerate(FLOORS.strip().splitlines())
        for name in line.split()
    }
    for path in PACKAGE.rglob("*.py"):
        name = (
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            .removesuffix("__init__")
            .rstrip(".")
        )
        if not name or name == "evaluation":
            continue
        assert name in floor, f"{name} stands on no floor"
        for other in _imports(path, floor):
            assert floor[other] > floor[name], f"{name} imports {other}, which is not below it"


def test_the_mathematics_needs_torch_alone():
    for name in (
        "discretization",
        "information",
        "streaming",
        "loss",
        "variants",
        "arrays/designs",
        "arrays/bounds",
        "arrays/tables",
    ):
        roots = {
            node.module.split(".")[0]
            if isinstance(node, ast.ImportFrom)
            else alias.name.split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        # sympy, which gives finite fields, comes with torch
        third_party = (
            roots - {"imsvd_core", "torch", "sympy"} - set(__import__("sys").stdlib_module_names)
        )
        assert not third_party, f"{name} imports {third_party}"


def _imports(path: Path, known) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("imsvd_core.")
                for alias in node.names
                if alias.name.startswith("imsvd_core.")
            }
        assert not (isinstance(node, ast.ImportFrom) and node.level), (
            f"{path} imports relatively: name the package"
        )
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("imsvd_core")
        ):
            inside = node.module.removeprefix("imsvd_core").lstrip(".")
            found |= (
                {inside}
                if inside in known
                else {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
            )
    return {name for name in found if name in known}
