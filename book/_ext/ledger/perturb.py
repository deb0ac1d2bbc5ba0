"""Small changes of a function: a sign, a factor or an index, in its source or in its result."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from types import CodeType
from typing import Any

from ledger.entries import Fault, resolve

KINDS = ("sign", "factor", "index")

# --- perturbations
# ------------------------------------------------------------------------------------------------


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
    """Every perturbation of a function in the order of trial: of its result, then of its source,
    the kinds in turn.

    Those `without_effect`, given by their ids, are passed over; one of them that is no site is a
    fault.
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
            f"{name} has no perturbation {sorted(strange)[0]!r}, which is declared to be "
            f"without effect"
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
    """Sites in and below a node, which `holder` holds under `key`; the context tells indices from
    numbers.

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
        and isinstance(number := node.value, int | float)
        and not isinstance(number, bool)
        and context != "compared"
    ):
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
        and isinstance(called := node.func, ast.Attribute)
        and called.attr in METHODS
    ):
        method, kind = METHODS[called.attr]

        def rename() -> ast.AST:
            called.attr = method
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
    """Whether a node checks arguments, speaks to people or chooses a precision: nothing in it is a
    formula."""
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
    helper = f"__import__('ledger.perturb').perturb.{RESULTS[kind]}"
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
    """The code object of a definition; its defaults and annotations stay those of the function that
    gets it."""
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
