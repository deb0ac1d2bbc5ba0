"""The formula ledger: every labelled formula names its function and its test, and the test must bite.

    python book/_ext/ledger.py               # every label: perturb its function, watch its test fail
    python book/_ext/ledger.py eq-loss       # one label, with every perturbation
    python book/_ext/ledger.py --json FILE   # and what was found, for machines

A perturbation is a small change of a function: a sign, a factor or an index, at one place of its source or in its
result. Its code object is swapped in place, in a forked process, so that whoever holds a reference sees the change.
The tests are collected once; each perturbation runs them in a process of its own.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import copy
import fcntl
import gc
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import symtable
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
AT_MOST = 8  # perturbations of one function
AT_LEAST = 2  # that its test must catch, whatever else crashes
SECONDS = 30.0  # that a perturbed test may take; one that takes longer never ends
KINDS = ("sign", "factor", "index")
STATEMENTS = "theorem|proposition|lemma|corollary"

_root = REPOSITORY  # of the book in hand; tests put a small book here


class Fault(Exception):
    """What is wrong with an entry, in words."""


# --- labels and entries -------------------------------------------------------------------------------------------


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
                    f"{label}: an entry has a `function` and a `test`, each a string or a list of them"
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


# --- functions, from the package and from chapters ----------------------------------------------------------------


def of_chapter(chapter: str, name: str) -> Callable[..., Any]:
    """A function that the cells of a chapter define, with the imports and names of other cells that it needs.

    Nothing else of the chapter is executed. Every call gives the same function.
    """
    return _of_chapter(_root, chapter, name)


@cache
def _of_chapter(root: Path, chapter: str, name: str) -> Callable[..., Any]:
    page = root / "book" / f"{chapter}.md"
    if not page.exists():
        raise Fault(f"there is no chapter {chapter}")
    statements = list(_statements(page.read_text(encoding="utf-8")))
    places = [
        i
        for i, (node, _) in enumerate(statements)
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if len(places) != 1:
        raise Fault(
            f"{chapter} defines {name} {len(places)} times; the ledger needs one definition"
        )
    needed, waiting = set(), [places[0]]
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
    _DEFINITIONS[function] = statements[places[0]][0]
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
    """A function of the ledger and its definition: `imsvd_core.module:qualname` or `NN-chapter:name`."""
    place, _, qualname = name.partition(":")
    if re.match(r"\d\d-", place):
        function = of_chapter(place, qualname)
    else:
        try:
            function = importlib.import_module(place)
            for part in qualname.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError) as error:
            raise Fault(f"there is no function {name} ({error})") from error
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        raise Fault(f"{name} is no Python function")
    if function.__code__.co_freevars:
        raise Fault(f"{name} is a closure; name a function that stands by itself")
    definition = _DEFINITIONS.get(function)
    if definition is None:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    return function, definition


# --- perturbations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perturbation:
    """A changed code object for a function."""

    kind: str
    id: str  #: what is changed into what; stays the same when lines move
    code: CodeType = field(compare=False, repr=False)


@dataclass
class Site:
    """A place in a definition where one thing can be changed."""

    kind: str
    node: ast.AST
    change: Callable[[], ast.AST]  # changes the tree; returns the new node
    whole: ast.AST  # the expression shown


AXIS_METHODS = {
    "sum",
    "mean",
    "softmax",
    "log_softmax",
    "logsumexp",
    "argmax",
    "argmin",
    "amax",
    "amin",
    "flatten",
    "cumsum",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "transpose",
    "movedim",
    "prod",
    "var",
    "std",
    "max",
    "min",
    "norm",
}
OPERATORS = {
    ast.Add: (ast.Sub, "sign"),
    ast.Sub: (ast.Add, "sign"),
    ast.Mult: (ast.Div, "factor"),
    ast.Div: (ast.Mult, "factor"),
}
METHODS = {
    "mul": ("div", "factor"),
    "mul_": ("div_", "factor"),
    "div": ("mul", "factor"),
    "div_": ("mul_", "factor"),
    "add": ("sub", "sign"),
    "add_": ("sub_", "sign"),
    "sub": ("add", "sign"),
    "sub_": ("add_", "sign"),
}
RESULTS = {"sign": "negated", "factor": "scaled", "index": "rolled"}


def perturbations(name: str, without_effect: Sequence[str] = ()) -> list[Perturbation]:
    """Every perturbation of a function in the order of trial: of its result, then of its source, the kinds in turn.

    Those `without_effect`, given by their ids, are passed over; one of them that is no site is a fault.
    """
    _, definition = resolve(name)
    of_result = [_of_result(definition, kind) for kind in KINDS]
    of_source: dict[str, list[Perturbation]] = {kind: [] for kind in KINDS}
    ids = {one.id for one in of_result}
    for number in range(len(list(_sites(definition)))):
        changed = copy.deepcopy(definition)
        site = list(_sites(changed))[number]
        before = ast.unparse(site.whole)
        shown = site.whole is site.node
        after = site.change()
        label = f"{site.kind}: {before} → {ast.unparse(after if shown else site.whole)}"
        same = sum(one == label or one.startswith(f"{label} #") for one in ids)
        label += f" #{same + 1}" if same else ""
        ids.add(label)
        of_source[site.kind].append(Perturbation(site.kind, label, _compiled(changed)))
    if strange := set(without_effect) - ids:
        raise Fault(
            f"{name} has no perturbation {sorted(strange)[0]!r}, which is declared to be without effect"
        )
    in_turn = [
        (turn, KINDS.index(kind), one)
        for kind in KINDS
        for turn, one in enumerate(_spread(of_source[kind]))
    ]
    ordered = of_result + [one for *_, one in sorted(in_turn, key=lambda place: place[:2])]
    return [one for one in ordered if one.id not in without_effect]


def _spread(these: list[Perturbation]) -> list[Perturbation]:
    """An order in which the first few, however many, come from all over the source."""
    golden = (math.sqrt(5) - 1) / 2
    return [these[i] for i in sorted(range(len(these)), key=lambda i: i * golden % 1)]


def _sites(definition: ast.FunctionDef) -> Iterator[Site]:
    for i, statement in enumerate(definition.body):
        yield from _within(statement, definition.body, i, None)


def _within(
    node: ast.AST, holder: Any, key: Any, context: str | None, around: ast.AST | None = None
) -> Iterator[Site]:
    """Sites in and below a node, which `holder` holds under `key`; the context tells indices from numbers.

    `around` is the expression in which a literal is shown.
    """

    def put(new: ast.AST) -> ast.AST:
        if isinstance(holder, list):
            holder[key] = new
        else:
            setattr(holder, key, new)
        return new

    if _is_check(node):
        return
    literal = _integer(node) if context in ("axis", "index", "range") else None
    if literal is not None:
        yield Site(
            "index",
            node,
            lambda: put(ast.parse(str(_other_index(literal, context)), mode="eval").body),
            around or node,
        )
        return
    if (
        isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and context != "compared"
    ):
        number = node.value
        other = number + 1 if isinstance(number, int) else 1.5 * number if number else 0.5
        yield Site("factor", node, lambda: put(ast.Constant(other)), around or node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield Site("index" if context == "index" else "sign", node, lambda: put(node.operand), node)
    elif (
        isinstance(node, ast.BinOp | ast.AugAssign)
        and type(node.op) in OPERATORS
        and not _is_text(node)
    ):
        operator, kind = OPERATORS[type(node.op)]

        def swap() -> ast.AST:
            node.op = operator()
            return node

        yield Site("index" if context == "index" else kind, node, swap, node)
    elif (
        isinstance(node, ast.Compare)
        and context == "index"
        and isinstance(node.ops[0], ast.Eq | ast.NotEq)
    ):

        def flip() -> ast.AST:
            node.ops[0] = ast.NotEq() if isinstance(node.ops[0], ast.Eq) else ast.Eq()
            return node

        yield Site("index", node, flip, node)
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield Site("index", node, lambda: put(node.value), node)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in METHODS
    ):
        method, kind = METHODS[node.func.attr]

        def rename() -> ast.AST:
            node.func.attr = method
            return node

        yield Site(kind, node, rename, node)
    if isinstance(node, ast.Subscript | ast.Call | ast.BinOp | ast.Compare):
        around = node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(
            node, ast.Call
        ):
            continue  # of a nested function or a declaration
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield from _within(
                    child,
                    value if i is not None else node,
                    i if i is not None else name,
                    _context(node, name, child, context),
                    around,
                )


def _context(node: ast.AST, name: str, child: ast.AST, context: str | None) -> str | None:
    """What a literal below `node` means."""
    if isinstance(node, ast.Subscript):
        return "index" if name == "slice" else None
    if isinstance(node, ast.keyword):
        return "axis" if node.arg in ("dim", "dims", "axis") else None
    if isinstance(node, ast.Call):
        called = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if name == "args" and called in AXIS_METHODS:
            return "axis"
        return "range" if name == "args" and called in ("range", "arange") else None
    if isinstance(node, ast.Compare):
        return context if context == "index" else "compared"
    if isinstance(node, ast.Tuple | ast.List | ast.Slice | ast.BinOp | ast.UnaryOp):
        return context
    return None


def _is_check(node: ast.AST) -> bool:
    """Whether a node checks arguments, speaks to people or chooses a precision: nothing in it is a formula."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.withitem):
        return True
    if isinstance(node, ast.If):
        return not node.orelse and all(isinstance(one, ast.Raise) for one in node.body)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "print" or node.func.id.lstrip("_").startswith("check")
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_text(node: ast.BinOp | ast.AugAssign) -> bool:
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(
        isinstance(side, ast.JoinedStr | ast.List | ast.Tuple)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _integer(node: ast.AST) -> int | None:
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and (inner := _integer(node.operand)) is not None
    ):
        return -inner
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def _other_index(index: int, context: str | None) -> int:
    if context == "axis":  # one that a table with two axes has too
        return {0: 1, 1: 0, -1: -2, -2: -1}.get(index, index - 1)
    return index + 1 if index >= 0 else index - 1


