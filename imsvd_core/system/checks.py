"""Checks of settings. Each raises a ValueError with the field, its value, and what would be right.

A setting whose default is None may be None. Of a tuple every item is checked. A bool is no number.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints


def at_least(config: Any, **least: int) -> None:
    """Whole numbers with a lower bound: `at_least(self, epochs=1, seed=0)`."""
    for name, bound in least.items():
        _check(config, name, partial(_is_whole, bound), f"at least {bound}, and whole")


def _is_whole(bound: int, value: Any) -> bool:
    return isinstance(value, int) and value >= bound


def finite(config: Any, *names: str) -> None:
    """Numbers from 0 that are neither infinite nor NaN."""
    for name in names:
        _check(config, name, lambda value: 0 <= value < math.inf, "a finite number ≥ 0")


def positive(config: Any, *names: str) -> None:
    """Numbers above 0 that are neither infinite nor NaN."""
    for name in names:
        _check(config, name, lambda value: 0 < value < math.inf, "positive and finite")


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Numbers from `low` to `high`, both included."""
    for name in names:
        _check(config, name, lambda value: low <= value <= high, f"between {low:g} and {high:g}")


def literals(config: Any) -> None:
    """Every field annotated as Literal[...], or Literal[...] | None, holds one of its words."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is not Literal:
            hint = next((part for part in get_args(hint) if get_origin(part) is Literal), None)
        words, value = get_args(hint), getattr(config, name)
        if words and value not in words and not _may_be_none(config, name, value):
            *front, last = map(repr, words)
            listed = f"{', '.join(front)} or {last}" if front else last
            raise ValueError(f"{name}={value!r} must be {listed}")


def _check(config: Any, name: str, is_right: Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, name)
    if _may_be_none(config, name, value):
        return
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not is_right(number):
            raise ValueError(f"{name}={value!r} must be {rule}")


def _may_be_none(config: Any, name: str, value: Any) -> bool:
    return value is None and getattr(type(config), name, ...) is None
