"""What a page prints of code can be taken in at a glance."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import notebooks
import pytest
from listings import narrow

LONGEST = 30


def included(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every piece of the package that a page prints."""
    pattern = r"```\{literalinclude\} (\S+)\n:pyobject: (\S+)"
    for path, name in re.findall(pattern, page.read_text(encoding="utf-8")):
        source = (page.parent / path).read_text(encoding="utf-8")
        node: ast.AST = ast.parse(source)
        for part in name.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == part)
        yield name, source.split("\n")[node.lineno - 1 : node.end_lineno]


def cells(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every cell that a page shows unasked."""
    for cell in re.findall(
        r"```\{code-cell\} ipython3\n(.*?)\n```", page.read_text(encoding="utf-8"), re.S
    ):
        head, code = re.match(r"((?:---\n.*?\n---\n)?(?::\w[^\n]*\n)*)(.*)", cell, re.S).groups()
        if "hide-" not in head and "remove-" not in head:
            defined = re.search(r"^(?:def |class )?(\w+)(?: =|\()", code, re.M)
            yield f"{page.stem}: {defined[1] if defined else ''}", code.split("\n")


def listings() -> Iterator[tuple[str, int]]:
    for page in sorted(notebooks.BOOK.glob("*.md")):
        for name, lines in (*included(page), *cells(page)):
            yield name, len(lines)


def test_no_listing_is_longer_than_thirty_lines() -> None:
    assert {name: lines for name, lines in listings() if lines > LONGEST} == {}


def test_every_page_prints_one_sentence_a_line() -> None:
    for page in sorted(notebooks.BOOK.glob("[0-9]*.md")):
        text = re.sub(r"```\{(?!prf)[^`]*?\n```\n", "", page.read_text(encoding="utf-8"))
        prose = [line for line in text.splitlines() if re.match(r"[A-Z][a-z]+ ", line)]
        assert not [line for line in prose if re.search(r"[a-z]{3}\. [A-Z][a-z]+ [a-z]", line)]


def test_no_page_prints_code_wider_than_eighty_columns() -> None:
    wide = []
    for page in sorted(notebooks.BOOK.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        listed = re.findall(r"```\{code-cell\} ipython3\n(.*?)\n```", text, re.S)
        code = [cell.split("\n---\n")[-1] for cell in listed if "remove-cell" not in cell]
        code += re.findall(r"```(?:bash|python)\n(.*?)\n```", text, re.S)
        code += [narrow("\n".join(lines)) for _, lines in included(page)]
        wide += [line for one in code for line in one.split("\n") if len(line) > 80]
    assert wide == []


def test_a_narrow_listing_says_the_same() -> None:
    wide = '''
def f(argument_one, argument_two):
    """A first line that is quite a bit too long to stand on one line of a page of a book, really.

    And more.
    """
    if argument_one:
        raise ValueError(f"{argument_one!r} is not right: give another, so {argument_two}")
    return argument_one + argument_two * argument_one  # which is, as all know, the sum of both
'''
    printed = narrow(wide)
    assert max(map(len, printed.split("\n"))) <= 80
    assert "which is, as all know" in printed
    for code in (wide, printed):
        exec(code, scope := {})
        assert scope["f"](0, 2) == 0
        with pytest.raises(ValueError, match="1 is not right: give another, so 2"):
            scope["f"](1, 2)
