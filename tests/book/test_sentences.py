"""What a chapter says of its own numbers is true on CIFAR-10 and on the drawn data.

A chapter that computes on pictures claims its sentences in a hidden cell (`claim` of
book/_ext/kit.py), and a claim that does not hold stops the build. This reads every build at hand:
that of `make test`, and that of `make drawn` if it was made.
"""

from __future__ import annotations

import json
import re

import notebooks
import pytest
from conftest import REPOSITORY

CHAPTERS = ("01-two-views", "02-soft-variables", "08-training", "11-evaluation")
LOADS = re.compile(r"load_data\(|datasets\.load\(")
DATA_SET = re.compile(r"\b(?:horse|frog|truck|airplane)", re.I)


def said(cells: list[dict]) -> str:
    """All that a page says, captions included, its hidden cells aside."""
    texts = ["".join(cell["source"]) + json.dumps(cell["metadata"]) for cell in cells]
    return "\n".join(text for text in texts if "claim(" not in text)


def claimed(cells: list[dict]) -> list[str]:
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    names = [output.get("metadata", {}).get("scrapbook", {}).get("name", "") for output in outputs]
    return [name.removeprefix("claim: ") for name in names if name.startswith("claim: ")]


@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize("build", ["smoke", "drawn"])
def test_every_claimed_sentence_was_found_true_and_stands_on_its_page(
    build: str, chapter: str
) -> None:
    page = REPOSITORY / "build" / build / "book" / f"{chapter}.ipynb"
    if not page.exists():
        pytest.skip(f"no {page}: `make {'drawn' if build == 'drawn' else 'test'}` makes it")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    sentences = claimed(cells)
    assert len(sentences) == sum("".join(c["source"]).count("claim(") for c in cells) > 0
    assert [sentence for sentence in sentences if sentence not in said(cells)] == []


def test_every_chapter_that_computes_on_pictures_claims_its_sentences() -> None:
    pages = sorted(notebooks.BOOK.glob("[0-9]*.md"))
    loading = [page.stem for page in pages if LOADS.search(page.read_text(encoding="utf-8"))]
    assert {*loading} - {"15-full-scale"} == {*CHAPTERS}  # which only times its steps


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_sentence_names_what_only_one_data_set_shows(chapter: str) -> None:
    text = (notebooks.BOOK / f"{chapter}.md").read_text(encoding="utf-8")
    assert DATA_SET.findall(text) == []


def test_a_claim_that_does_not_hold_stops_its_page() -> None:
    import kit

    with pytest.raises(AssertionError, match="not true of this page: it rose"):
        kit.claim("it rose", False)
