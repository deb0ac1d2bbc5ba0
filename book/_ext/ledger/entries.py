"""Labels of the chapters, entries of book/ledger.toml, and the functions that they name."""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import importlib
import inspect
import re
import symtable
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
STATEMENTS = "theorem|proposition|lemma|corollary"

_root = REPOSITORY  # of the book in hand; tests put a small book here


class Fault(Exception):
    """What is wrong with an entry, in words."""


# --- labels and entries
# -------------------------------------------------------------------------------------------


def chapters(root: Path) -> list[Path]:
    """The book's pages in their order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    listed = [
        chapter["file"] for part in toc.get("parts", [toc]) for chapter in part.get("chapters", [])
    ]
    return [root / "book" / f"{name}.md" for name in [toc["root"], *listed]]


def labels_of(text: str) -> dict[str, str]:
    """Labels of a page's equations and theorems, and what each is, in their order."""
    found: dict[str, str] = {}
    inside = None  # the statement whose options are being read
    code = False
    for line in text.splitlines():
        if code:
            code = not line.startswith("```")
            continue
        code = line.startswith(("```{code-cell}", "```python", "```bash", "```{literalinclude}"))
        opening = re.match(rf"\s*(?:`{{3,}}|:{{3,}})\{{(?:prf:({STATEMENTS})|(math))\}}", line)
        option = re.match(r"\s*:label:\s*(\S+)", line)
        equation = re.match(r"\s*\$\$\s*\(([^)\s]+)\)\s*$", line)
        if opening:
            inside = opening[1] or "equation"
        elif inside and option:
            found[option[1]] = inside
        elif equation:
            found[equation[1]] = "equation"
        elif not re.match(r"\s*:\w", line):
            inside = None
    return found


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    label: str
    kind: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass
class Ledger:
    """All entries, the perturbations declared to be without effect, and what is wrong so far."""

    entries: list[Entry] = field(default_factory=list)
    equivalent: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read(root: Path) -> Ledger:
    """Read `book/ledger.toml` and compare it with the labels of the chapters."""
    written = tomllib.loads((root / "book" / "ledger.toml").read_text(encoding="utf-8"))
    ledger = Ledger(equivalent=written.pop("equivalent", {}))
    labels: dict[str, str] = {}
    for page in chapters(root):
        here = labels_of(page.read_text(encoding="utf-8"))
        ledger.faults += [
            f"{label}: {page.name} uses a label that an earlier page has"
            for label in here
            if label in labels
        ]
        labels |= here
    ledger.faults += [
        f"{label}: no entry in book/ledger.toml" for label in labels if label not in written
    ]
    ledger.faults += [
        f"{label}: an entry, but no label of a chapter" for label in written if label not in labels
    ]
    for label, kind in labels.items():
        if label in written:
            named = {key: _strings(written[label].get(key)) for key in ("function", "test")}
            if not all(named.values()) or set(written[label]) != set(named):
                ledger.faults.append(
                    f"{label}: an entry has a `function` and a `test`, each a string or a list "
                    f"of them"
                )
            else:
                ledger.entries.append(Entry(label, kind, named["function"], named["test"]))
    return ledger


def _strings(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    return (
        tuple(values)
        if isinstance(values, list) and all(isinstance(one, str) for one in values)
        else ()
    )


# --- functions, from the package and from chapters
# ----------------------------------------------------------------


def of_chapter(chapter: str, name: str) -> Callable[..., Any]:
    """A function that the cells of a chapter define, with the imports and names of other cells that
    it needs.

    Nothing else of the chapter is executed. Every call gives the same function.
    """
    return _of_chapter(_root, chapter, name)


@cache
def _of_chapter(root: Path, chapter: str, name: str) -> Callable[..., Any]:
    page = root / "book" / f"{chapter}.md"
    if not page.exists():
        raise Fault(f"there is no chapter {chapter}")
    statements = list(_statements(page.read_text(encoding="utf-8")))
    definitions = {
        i: node
        for i, (node, _) in enumerate(statements)
        if isinstance(node, ast.FunctionDef) and node.name == name
    }
    if len(definitions) != 1:
        raise Fault(
            f"{chapter} defines {name} {len(definitions)} times; the ledger needs one definition"
        )
    needed: set[int] = set()
    waiting, (definition,) = list(definitions), definitions.values()
    while waiting:
        place = waiting.pop()
        if place not in needed:
            needed.add(place)
            waiting += [
                other
                for used in _uses(statements[place][0])
                if (other := _binding(statements, used, place)) is not None
            ]
    namespace: dict[str, Any] = {"__name__": f"book.{chapter}"}
    for place in sorted(needed):
        node, line = statements[place]
        node = ast.increment_lineno(copy.deepcopy(node), line)
        exec(compile(ast.Module([node], []), str(page), "exec"), namespace)
    function = namespace[name]
    _DEFINITIONS[function] = definition
    return function


_DEFINITIONS: dict[Callable[..., Any], ast.FunctionDef] = {}


def _statements(text: str) -> Iterator[tuple[ast.stmt, int]]:
    """Top-level statements of all code cells, and the line above each cell."""
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if line.startswith("```{code-cell}"):
            start = number + 1
        elif start is not None and line.rstrip() == "```":
            cell = lines[start:number]
            if cell and cell[0] == "---":
                skipped = cell.index("---", 1) + 1
            else:
                skipped = next(
                    (i for i, one in enumerate(cell) if not re.match(r":\w", one)), len(cell)
                )
            with contextlib.suppress(SyntaxError):  # cells of magics
                for node in ast.parse("\n".join(cell[skipped:])).body:
                    yield node, start + skipped
            start = None


def _uses(node: ast.stmt) -> set[str]:
    """Names that a statement takes from the cells around it."""
    top = symtable.symtable(ast.unparse(node), "cell", "exec")
    names = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    tables = list(top.get_children())
    while tables:
        table = tables.pop()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return {name for name in names if not hasattr(builtins, name)}


def _binding(statements: Sequence[tuple[ast.stmt, int]], name: str, place: int) -> int | None:
    """The statement that binds a name, the last before its use if there is one there."""
    places = [i for i, (node, _) in enumerate(statements) if i != place and name in _binds(node)]
    return max((i for i in places if i < place), default=min(places, default=None))


def _binds(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}


def resolve(name: str) -> tuple[FunctionType, ast.FunctionDef]:
    """A function of the ledger and its definition: `imsvd_core.module:qualname` or
    `NN-chapter:name`."""
    place, _, qualname = name.partition(":")
    if re.match(r"\d\d-", place):
        named: Any = of_chapter(place, qualname)
    else:
        try:
            named = importlib.import_module(place)
            for part in qualname.split("."):
                named = getattr(named, part)
        except (ImportError, AttributeError) as error:
            raise Fault(f"there is no function {name} ({error})") from error
    function = inspect.unwrap(named)
    if not isinstance(function, FunctionType):
        raise Fault(f"{name} is no Python function")
    if function.__code__.co_freevars:
        raise Fault(f"{name} is a closure; name a function that stands by itself")
    definition = _DEFINITIONS.get(function)
    if definition is None:
        (statement,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        if not isinstance(statement, ast.FunctionDef):
            raise Fault(f"{name} is not defined by a def statement")
        definition = statement
    return function, definition
