"""The notation checker: every symbol of every formula is defined before it is used.

    python book/_ext/symbols.py                          # what is wrong, in the order of the book
    python book/_ext/symbols.py book/05-the-theorem.md   # in some pages

A symbol is a Latin or Greek letter, a letter with an accent or in another alphabet (`\\hat P`,
`\\mathcal L`), or a name in `\\mathrm` that begins with a capital (`\\mathrm{DE}`). Indices, primes
and arguments are symbols of their own: `B_v` is B and v. Operators (`\\log`, `\\mathbb E`,
`\\operatorname`, an order O(x)) and the constants e and π are none.

A chapter says where it defines symbols by an invisible line, right above the paragraph or formula
that does it in words:

    <!-- defines: z, D, \\hat P -->

* The symbols must occur in that paragraph or formula (what comes up to the next blank line). * They
  hold from there to the end of the chapter. Inside a theorem they hold for it and its proof, inside
  an exercise for it and its solution.
* A symbol of notation.md holds in all chapters after the one that its row names, and in that
  chapter from the place that defines it, which must be there. What the notation page itself defines
  by such a line holds everywhere.

The box at the head of a chapter, which says what is to come, is not read; nor are the glossary and
the other appendices.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ledger import REPOSITORY, chapters

GREEK = set(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "varrho",
        "sigma",
        "varsigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "ell",
    ]
)
ACCENTS = (
    "hat|widehat|bar|tilde|widetilde|dot|ddot|vec|check|"
    "boldsymbol|mathbf|mathcal|mathfrak|mathsf|mathscr"
)
TOKEN = re.compile(
    rf"""
    \\(?:begin|end|label|tag|operatorname\*?|mathbb|phantom|hspace|vspace|ref|eqref)
    \s*(?:\{{[^{{}}]*\}}|[A-Za-z])
  | \\(?P<name>text|textbf|textit|mathrm|mathit)\s*\{{(?P<words>[^{{}}]*)\}}
  | \\(?P<accent>{ACCENTS})(?![A-Za-z])
    (?:\s*\{{(?P<inside>[^{{}}]*)\}}|\s*\\(?P<greek>[A-Za-z]+)|\s*(?P<letter>[A-Za-z]))
  | \\(?P<command>[A-Za-z]+)
  | \\.
  | (?P<plain>[A-Za-z])""",
    re.VERBOSE,
)
EVERYWHERE = 0  # the chapter of what holds from the first page on


def symbols(tex: str) -> list[str]:
    """Symbols of a formula, in their order, each as often as it occurs."""
    tex = re.sub(
        r"\\[dt]?frac(?:\{d(?:\^\d)?| d\{d)(?=[\\A-Za-z}])", r"\\frac{", tex
    )  # the d of a derivative
    tex = re.sub(r"\}\{d(?=\\?[A-Za-z])", "}{", tex)
    tex = re.sub(r"(?<![A-Za-z\\])O(?=\()", "", tex)  # the order of magnitude
    tex = re.sub(r"(?<![A-Za-z\\])e(?=\^)", "", tex)  # the base of the exponential function
    tex = re.sub(r"_\{\\rm [^{}]*\}", "", tex)  # a label
    found = []
    for match in TOKEN.finditer(tex):
        if match["accent"]:
            inner = symbols(match["inside"] or "") or [
                f"\\{match['greek']}" if match["greek"] else match["letter"] or ""
            ]
            found += [f"\\{match['accent']} {inner[0]}"] if len(inner) == 1 else inner
        elif match["name"]:
            if (
                re.fullmatch(r"[A-Z][A-Za-z]*", match["words"].strip())
                and match["name"] == "mathrm"
            ):
                found.append(match["words"].strip())
        elif match["command"]:
            found += [f"\\{match['command']}"] if match["command"] in GREEK else []
        elif match["plain"]:
            found.append(match["plain"])
    return found


def formulas(text: str) -> list[str]:
    """Formulas of a piece of Markdown: what stands between dollars, outside of inline code."""
    text = re.sub(r"\\\$", "", re.sub(r"(`+)[^`]+?\1", "", text))
    displayed = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    return displayed + re.findall(r"\$([^$]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))


@dataclass(frozen=True)
class Block:
    """A paragraph, formula or list: what stands between blank lines."""

    line: int
    text: str
    region: (
        tuple[str, int] | None
    )  #: the theorem with its proof, or the exercise with its solution, that it is part of
    defines: tuple[str, ...]


DEFINES = re.compile(r"\s*<!-- defines: (.*?) -->\s*$")


def blocks(page: str) -> Iterator[Block]:
    """Blocks of a page in their order, without its code; captions of figures are kept."""
    lines = page.splitlines()
    start = lines.index("---", 1) + 1 if lines and lines[0] == "---" else 0
    statement = exercise = 0
    region: tuple[str, int] | None = None
    fence, in_code, in_header, in_aims, display = "", False, False, False, False
    collected: list[str] = []
    defines: tuple[str, ...] = ()
    first, its_region = 0, None
    for number, line in enumerate([*lines[start:], ""], start + 1):
        opening = re.match(r"\s*(`{3,}|:{3,})\{?([\w:-]*)", line)
        if in_aims:
            in_aims = line.strip() != fence
            line = ""
        elif line.startswith(":class: imsvd-aims"):
            in_aims = True
        elif in_code:
            in_header ^= line == "---"
            in_code = not line.startswith(fence)
            line = "%" if line == "---" else line if in_header else ""
        elif opening and not line.strip().strip("`:"):  # a closing fence
            region = (
                None if region and line.strip() == fence and region[0] == "statement" else region
            )
            line = ""
        elif opening:
            fence, kind = opening[1], opening[2]
            in_code = kind in (
                "code-cell",
                "python",
                "bash",
                "literalinclude",
                "",
                "text",
                "console",
            )
            if kind.startswith("prf:"):
                statement += kind != "prf:proof"
                region = ("statement", statement)
            elif kind in ("exercise-start", "solution-start"):
                exercise += kind == "exercise-start"
                region = ("exercise", exercise)
            elif kind in ("exercise-end", "solution-end"):
                region = None
            line = re.sub(r"^\s*[`:]{3,}(\{[^}]*\})?", "", line)
        if collected and display and not line.strip():
            line = "%"  # a blank line inside a displayed formula does not end it
        display ^= line.count("$$") % 2 == 1
        if match := DEFINES.match(line):
            if collected:
                yield Block(first, "\n".join(collected), its_region, defines)
            collected, defines, first, its_region = [""], _listed(match[1]), number, region
        elif line.strip():
            first, its_region = (first, its_region) if collected else (number, region)
            collected.append(line)
        elif any(collected):
            yield Block(first, "\n".join(collected), its_region, defines)
            collected, defines = [], ()
    if defines:
        yield Block(first, "", its_region, defines)


def _listed(text: str) -> tuple[str, ...]:
    """Symbols of a list with commas; a word with a capital is a name."""
    items = [item.strip() for item in text.split(",")]
    return tuple(
        one
        for item in items
        for one in ([item] if re.fullmatch(r"[A-Z][A-Za-z]+", item) else symbols(item))
    )


def notation(page: str) -> dict[str, int]:
    """Symbols of the notation page and the chapter that each comes from."""
    known: dict[str, int] = {}
    for block in blocks(page):
        known |= dict.fromkeys(block.defines, EVERYWHERE)
    for row in page.splitlines():
        if chapter := re.match(r"\|(.*)\|\s*\[(\d+)\]\([^)]*\)\s*\|\s*$", row):
            names = re.findall(r"^\s*([A-Z]{2,})\s*\|", chapter[1])
            for symbol in names + [
                one for formula in formulas(chapter[1]) for one in symbols(formula)
            ]:
                known.setdefault(symbol, int(chapter[2]))
    return known


def number_of(page: Path) -> int:
    """The chapter number in a page's file name; pages without one come before all chapters."""
    match = re.match(r"(\d+)-", page.name)
    return int(match[1]) if match else EVERYWHERE


