"""What the chapters' cells share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import kit
import notebooks
import pytest


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (-1.2345, ".2f", "−1.23"),
        (1281167, ",", "1,281,167"),
        (0.256, ".0%", "26 %"),
        (1e-5, ".1g", "1e−05"),
        (7, "", "7"),
        (-7, "", "−7"),
        ("CIFAR-10", "", "CIFAR-10"),
    ],
)
def test_a_number_is_shown_with_a_true_minus_and_a_space_before_the_percent_sign(
    value: object, spec: str, text: str
) -> None:
    assert kit.shown(value, spec) == text


def test_no_chapter_inserts_a_number_in_a_way_of_its_own() -> None:
    for page in notebooks.BOOK.glob("*.md"):
        assert not re.search(r"\bglue\(|def (put|minus)\b", page.read_text(encoding="utf-8")), page


def test_a_cell_finds_the_kit_beside_its_notebook(tmp_path: Path) -> None:
    notebooks.convert(tmp_path)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, ''); import kit; kit.put"]
    subprocess.run(command, cwd=tmp_path, env=alone, check=True)


def test_a_table_names_its_columns_and_rows_and_shows_numbers_as_the_text_does() -> None:
    page = kit.Table(("terms", "loss"), ("a < b", -4.0501), spec=".3f")._repr_html_()
    assert '<th scope="col">loss</th>' in page
    assert f'<th scope="row">a &lt; b</th><td>{kit.MINUS}4.050</td>' in page