def _of_result(definition: ast.FunctionDef, kind: str) -> Perturbation:
    changed = copy.deepcopy(definition)
    helper = f"__import__('ledger').{RESULTS[kind]}"
    waiting: list[ast.AST] = list(changed.body)
    returns = False
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Call(ast.parse(helper, mode="eval").body, [node.value], [])
            returns = True
        elif not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    if not returns:
        raise Fault(f"{definition.name} returns nothing that could be perturbed")
    return Perturbation(kind, f"{kind}: the result {RESULTS[kind]}", _compiled(changed))


def _compiled(definition: ast.FunctionDef) -> CodeType:
    """The code object of a definition; its defaults and annotations stay those of the function that gets it."""
    definition = copy.deepcopy(definition)
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    for one in (
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ):
        if one is not None:
            one.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [one and ast.Constant(None) for one in arguments.kw_defaults]
    namespace: dict[str, Any] = {}
    tree = ast.fix_missing_locations(ast.Module([definition], []))
    exec(compile(tree, f"<{definition.name}, perturbed>", "exec"), namespace)
    return namespace[definition.name].__code__


# What the perturbed functions call on their results. They run in the forked process only.

_had_an_index = False


def negated(result: Any) -> Any:
    """The result with the opposite sign, everywhere."""
    return _each(result, lambda x: ~x if _is_truth(x) else -x)


