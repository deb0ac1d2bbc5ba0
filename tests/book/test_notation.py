"""The notation: every symbol of the chapters is defined before it is used, and the checker notices
when one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import symbols
from conftest import REPOSITORY

NOTATION = r"""# Notation

<!-- defines: n, b -->
Samples are numbered by $n$, values by $b$; the default is $Q=1$.

| Symbol | Code | Meaning | Chapter |
|:--|:--|:--|:-:|
| $N$ | `n` | samples | [1](01-one.md) |
| $\hat P(X=b)$ | | marginal | [2](02-two.md) |
| DE | `de` | $\sum\hat P\log\hat P$ | [2](02-two.md) |
"""
ONE = r"""# One

:::{admonition} What you will be able to do
:class: imsvd-aims

* say what $W$ is.
:::

<!-- defines: N -->
There are $N$ samples, each with a weight $1/N$.

<!-- defines: f -->
$$
f_n=\log e^{-n}

+\frac1N
$$

```{prf:theorem} A bound
:label: thm-one
<!-- defines: M -->
For $M\ge f_n$ all is well.
```

```{prf:proof}
It is $M$, with `$code$` and \$5.
```

```{code-cell} ipython3
x = "$not_a_symbol$"
```
"""
TWO = r"""# Two

<!-- defines: X, \hat P, DE -->
Let $\hat P(X=b)$ be known, and $\mathrm{DE}=\hat P\log\hat P$ over $N$ samples.
"""


def book(folder: Path, notation: str = NOTATION, one: str = ONE, two: str = TWO) -> Path:
    (folder / "book").mkdir()
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: notation\n- file: 01-one\n- file: "
        "02-two\n"
    )
    for name, text in (
        ("index", "# A book\n"),
        ("notation", notation),
        ("01-one", one),
        ("02-two", two),
    ):
        (folder / "book" / f"{name}.md").write_text(text)
    return folder


def test_every_symbol_of_the_chapters_is_defined_before_it_is_used() -> None:
    assert symbols.check(REPOSITORY) == []


def test_the_chapters_hold_symbols_to_check() -> None:
    used = {
        symbol
        for page in symbols.chapters(REPOSITORY)
        for block in symbols.blocks(page.read_text())
        for formula in symbols.formulas(block.text)
        for symbol in symbols.symbols(formula)
    }
    assert {
        "N",
        "B",
        r"\hat P",
        r"\bar H",
        r"\mathcal L",
        "DE",
        "TIC",
        r"\lambda",
        r"\varepsilon",
    } <= used


def test_a_sound_book_has_no_fault(tmp_path: Path) -> None:
    assert symbols.check(book(tmp_path)) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("<!-- defines: f -->\n", "", "f is not defined"),  # local
        (
            "<!-- defines: N -->\n",
            "",
            "N is used before this chapter defines it",
        ),  # of the notation page
        (
            "There are $N$",
            "With $f$ there are $N$",
            "f is not defined",
        ),  # defined, but further down
        (
            "There are $N$",
            r"In $\hat P$ there are $N$",
            r"\hat P is used here, but comes from chapter 2",
        ),
        ("There are $N$", "With $z$ there are $N$", "z is not defined"),  # in no table
        (
            "There are $N$",
            "With $Q$ there are $N$",
            "Q is not defined",
        ),  # only mentioned on the notation page
        ("+\\frac1N", "+\\frac1N+g", "g is not defined"),  # behind a blank line of a display
        ("It is $M$", "It is $M>w$", "w is not defined"),
        ("```{code-cell}", "So $M$ is.\n\n```{code-cell}", "M is not defined"),  # the theorem's own
        ("defines: f -->", "defines: f, g -->", "g is said to be defined here, but does not occur"),
    ],
)
def test_a_symbol_without_definition_at_its_place_is_a_fault(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    assert old in ONE
    faults = symbols.check(book(tmp_path, one=ONE.replace(old, new)))
    assert any(found.startswith("book/01-one.md:") and fault in found for found in faults), faults


@pytest.mark.slow  # reads every chapter once for each definition
def test_removing_any_definition_of_any_chapter_is_noticed() -> None:
    """Without a line of definitions its symbols are faults, unless other lines or earlier chapters
    define them too."""
    known = symbols.notation((REPOSITORY / "book" / "notation.md").read_text())
    tried = 0
    for page in symbols.chapters(REPOSITORY):
        lines, number = page.read_text().splitlines(), symbols.number_of(page)
        listed = {
            i: set(symbols._listed(match[1]))
            for i, line in enumerate(lines)
            if (match := symbols.DEFINES.match(line))
        }
        for place in listed if page.name != "notation.md" else ():
            others = set().union(*(listed[other] for other in listed if other != place))
            alone = {
                one
                for one in listed[place] - others
                if known.get(one, number) == number or known[one] > number
            }
            faults, defined = symbols.faults_of(
                "\n".join(lines[:place] + lines[place + 1 :]), number, known
            )
            undefined = {fault.split(": ")[1].rsplit(" is ")[0] for fault in faults} | {
                one for one in alone if one not in defined
            }
            assert alone <= undefined, f"{page.name}:{place + 1}"
            tried += len(alone)
    assert tried >= 50


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "[1](01-one.md)",
            "[2](02-two.md)",
            "book/notation.md: N is said to come from chapter 2, which does not define it",
        ),
        (
            r"$\hat P(X=b)$",
            r"$\hat P(X=b)$, $T$",
            "book/notation.md: T is said to come from chapter 2, which does not define it",
        ),
        ("defines: n, b", "defines: b", "book/01-one.md:12: n is not defined"),
    ],
)
def test_a_notation_page_that_does_not_fit_the_chapters_is_a_fault(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    assert fault in symbols.check(book(tmp_path, notation=NOTATION.replace(old, new)))


@pytest.mark.parametrize(
    ("tex", "found"),
    [
        (r"\hat P(X_{v_1}=b_1,\dots)\le\bar{H}_K", [r"\hat P", "X", "v", "b", r"\bar H", "K"]),
        (
            r"\mathcal L=\mathrm{DE}+\lambda\,\mathrm{TI}_{\rm bal}",
            [r"\mathcal L", "DE", r"\lambda", "TI"],
        ),
        (
            r"\mathbb E\log x\,\operatorname{Var}z\text{ where }y\in\mathbb R^{N}",
            ["x", "z", "y", "N"],
        ),
        (
            r"\frac{d}{ds}\frac{dH}{ds}e^{sz_b}\frac{\partial p}{\partial z}\frac d{dt}",
            ["s", "H", "s", "s", "z", "b", "p", "z", "t"],
        ),
        (r"\mathcal L_{\mathrm{BT}}+O(u)+w_{\mathrm{red}}", [r"\mathcal L", "BT", "u", "w"]),
        (r"\begin{aligned}a'&=\hat\theta\\b\end{aligned}", ["a", r"\hat \theta", "b"]),
    ],
)
def test_formulas_are_read_as_symbols(tex: str, found: list[str]) -> None:
    assert symbols.symbols(tex) == found


def test_captions_of_figures_are_read_and_code_is_not() -> None:
    page = (
        "```{code-cell} ipython3\n---\nmystnb:\n  figure:\n"
        "    caption: |\n      See $q$.\n---\nr = '$s$'\n```\n"
    )
    assert [symbols.formulas(block.text) for block in symbols.blocks(page)] == [["q"]]
