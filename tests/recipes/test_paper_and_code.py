"""The page on paper and code says what the recipes do."""

import ast
import re
from operator import attrgetter
from pathlib import Path

import pytest

from imsvd_core.recipes import recipe

PAGE = (Path(__file__).resolve().parents[2] / "book/appendix/ledger.md").read_text("utf-8")
SECTIONS = {
    "ImageNet": "imagenet-100",
    "CIFAR-10": "cifar10",
    "Methods for comparison": "cifar10-byol",
}


@pytest.mark.parametrize(("title", "name"), SECTIONS.items())
def test_every_setting_on_the_page_is_the_full_recipes(title, name):
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    stated = re.findall(r"`([a-z_.]+)=([^`]+)`", section)
    assert len(stated) >= 3
    full = recipe(name, "full")
    held = {setting: attrgetter(setting)(full) for setting, _ in stated}
    assert held == {setting: ast.literal_eval(value) for setting, value in stated}


def test_the_page_computes_rightly_what_another_deviation_does():
    ours = recipe("cifar10", "full").eval_view.std
    factors = [own / other for own, other in zip(ours, (0.2023, 0.1994, 0.2010), strict=True)]
    assert f"by {factors[0]:.2f}, {factors[1]:.2f} and {factors[2]:.2f} there" in PAGE
    assert f"blue weighs {factors[2] / factors[0] - 1:.0%}".replace("%", " %") in PAGE
