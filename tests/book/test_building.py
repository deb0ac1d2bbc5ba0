"""How the book is built: what spoils a cache, what fails a build, what becomes a notebook."""

from __future__ import annotations

import os
from pathlib import Path

import imsvd_book
import jupytext
import notebooks
import pytest
import yaml
from conftest import REPOSITORY, build

HEADER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst, format_version: 0.13}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""
DATASET = {"IMSVD_SCALE": "smoke", "IMSVD_DATASET": "attributes"}


def small_book(folder: Path, cell: str) -> Path:
    """A book of one page with one cell, built by the real configuration."""
    (folder / "book").mkdir(exist_ok=True)
    (folder / "book" / "references.bib").write_text("")
    (folder / "book" / "index.md").write_text(
        f"{HEADER}# One page\n\n```{{code-cell}} ipython3\n{cell}\n```\n"
    )
    (folder / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text())
    config["sphinx"]["local_extensions"] = {"imsvd_book": str(REPOSITORY / "book" / "_ext")}
    config["sphinx"]["config"].pop("html_favicon")
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.slow  # builds a small book
def test_a_failing_cell_fails_the_build_and_shows_its_traceback(tmp_path: Path) -> None:
    done = build(small_book(tmp_path, "unheard_of / 0"), DATASET)
    assert done.returncode != 0
    assert "NameError" in done.stdout
    assert "unheard_of" in done.stdout


@pytest.mark.slow  # builds a small book
def test_a_warning_fails_the_build(tmp_path: Path) -> None:
    folder = small_book(tmp_path, "1 + 1")
    page = folder / "book" / "index.md"
    page.write_text(page.read_text() + "\nSee {eq}`no-such-equation`.\n")
    done = build(folder, DATASET)
    assert done.returncode != 0
    assert "no-such-equation" in done.stdout


@pytest.mark.slow  # builds a small book four times
def test_a_page_runs_again_when_a_stored_result_changes_and_only_then(tmp_path: Path) -> None:
    folder = small_book(tmp_path, f"open({str(tmp_path / 'runs')!r}, 'a').write('x');")
    (folder / "book" / "results").mkdir()
    result = folder / "book" / "results" / "one.json"
    for figure, runs in ((1, 1), (1, 1), (2, 2), (1, 2)):  # the last is still in the cache
        result.write_text(f'{{"figure": {figure}}}')
        assert build(folder, DATASET).returncode == 0
        assert len((tmp_path / "runs").read_text()) == runs


def test_the_cache_key_changes_with_every_file_and_every_value(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("1")
    two.write_text("2")
    key = imsvd_book.cache_key([one, two], "laptop", {"images": 3})
    assert key == imsvd_book.cache_key([two, one], "laptop", {"images": 3})
    others = [
        imsvd_book.cache_key([one], "laptop", {"images": 3}),
        imsvd_book.cache_key([one, two], "smoke", {"images": 3}),
        imsvd_book.cache_key([one, two], "laptop", {"images": 4}),
    ]
    two.write_text("3")
    others.append(imsvd_book.cache_key([one, two], "laptop", {"images": 3}))
    assert key not in others


def test_the_key_covers_package_results_and_requirements(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_text("{}")
    names = {path.name for path in imsvd_book.what_cells_depend_on(tmp_path)}
    assert {"loss.py", "knn.py", "animation.js", "kit.py", "requirements.txt", "run.json"} <= names


def test_only_the_caches_used_last_are_kept(tmp_path: Path) -> None:
    for age in range(imsvd_book.KEPT_CACHES + 2):
        folder = tmp_path / f"age-{age}"
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    imsvd_book.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"age-{age}" for age in range(imsvd_book.KEPT_CACHES)
    ]


def test_every_page_that_computes_becomes_a_notebook_with_all_its_cells(tmp_path: Path) -> None:
    for path in notebooks.convert(tmp_path):
        source = notebooks.BOOK / path.relative_to(tmp_path).with_suffix(".md")
        cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
        assert len(cells) == source.read_text(encoding="utf-8").count("```{code-cell}")


def test_links_between_chapters_lead_from_notebook_to_notebook() -> None:
    def rewritten(link: str) -> str:
        return notebooks._LINK.sub(
            lambda match: notebooks._to_notebook({"04-the-loss"}, match), link
        )

    assert rewritten("[x](04-the-loss.md)") == "[x](04-the-loss.ipynb)"
    assert rewritten("[x](../04-the-loss.md#terms)") == "[x](../04-the-loss.ipynb#terms)"
    assert rewritten("[x](notation.md)") == "[x](notation.md)"


@pytest.mark.parametrize(
    ("text", "answer"),
    [(f"{HEADER}# A", True), ("# A\n\n---\nkernelspec: no", False), ("# A", False)],
)
def test_a_page_computes_if_its_header_names_a_kernel(
    tmp_path: Path, text: str, answer: bool
) -> None:
    (tmp_path / "page.md").write_text(text)
    assert notebooks.is_notebook(tmp_path / "page.md") is answer
