"""What the chapters' cells share: `put` a measured number into the text.

`make book` and the notebooks of `make test` put this folder on the kernels' path; `make notebooks`
lays this file beside the notebooks that it writes. Beside a notebook that was downloaded alone,
copy it from book/_ext/kit.py.
"""

from __future__ import annotations

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