def check(root: Path = REPOSITORY, only: Sequence[Path] = ()) -> list[str]:
    """All faults, in the order of the book."""
    home = root / "book" / "notation.md"
    known = notation(home.read_text(encoding="utf-8"))
    faults = []
    for page in chapters(root):
        if page == home or page.parent.name == "appendix" or (only and page not in only):
            continue
        found, defined = faults_of(page.read_text(encoding="utf-8"), number_of(page), known)
        faults += [f"{page.relative_to(root)}:{fault}" for fault in found]
        named = [
            symbol for symbol, chapter in known.items() if chapter == number_of(page) != EVERYWHERE
        ]
        faults += [
            f"book/notation.md: {symbol} is said to come from chapter {number_of(page)}, which "
            f"does not define it"
            for symbol in named
            if symbol not in defined
        ]
    return faults


def faults_of(text: str, chapter: int, known: dict[str, int]) -> tuple[list[str], set[str]]:
    """Faults of a page, each with its line, and the symbols that it defines."""
    faults, told = [], set()
    defined: dict[tuple[str, int] | None, set[str]] = {None: set()}
    for block in blocks(text):
        used = [symbol for formula in formulas(block.text) for symbol in symbols(formula)]
        faults += [
            f"{block.line}: {symbol} is said to be defined here, but does not occur in what follows"
            for symbol in block.defines
            if symbol not in used
        ]
        defined.setdefault(block.region, set()).update(block.defines)
        visible = defined[None] | defined[block.region]
        for symbol in dict.fromkeys(used):
            since = known.get(symbol)
            if (
                symbol in visible
                or symbol in ("e", "\\pi")
                or since == EVERYWHERE
                or (since is not None and since < chapter)
            ):
                continue
            if (symbol, block.region) not in told:
                told.add((symbol, block.region))
                why = (
                    "is not defined"
                    if since is None
                    else "is used before this chapter defines it"
                    if since == chapter
                    else f"is used here, but comes from chapter {since}"
                )
                faults.append(f"{block.line}: {symbol} {why}")
    return faults, set().union(*defined.values())


def main(arguments: Sequence[str]) -> int:
    faults = check(REPOSITORY, [Path(name).resolve() for name in arguments])
    print("\n".join(faults) or "Every symbol is defined before it is used.")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
