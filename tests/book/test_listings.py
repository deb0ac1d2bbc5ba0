"""What a page prints of code can be taken in at a glance."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import notebooks

LONGEST = 30


def included(page: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every piece of the package that a page prints."""
    pattern = r"```\{literalinclude\} (\S+)\n:pyobject: (\S+)"
    for path, name in re.findall(pattern, page.read_text(encoding="utf-8")):
        node: ast.AST = ast.parse((page.parent / path).read_text(encoding="utf-8"))
        for part in name.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == part)
        yield name, node.end_lineno - node.lineno + 1


def cells(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every cell that a page shows unasked."""
    for cell in re.findall(
        r"```\{code-cell\} ipython3\n(.*?)\n```", page.read_text(encoding="utf-8"), re.S
    ):
        head, code = re.match(r"((?:---\n.*?\n---\n)?(?::\w.*\n)*)(.*)", cell, re.S).groups()
        if "hide-" not in head and "remove-" not in head:
            defined = re.search(r"^(?:def |class )?(\w+)(?: =|\()", code, re.M)
            yield f"{page.stem}: {defined[1] if defined else ''}", code.split("\n")


def listings() -> Iterator[tuple[str, int]]:
    for page in sorted(notebooks.BOOK.glob("*.md")):
        yield from included(page)
        yield from ((name, len(lines)) for name, lines in cells(page))


def test_no_listing_is_longer_than_thirty_lines() -> None:
    assert {name: lines for name, lines in listings() if lines > LONGEST} == {}


def test_every_page_prints_one_sentence_a_line() -> None:
    for page in sorted(notebooks.BOOK.glob("[0-9]*.md")):
        text = re.sub(r"```\{(?!prf)[^`]*?\n```\n", "", page.read_text(encoding="utf-8"))
        prose = [line for line in text.splitlines() if re.match(r"[A-Z][a-z]+ ", line)]
        assert not [line for line in prose if re.search(r"[a-z]{3}\. [A-Z][a-z]+ [a-z]", line)]