def scaled(result: Any) -> Any:
    """The result times 1.001; integers become the next ones, truths the opposite."""

    def scale(x: Any) -> Any:
        if _is_truth(x):
            return ~x
        whole = isinstance(x, int) or (
            hasattr(x, "is_floating_point") and not x.is_floating_point()
        )
        return x + 1 if whole else x * 1.001

    return _each(result, scale)


def rolled(result: Any) -> Any:
    """The result moved by one place along its last axis; numbers have no index and stay."""

    def roll(x: Any) -> Any:
        global _had_an_index
        axes = [axis for axis, size in enumerate(getattr(x, "shape", ())) if size > 1]
        if not axes:
            return x
        _had_an_index = True
        return x.roll(1, axes[-1])

    return _each(result, roll)


def _is_truth(x: Any) -> bool:
    return isinstance(x, bool) or str(getattr(x, "dtype", "")) == "torch.bool"


def _each(result: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*(_each(one, change) for one in result))
    if isinstance(result, tuple | list):
        return type(result)(_each(one, change) for one in result)
    if isinstance(result, dict):
        return {key: _each(one, change) for key, one in result.items()}
    if is_dataclass(result) and not isinstance(result, type):
        return replace(
            result,
            **{key: _each(getattr(result, key), change) for key in result.__dataclass_fields__},
        )
    return change(result) if isinstance(result, int | float) or hasattr(result, "dtype") else result


