"""Python in at most 80 columns, so that a page can print it without cutting it.

The package's own lines have up to 100. What a page shows of it is broken by ruff, comments and
docstrings by words; nothing else changes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

COLUMNS = 80


def narrow(code: str) -> str:
    """Return `code` in lines of at most 80 columns, as far as its words allow."""
    code = textwrap.dedent(code).strip("\n")
    if not any(len(line) > COLUMNS for line in code.split("\n")):
        return code
    command = [str(Path(sys.executable).with_name("ruff")), "format", "--isolated", "--quiet"]
    command += [f"--line-length={COLUMNS}", "--stdin-filename=listing.py", "-"]
    code = "\n".join(map(_comment, code.split("\n")))
    done = subprocess.run(command, input=code, text=True, capture_output=True)
    code = done.stdout.strip("\n") or code
    code = _STRINGS.sub(_string, code)
    return re.sub(r'^ *r?"""(.*?)"""$', _docstring, code, flags=re.DOTALL | re.M)


#: Lines that hold a string and nothing else, or one string in several such lines
_STRINGS = re.compile(r'^( *)(\w+=)?(f?)"(?!").*"(?:\n *\3"(?!").*")*(,?)$', re.M)


def _string(match: re.Match[str]) -> str:
    indent, name, kind, comma = (part or "" for part in match.groups())
    if not any(len(line) > COLUMNS for line in match[0].split("\n")):
        return match[0]
    text = "".join(re.findall(r'"(.*)"', match[0]))
    words = re.findall(r"(?:\{[^}]*\}|[^ ])+ *| +" if kind else r"[^ ]+ *| +", text)
    lines = [f'{indent}{name}{kind}"']
    for word in words:
        if len(lines[-1]) + len(word) + 2 > COLUMNS:
            lines.append(f'{indent}{kind}"')
        lines[-1] += word
    return '"\n'.join(lines) + f'"{comma}'


def _docstring(match: re.Match[str]) -> str:
    if not any(len(line) > COLUMNS for line in match[0].split("\n")):
        return match[0]
    return re.sub(r"(?:^(?! *$).*\n?)+", _paragraph, match[0], flags=re.M)


def _paragraph(match: re.Match[str]) -> str:
    indent = " " * (len(match[0]) - len(match[0].lstrip(" ")))
    filled = textwrap.fill(
        " ".join(match[0].split()), COLUMNS, initial_indent=indent, subsequent_indent=indent
    )
    return filled + "\n" * match[0].endswith("\n")


def _comment(line: str) -> str:
    """A comment that is too long, broken; behind code it goes above it."""
    found = re.fullmatch(r"( *)(.*?) *# (.*)", line)
    if len(line) <= COLUMNS or not found or found[2].count('"') % 2:
        return line
    prefix = f"{found[1]}# "
    above = textwrap.fill(found[3], COLUMNS, initial_indent=prefix, subsequent_indent=prefix)
    return above + (f"\n{found[1]}{found[2]}" if found[2] else "")


def narrow_included(app: Sphinx, doctree: nodes.document) -> None:
    """Break the lines of what a page prints of the package."""
    for block in doctree.findall(nodes.literal_block):
        if block.get("language") == "python" and str(block.get("source", "")).endswith(".py"):
            block.rawsource = narrow(block.astext())
            block.children = [nodes.Text(block.rawsource)]
