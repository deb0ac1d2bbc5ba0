"""The style that ruff does not keep: short modules and functions, nouns for names, little code."""

import ast
import io
import tokenize
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PRONOUNS = {"found", "told", "some", "there", "one", "what", "asked", "held", "mine"}
PRONOUNS |= {"odd", "spare", "usual", "chosen", "judged"}
CODE = tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING
PACKAGE = {
    path.relative_to(REPOSITORY): path.read_text("utf-8")
    for path in sorted(REPOSITORY.glob("imsvd_core/**/*.py"))
}


def test_no_line_is_longer_than_100_characters():
    folders = "imsvd_core", "tests", "benchmarks", "book/_ext", "book/studies"
    wide = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if path.name not in ("browser.py", "test_pages.py")  # they hold JavaScript and HTML
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(line) > 100
    ]
    assert wide == []


def test_fewer_than_one_name_in_a_hundred_is_a_pronoun():
    names = [name for text in PACKAGE.values() for name in bindings(text)]
    pronouns = [name for name in names if name.lstrip("_") in PRONOUNS]
    assert len(pronouns) < 0.01 * len(names)


def test_no_module_passes_450_lines_and_no_function_60():
    long = [f"{path}" for path, text in PACKAGE.items() if len(text.splitlines()) > 450]
    long += [
        f"{path}:{node.name}"
        for path, text in PACKAGE.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []


def test_the_package_grows_knowingly_only():
    """It held 79,800 tokens with five methods; further methods and faults have added the rest."""
    tokens = sum(
        token.type in CODE
        for text in PACKAGE.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    assert tokens <= 100_000


def bindings(text: str) -> list[str]:
    """Every name that a module assigns or takes as an argument, as often as it does."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return names