# --- tests, run in forks ------------------------------------------------------------------------------------------

CAUGHT, SURVIVED, NO_INDEX, BROKEN, ENDLESS = (
    "caught",
    "survived",
    "no index",
    "does not run",
    "never ends",
)


@dataclass
class Trial:
    """What became of one perturbation."""

    function: str
    kind: str
    id: str
    outcome: str
    by: str = ""  #: the test that caught it, or what stopped it


@dataclass
class Job:
    """Functions and the tests that must catch their perturbations; labels may share one."""

    functions: tuple[str, ...]
    tests: tuple[str, ...]
    trials: list[Trial] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def tried(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.outcome in (CAUGHT, SURVIVED, ENDLESS)]

    def caught(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.outcome in (CAUGHT, ENDLESS)]


class Runner:
    """A pytest plug-in that runs, in place of the test session, every job in forks of the collecting process."""

    def __init__(self, jobs: Sequence[Job], equivalent: dict[str, dict[str, str]]):
        self.jobs, self.equivalent = jobs, equivalent
        self.failures: list[
            tuple[str, str, bool]
        ] = []  # test, what it said, whether it was the test's own verdict
        self.passed = 0
        self.sound: dict[
            str, str
        ] = {}  # tests that were run unperturbed, and what is wrong with them

    def pytest_runtestloop(self, session: Any) -> bool:
        gc.collect()
        gc.freeze()  # or every fork would copy the pages that its collector touches
        for job in self.jobs:
            items = []
            for test in job.tests:
                found = [
                    item
                    for item in session.items
                    if item.nodeid == test or item.nodeid.startswith(test + "[")
                ]
                items.append(found)
                if test not in self.sound:
                    self.sound[test] = self._unperturbed(test, found)
                if self.sound[test]:
                    job.faults.append(self.sound[test])
            if not job.faults:
                self._perturb(job, [item for found in items for item in found])
        return True

    def _unperturbed(self, test: str, items: list[Any]) -> str:
        if not items:
            return f"there is no test {test}"
        outcome, said = self._run(items, None, None)
        return (
            "" if outcome == SURVIVED else f"{test} does not pass without any perturbation: {said}"
        )

    def _perturb(self, job: Job, items: list[Any]) -> None:
        for name in job.functions:
            try:
                function, _ = resolve(name)
                chosen = perturbations(name, tuple(self.equivalent.get(name, ())))
            except Fault as fault:
                job.faults.append(str(fault))
                continue
            for one in chosen:
                if sum(trial.function == name for trial in job.tried()) == AT_MOST:
                    break
                outcome, said = self._run(
                    items, function, one.code, roll=RESULTS["index"] in one.id
                )
                job.trials.append(Trial(name, one.kind, one.id, outcome, said))
                if outcome == SURVIVED:
                    job.faults.append(f"nothing caught in {name}: {one.id}")
            count = sum(trial.function == name and trial.outcome == CAUGHT for trial in job.trials)
            if count < AT_LEAST:
                job.faults.append(
                    f"{count} perturbations of {name} are caught, and {AT_LEAST} must be"
                )
        for test in job.tests:
            if not job.faults and not any(
                trial.by.startswith(test) for trial in job.trials if trial.outcome == CAUGHT
            ):
                job.faults.append(f"{test} catches nothing that those before it do not catch")

    def _run(
        self,
        items: list[Any],
        function: FunctionType | None,
        code: CodeType | None,
        roll: bool = False,
    ) -> tuple[str, str]:
        """Run items in a fork, with a function's code exchanged, up to the first that fails by its own verdict."""
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(here)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            try:
                if function is not None:
                    function.__code__ = code
                answer = self._verdict(items, roll)
            except BaseException as error:
                answer = (BROKEN, repr(error)[:200])
            os.write(there, json.dumps(answer).encode())
            os._exit(0)
        os.close(there)
        return _wait(child, here)

    def _verdict(self, items: list[Any], roll: bool) -> tuple[str, str]:
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failures and self.failures[-1][2]:
                return CAUGHT, self.failures[-1][0]
        if self.failures:
            return BROKEN, "{}: {}".format(*self.failures[0])
        if roll and not _had_an_index:
            return NO_INDEX, "the result is a number"
        return (SURVIVED, "") if self.passed else (BROKEN, f"{items[0].nodeid}: skipped")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        """A perturbation counts as caught if the test says so itself, and not if the function no longer runs."""
        if call.excinfo is not None:
            kinds = {kind.__name__ for kind in call.excinfo.type.__mro__}
            own = report.when == "call" and bool(
                kinds & {"AssertionError", "Failed", "GradcheckError"}
            )
            self.failures.append(
                (node.nodeid, f"{call.excinfo.typename}: {call.excinfo.value}"[:300], own)
            )


