"""The formula ledger: every label has a function and a test that bites, and the checker itself
bites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ledger
import pytest
from conftest import REPOSITORY

CHAPTER = """# A chapter

$$
f(x)=2x+1
$$ (eq-line)

```{prf:theorem} A line
:label: thm-line
It is steep.
```

```{exercise-start} Not a formula
:label: ex-line
```
```{exercise-end}
```

```{code-cell} ipython3
from math import sqrt
SLOPE, unused = 2, sqrt(4)
```

```{code-cell} ipython3
---
tags: [hide-input]
---
def line(x):
    if x > 1e9:
        raise ValueError(f"x={x} is too large by {x - 1e9}")
    return SLOPE * x + 1
```
"""
GOOD = (
    "from ledger import of_chapter\ndef test_line():\n"
    "    assert of_chapter('01-lines', 'line')(3) == 7\n"
)
WEAK = (
    "from ledger import of_chapter\ndef test_line():\n"
    "    assert of_chapter('01-lines', 'line')(3) > 0\n"
)
BLIND = "def test_line():\n    pass\n"
ENTRY = '[{label}]\nfunction = "01-lines:line"\ntest = "tests/test_lines.py::test_line"\n'
LEDGER = ENTRY.format(label="eq-line") + ENTRY.format(label="thm-line")


def small_book(
    folder: Path, written: str = LEDGER, test: str = GOOD, chapter: str = CHAPTER
) -> Path:
    (folder / "book").mkdir()
    (folder / "tests").mkdir()
    (folder / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n- file: 01-lines\n")
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (folder / "book" / "index.md").write_text("# A book\n")
    (folder / "book" / "01-lines.md").write_text(chapter)
    (folder / "book" / "ledger.toml").write_text(written)
    (folder / "tests" / "test_lines.py").write_text(test)
    return folder


def run(root: Path, *arguments: str) -> tuple[int, dict, str]:
    """The checker in a fresh process: its status, its findings and what it printed."""
    found = root / "found.json"
    command = [
        sys.executable,
        str(REPOSITORY / "book" / "_ext" / "ledger.py"),
        "--root",
        str(root),
        "--json",
        str(found),
        *arguments,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True
    )
    assert found.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(found.read_text()), done.stdout


# some two hundred perturbations of the package, each with its tests: about a minute
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_labelled_formula_has_a_test_that_catches_every_perturbation_of_its_function() -> (
    None
):
    found = ledger.found()
    assert found["faults"] == []
    assert found["totals"]["labels"] >= 36
    assert found["totals"]["tried"] == found["totals"]["caught"] >= 180


@pytest.mark.slow  # each perturbation is a process
def test_what_was_found_is_kept_until_something_changes_and_faults_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, runs, run_once = small_book(tmp_path), [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: runs.append(1) or run_once(*a, **k))
    assert ledger.found(root) == ledger.found(root)
    assert len(runs) == 1
    (root / "tests" / "test_lines.py").write_text(WEAK)
    for number in (2, 3):
        assert "eq-line: nothing caught" in ledger.found(root)["faults"][0]
        assert len(runs) == number


@pytest.mark.slow  # each perturbation is a process
def test_the_page_lists_every_label_with_its_function_its_test_and_what_was_caught(
    tmp_path: Path,
) -> None:
    lines = ledger.markdown(run(small_book(tmp_path))[1])
    assert (
        lines[0]
        == "2 formulas and theorems, 1 functions, 1 tests: 5 perturbations tried, 5 caught."
    )
    assert lines[-2:] == [
        "| Eq. {eq}`eq-line` | 5 of 5 | `01-lines:line` | line (`test_lines.py`) |",
        "| {prf:ref}`thm-line` | 5 of 5 | `01-lines:line` | line (`test_lines.py`) |",
    ]


@pytest.mark.slow  # each perturbation is a process
def test_a_sound_ledger_passes_and_counts_what_labels_share_once(tmp_path: Path) -> None:
    status, found, said = run(small_book(tmp_path))
    assert (status, found["faults"]) == (0, [])
    totals = found["totals"]
    assert (totals["labels"], totals["functions"], totals["tests"]) == (2, 1, 1)
    assert (
        totals["tried"] == totals["caught"] == 5
    )  # the result's sign and factor; +, *, and 1 of the source
    assert "2 labels, 1 functions, 1 tests: 5 perturbations tried, 5 caught" in said


@pytest.mark.slow  # each perturbation is a process
@pytest.mark.parametrize(
    ("label", "test", "missed"),
    [
        ("eq-line", WEAK, "factor: the result scaled"),
        ("thm-line", BLIND, "sign: the result negated"),
    ],
)
def test_a_test_that_does_not_bite_fails(
    tmp_path: Path, label: str, test: str, missed: str
) -> None:
    status, found, said = run(small_book(tmp_path, test=test), label)
    assert status == 1
    assert f"{label}: nothing caught in 01-lines:line: {missed}" in found["faults"]
    assert "survived" in said


@pytest.mark.slow  # each perturbation is a process
def test_a_test_that_only_crashes_has_not_bitten(tmp_path: Path) -> None:
    crash = GOOD.replace("assert", "if not").replace(
        "== 7", "== 7:\n        raise RuntimeError('not seven')"
    )
    status, found, _ = run(small_book(tmp_path, test=crash))
    assert status == 1
    assert "eq-line: 0 perturbations of 01-lines:line are caught, and 2 must be" in found["faults"]


@pytest.mark.slow  # each perturbation is a process
def test_a_test_that_fails_by_itself_fails(tmp_path: Path) -> None:
    status, found, _ = run(small_book(tmp_path, test=GOOD.replace("7", "8")))
    assert status == 1
    assert (
        "does not pass without any perturbation: tests/test_lines.py::test_line"
        in found["faults"][0]
    )


@pytest.mark.slow  # each perturbation is a process
def test_a_second_test_that_adds_nothing_fails(tmp_path: Path) -> None:
    two = LEDGER.replace(
        '"tests/test_lines.py::test_line"',
        '["tests/test_lines.py::test_line", "tests/test_lines.py::test_too"]',
    )
    status, found, _ = run(small_book(tmp_path, two, GOOD + "def test_too():\n    test_line()\n"))
    assert status == 1
    assert (
        "tests/test_lines.py::test_too catches nothing that those before it do not catch"
        in found["faults"][0]
    )


@pytest.mark.slow  # each perturbation is a process
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "test_lines.py::test_line",
            "test_lines.py::test_curve",
            "there is no test tests/test_lines.py::test_curve",
        ),
        ("test_lines.py", "test_curves.py", "there is no test tests/test_curves.py::test_line"),
        ("01-lines:line", "01-lines:curve", "01-lines defines curve 0 times"),
        ("01-lines:line", "02-curves:line", "there is no chapter 02-curves"),
        (
            "01-lines:line",
            "imsvd_core.information:no_such",
            "there is no function imsvd_core.information:no_such",
        ),
    ],
)
def test_a_function_or_test_that_is_not_there_fails(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    status, found, _ = run(small_book(tmp_path, LEDGER.replace(old, new)), "eq-line")
    assert status == 1
    assert fault in found["faults"][0]


@pytest.mark.slow  # each perturbation is a process
def test_tests_that_cannot_be_collected_fail(tmp_path: Path) -> None:
    status, found, _ = run(small_book(tmp_path, test="import no_such_module\n" + GOOD))
    assert status == 1
    assert "no_such_module" in found["faults"][0]


@pytest.mark.slow  # each perturbation is a process
def test_a_perturbation_declared_to_be_without_effect_is_passed_over_and_must_be_one(
    tmp_path: Path,
) -> None:
    declared = '[equivalent."01-lines:line"]\n"{}" = "a reason"\n'
    _, found, _ = run(
        small_book(tmp_path, LEDGER + declared.format("sign: SLOPE * x + 1 → SLOPE * x - 1"))
    )
    assert (found["faults"], found["totals"]["tried"]) == ([], 4)
    (tmp_path / "book" / "ledger.toml").write_text(LEDGER + declared.format("sign: x → -x"))
    assert "has no perturbation 'sign: x → -x'" in run(tmp_path)[1]["faults"][0]


def test_a_label_without_entry_fails(tmp_path: Path) -> None:
    found = ledger.read(small_book(tmp_path, ENTRY.format(label="eq-line")))
    assert found.faults == ["thm-line: no entry in book/ledger.toml"]


def test_a_label_used_twice_fails(tmp_path: Path) -> None:
    root = small_book(tmp_path)
    (root / "book" / "index.md").write_text("# A book\n\n$$\nx\n$$ (eq-line)\n")
    assert ledger.read(root).faults == [
        "eq-line: 01-lines.md uses a label that an earlier page has"
    ]


def test_an_entry_without_label_fails(tmp_path: Path) -> None:
    found = ledger.read(small_book(tmp_path, LEDGER + ENTRY.format(label="eq-curve")))
    assert found.faults == ["eq-curve: an entry, but no label of a chapter"]


@pytest.mark.parametrize(
    "change",
    [
        ('function = "01-lines:line"\n', ""),
        ('test = "tests/test_lines.py::test_line"', "test = 3"),
        ("function", "fuction"),
    ],
)
def test_an_incomplete_entry_fails(tmp_path: Path, change: tuple[str, str]) -> None:
    found = ledger.read(small_book(tmp_path, LEDGER.replace(*change)))
    assert [fault.split(":")[0] for fault in found.faults] == ["eq-line", "thm-line"]


def test_labels_are_those_of_equations_and_theorems_alone() -> None:
    fenced = (
        "\n::::{prf:lemma}\n:class: dropdown\n:label: lem-a\n::::\n"
        "```{math}\n:label: eq-b\nx\n```\n```{prf:remark}\n:label: r\n```\n"
    )
    assert ledger.labels_of(CHAPTER + fenced) == {
        "eq-line": "equation",
        "thm-line": "theorem",
        "lem-a": "lemma",
        "eq-b": "equation",
    }
    assert ledger.labels_of("```{code-cell} ipython3\n$$ (eq-no)\n```\n") == {}


def test_every_theorem_like_directive_of_the_chapters_is_seen() -> None:
    for page in ledger.chapters(REPOSITORY):
        text = page.read_text()
        written = sum(
            text.count(f"{{prf:{kind}}}") for kind in ledger.STATEMENTS.split("|")
        ) + text.count("\n$$ (")
        assert len(ledger.labels_of(text)) == written


def example(x, n, f):
    """A function with a site of every kind."""
    if n < 0:
        raise ValueError(f"n={n} must be at least {0 - 0}")
    total = -x[:, 0] + x.sum(dim=-1).mul(3) / n
    for i in range(1, n):
        total -= f(x.T[i]) ** 0.5
    return total


def test_signs_factors_and_indices_are_perturbed_and_checks_are_not() -> None:
    ids = [one.id for one in ledger.perturbations(f"{__name__}:example")]
    assert ids[:3] == [
        "sign: the result negated",
        "factor: the result scaled",
        "index: the result rolled",
    ]
    assert sorted(ids[3:]) == sorted(
        [
            "sign: -x[:, 0] + x.sum(dim=-1).mul(3) / n → -x[:, 0] - x.sum(dim=-1).mul(3) / n",
            "sign: -x[:, 0] → x[:, 0]",
            "sign: total -= f(x.T[i]) ** 0.5 → total += f(x.T[i]) ** 0.5",
            "factor: x.sum(dim=-1).mul(3) / n → x.sum(dim=-1).mul(3) * n",
            "factor: x.sum(dim=-1).mul(3) → x.sum(dim=-1).mul(4)",
            "factor: x.sum(dim=-1).mul(3) → x.sum(dim=-1).div(3)",
            "factor: f(x.T[i]) ** 0.5 → f(x.T[i]) ** 0.75",
            "index: x[:, 0] → x[:, 1]",
            "index: x.sum(dim=-1) → x.sum(dim=-2)",
            "index: range(1, n) → range(2, n)",
            "index: x.T → x",
        ]
    )
    assert [one.split(":")[0] for one in ids[3:9]] == ["sign", "factor", "index"] * 2
    assert ids == [one.id for one in ledger.perturbations(f"{__name__}:example")]


def test_a_perturbed_code_object_acts_in_place() -> None:
    def function(x):
        return 2 * x

    held = {"by another": function}
    ledger._DEFINITIONS[function] = (
        __import__("ast").parse("def function(x):\n    return 2 * x").body[0]
    )
    codes = {one.id: one.code for one in map_of(function)}
    function.__code__ = codes["factor: 2 * x → 2 / x"]
    assert held["by another"](4) == 0.5


def map_of(function) -> list[ledger.Perturbation]:
    name = f"{__name__}:held"
    globals()["held"] = function
    return ledger.perturbations(name)


def test_a_function_of_a_chapter_brings_what_it_needs_and_no_more() -> None:
    bias = ledger.of_chapter("03-information", "exact_bias")
    assert bias(2, 2) == pytest.approx(-0.34657359, abs=1e-8)  # half of log 2
    assert set(bias.__globals__) - {"__name__", "__builtins__"} == {
        "math",
        "torch",
        "expected_plug_in_entropy",
        "exact_bias",
    }
    assert ledger.of_chapter("03-information", "exact_bias") is bias
