"""What the chapters' cells share: `put` a measured number into the text, `claim` that a sentence is
true of it, `Table` for results.

`make book` and the notebooks of `make test` put this folder on the kernels' path; `make notebooks`
lays this file beside the notebooks that it writes. Beside a notebook that was downloaded alone,
copy it from book/_ext/kit.py.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from myst_nb import glue

MINUS = "\N{MINUS SIGN}"


def shown(value: Any, spec: str = "") -> str:
    """A value as the text shows it: formatted by `spec`, with a true minus and a space before %.

    Text stays as it is. `spec` is that of `format`: ".2f", "," for thousands, ".0%".
    """
    if isinstance(value, str) and not spec:
        return value
    return format(value, spec).replace("-", MINUS).replace("%", " %")


def put(name: str, value: Any, spec: str = "") -> None:
    """Let {glue:text}`name` stand for a value in the text of this page."""
    glue(name, shown(value, spec), display=False)


def claim(sentence: str, holds: Any) -> None:
    """Say that a sentence (or a part of it, word for word) is true of this page's numbers.

    Raises `AssertionError` where it is not, so that no page is built that says what it does not
    show, on whatever data. tests/book/test_sentences.py checks that the page has the sentence.
    """
    assert holds, f"not true of this page: {sentence}"
    glue(f"claim: {sentence}", True, display=False)


class Table:
    """Rows of a table of results: the first is its head, numbers are shown by `spec`."""

    def __init__(self, *rows: Sequence[Any], spec: str = ".1f") -> None:
        self.rows = [
            [shown(one, "" if isinstance(one, str) else spec) for one in row] for row in rows
        ]

    def __repr__(self) -> str:
        return "\n".join("  ".join(row) for row in self.rows)

    def _repr_html_(self) -> str:
        head, *body = self.rows
        lines = ["".join(f'<th scope="col">{html.escape(one)}</th>' for one in head)]
        for first, *others in body:
            cells = "".join(f"<td>{html.escape(one)}</td>" for one in others)
            lines.append(f'<th scope="row">{html.escape(first)}</th>{cells}')
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return (
            '<div class="pst-scrollable-table-container">'
            f'<table class="table imsvd-table">{rows}</table></div>'
        )
