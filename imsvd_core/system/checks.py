"""Checks of settings. Each raises a ValueError with the field, its value, and what would be right.

A setting whose default is None may be None. Of a tuple every item is checked. A bool is no number.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


def at_least(config: Any, **least: int) -> None:
    """Whole numbers with a lower bound: `at_least(self, epochs=1, seed=0)`."""
    for name, bound in least.items():

        def fits(x: Any, bound: int = bound) -> bool:
            return isinstance(x, int) and x >= bound

        _check(config, [name], f"at least {bound}, and whole", fits)


def finite(config: Any, *names: str) -> None:
    """Numbers from 0 that are neither infinite nor NaN."""
    _check(config, names, "a finite number ≥ 0", lambda x: 0 <= x < math.inf)


def positive(config: Any, *names: str) -> None:
    """Numbers above 0 that are neither infinite nor NaN."""
    _check(config, names, "positive and finite", lambda x: 0 < x < math.inf)


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Numbers from `low` to `high`, both included."""
    _check(config, names, f"between {low:g} and {high:g}", lambda x: low <= x <= high)


def literals(config: Any) -> None:
    """Every field annotated as Literal[...], or Literal[...] | None, holds one of its words."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is not Literal:
            hint = next((part for part in get_args(hint) if get_origin(part) is Literal), None)
        words, value = get_args(hint), getattr(config, name)
        if words and value not in words and not _may_be_none(config, name, value):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, words))}")


def _check(config: Any, names: Iterable[str], rule: str, fits: Callable[[Any], bool]) -> None:
    for name in names:
        value = getattr(config, name)
        if _may_be_none(config, name, value):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not (is_number and fits(number)):
                raise ValueError(f"{name}={value!r} must be {rule}")


def _may_be_none(config: Any, name: str, value: Any) -> bool:
    return value is None and getattr(type(config), name, ...) is None