def _wait(child: int, pipe: int) -> tuple[str, str]:
    deadline, pause = time.monotonic() + SECONDS, 0.001
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(pipe)
            return ENDLESS, f"stopped after {SECONDS:g} seconds"
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    with os.fdopen(pipe, "rb") as answer:
        found = answer.read()
    return tuple(json.loads(found)) if found else (BROKEN, "the process died")


# --- the whole ledger ---------------------------------------------------------------------------------------------


def check(root: Path = REPOSITORY, only: Sequence[str] = ()) -> tuple[Ledger, dict[str, Job]]:
    """Try every perturbation of the ledger, or of some labels; returns it with each label's job."""
    global _root
    _root = root
    ledger = read(root)
    if strange := set(only) - {entry.label for entry in ledger.entries}:
        raise SystemExit(f"no entry in the ledger: {', '.join(sorted(strange))}")
    jobs: dict[tuple[tuple[str, ...], tuple[str, ...]], Job] = {}
    of_label = {}
    for entry in ledger.entries:
        if not only or entry.label in only:
            of_label[entry.label] = jobs.setdefault(
                (entry.functions, entry.tests), Job(entry.functions, entry.tests)
            )
    named = {name for entry in ledger.entries for name in entry.functions}
    ledger.faults += [
        f"[equivalent] names {name}, which no entry names"
        for name in ledger.equivalent
        if name not in named
    ]
    if jobs:
        os.environ["OMP_NUM_THREADS"] = (
            "1"  # for torch, when the tests import it: a process with a pool of threads must not fork
        )
        import pytest

        files = sorted({test.split("::")[0] for job in jobs.values() for test in job.tests})
        runner, said = Runner(list(jobs.values()), ledger.equivalent), io.StringIO()
        arguments = [
            *(str(root / file) for file in files if (root / file).exists()),
            f"--rootdir={root}",
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:timeout",
            "-W",
            "ignore",
        ]
        with contextlib.redirect_stdout(said), contextlib.chdir(root):
            status = pytest.main(arguments, plugins=[runner])
        if status not in (0, 5):
            ledger.faults.append(f"the tests cannot be collected:\n{said.getvalue()[-4000:]}")
    for label, job in of_label.items():
        ledger.faults += [f"{label}: {fault}" for fault in job.faults]
    return ledger, of_label


def totals(jobs: dict[str, Job]) -> dict[str, int]:
    """Counts over all labels; what labels share counts once."""
    distinct = {id(job): job for job in jobs.values()}.values()
    return {
        "labels": len(jobs),
        "functions": len({name for job in distinct for name in job.functions}),
        "tests": len({name for job in distinct for name in job.tests}),
        "tried": sum(len(job.tried()) for job in distinct),
        "caught": sum(len(job.caught()) for job in distinct),
    }


