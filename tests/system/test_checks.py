"""Checks of settings: what is wrong is named with its value and the remedy."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import pytest

from imsvd_core.system import checks


@dataclass
class Settings:
    epochs: int = 1
    images: int | None = None
    widths: tuple[int, ...] = (8,)
    lr: float = 0.1
    flip: float = 0.5
    name: Literal["adamw", "sgd", "lars"] = "sgd"
    mode: Literal["a", "b"] | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, epochs=1, images=2, widths=1)
        checks.positive(self, "lr")
        checks.finite(self, "flip")
        checks.between(self, 0, 1, "flip")
        checks.literals(self)


def test_right_settings_pass():
    Settings(epochs=7, images=2, widths=(), lr=1, flip=1, mode="b")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("epochs", 0, "at least 1, and whole"),
        ("epochs", 1.5, "at least 1, and whole"),
        ("epochs", True, "at least 1, and whole"),
        ("epochs", "3", "at least 1, and whole"),
        ("epochs", None, "at least 1, and whole"),
        ("images", 1, "at least 2, and whole"),
        ("widths", (8, 0), "at least 1, and whole"),
        ("lr", 0, "positive and finite"),
        ("lr", math.nan, "positive and finite"),
        ("flip", -0.1, "a finite number ≥ 0"),
        ("flip", math.inf, "a finite number ≥ 0"),
        ("flip", 1.1, "between 0 and 1"),
        ("name", "lion", "one of 'adamw', 'sgd', 'lars'"),
        ("name", None, "one of 'adamw', 'sgd', 'lars'"),
        ("mode", "c", "one of 'a', 'b'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_would_be_right(field, value, rule):
    message = re.escape(f"{field}={value!r} must be {rule}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        Settings(**{field: value})