def found(root: Path = REPOSITORY) -> dict[str, Any]:
    """What the checker finds, from a fresh process, or from the last one if nothing that it reads has changed.

    Only a ledger without faults is kept, in _build/ledger.
    """
    digest = hashlib.sha256(sys.version.encode())
    files = [
        path
        for folder, ending in (
            ("imsvd_core", "py"),
            ("tests", "py"),
            ("book", "md"),
            ("book/_ext", "py"),
        )
        for path in (root / folder).rglob(f"*.{ending}")
    ]
    for path in sorted(
        [*files, root / "_toc.yml", root / "book" / "ledger.toml", root / "requirements.txt"]
    ):
        if path.exists():
            digest.update(
                f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
            )
    folder = root / "_build" / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{digest.hexdigest()[:16]}.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the build and the tests may ask at the same time
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as scratch:
            answer = Path(scratch, "found.json")
            environment = {
                key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
            }
            done = subprocess.run(
                [sys.executable, __file__, "--root", str(root), "--json", str(answer)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment | {"OMP_NUM_THREADS": "1"},
            )
            if not answer.exists():
                raise RuntimeError(
                    f"the formula ledger could not be checked:\n{done.stdout[-4000:]}"
                )
            text = answer.read_text(encoding="utf-8")
        if done.returncode == 0:
            for old in folder.glob("*.json"):
                old.unlink()
            kept.write_text(text, encoding="utf-8")
    return json.loads(text)


def markdown(found: dict[str, Any]) -> list[str]:
    """The ledger's table and its totals, as lines of MyST."""
    counts = found["totals"]
    lines = [
        f"{counts['labels']} formulas and theorems, {counts['functions']} functions, {counts['tests']} tests: "
        f"{counts['tried']} perturbations tried, {counts['caught']} caught.",
        "",
        "| Formula | Caught | Computed by | Checked by |",
        "|:--|:--|:--|:--|",
    ]
    for label, job in found["labels"].items():
        kind, of_job = (
            job["kind"],
            Job(job["functions"], job["tests"], [Trial(**trial) for trial in job["trials"]]),
        )
        place = f"Eq. {{eq}}`{label}`" if kind == "equation" else f"{{prf:ref}}`{label}`"
        functions = " ".join(f"`{name.removeprefix('imsvd_core.')}`" for name in of_job.functions)
        tests = "; ".join(
            f"{name.split('::')[-1].removeprefix('test_').replace('_', ' ')} (`{Path(name.split('::')[0]).name}`)"
            for name in of_job.tests
        )
        lines.append(
            f"| {place} | {len(of_job.caught())} of {len(of_job.tried())} | {functions} | {tests} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result for every label; the status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("label", nargs="*", help="only these, with every perturbation")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    chosen = parser.parse_args(arguments)
    ledger, jobs = check(chosen.root.resolve(), chosen.label)
    for label, job in jobs.items():
        print(
            f"{label:34} {len(job.caught()):3} of {len(job.tried()):2} caught   {', '.join(job.functions)}"
        )
        for trial in job.trials if chosen.label else []:
            print(f"    {trial.outcome:12} {trial.function}  {trial.id}\n{'':17}{trial.by}")
    counts = totals(jobs)
    print(
        "{labels} labels, {functions} functions, {tests} tests: "
        "{tried} perturbations tried, {caught} caught".format(**counts)
    )
    for fault in ledger.faults:
        print("FAULT", fault)
    if chosen.json:
        kinds = {entry.label: entry.kind for entry in ledger.entries}
        found = {
            "totals": counts,
            "faults": ledger.faults,
            "labels": {label: {"kind": kinds[label], **asdict(job)} for label, job in jobs.items()},
        }
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if ledger.faults else 0


def setup(app: Any) -> dict[str, Any]:
    """{formula-ledger}: the table, for Sphinx."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.util import logging
    from sphinx.util.docutils import SphinxDirective

    class FormulaLedger(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()
            what = found()
            for fault in what["faults"]:
                logging.getLogger(__name__).warning(
                    "formula ledger: %s", fault, location=self.get_location()
                )
            block = nodes.container(classes=["imsvd-ledger"])
            self.state.nested_parse(
                StringList(markdown(what), source=""), self.content_offset, block
            )
            return [block]

    app.add_directive("formula-ledger", FormulaLedger)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    from ledger import (
        main as main_of_the_module,
    )  # the tests import this file by its name: one copy of it, not two

    raise SystemExit(main_of_the_module())
