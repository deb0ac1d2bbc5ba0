"""Every rendered page, opened in a browser that can reach nothing but this machine."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from browser import NARROW, Visit, visit
from bs4 import BeautifulSoup
from conftest import REPOSITORY, serve
from notebooks import is_notebook, pages
from playwright.sync_api import Browser

TOC = yaml.safe_load((REPOSITORY / "_toc.yml").read_text(encoding="utf-8"))
PAGES = list(pages(TOC))
CHAPTERS = [name for name in PAGES if is_notebook(REPOSITORY / "book" / f"{name}.md")]
ALSO = ["genindex", "search"]  # written by Sphinx, and a reader's way in all the same

every_page = pytest.mark.parametrize("name", PAGES + ALSO)
every_chapter = pytest.mark.parametrize("name", CHAPTERS)


@pytest.fixture(scope="session")
def look(address: str, chromium: Browser) -> Callable[..., Visit]:
    """Visit a page of the book by its name, once for each theme and width."""

    @cache
    def look_once(name: str, **how: object) -> Visit:
        return visit(chromium, f"{address}/{name}.html", **how)

    return look_once


def test_the_book_is_rendered_from_its_executed_notebooks_without_a_warning(
    rendering: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    assert rendering[1].returncode == 0, rendering[1].stdout[-8000:]


@every_page
def test_a_page_asks_no_other_host_for_anything(name: str, look: Callable[..., Visit]) -> None:
    assert look(name).foreign_requests == []


@every_page
def test_all_that_a_page_asks_for_is_there(name: str, look: Callable[..., Visit]) -> None:
    assert look(name).failed_requests == []


@every_page
def test_a_page_reports_no_error(name: str, look: Callable[..., Visit]) -> None:
    assert look(name).console_errors == []


@every_page
def test_all_formulas_of_a_page_are_set(name: str, look: Callable[..., Visit]) -> None:
    assert look(name).tex_errors == []


@every_page
def test_every_image_of_a_page_says_what_is_seen(name: str, look: Callable[..., Visit]) -> None:
    for alt in look(name).alts:
        assert len(alt) >= 30, alt
        assert not re.search(r"[0-9a-f]{16}|\.(png|svg|jpe?g|webp)$", alt), alt


@every_page
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_can_be_read_in_both_themes(
    name: str, theme: str, look: Callable[..., Visit]
) -> None:
    seen = look(name, theme=theme)
    assert seen.faint == []
    for figure in filter(lambda figure: figure["both"], seen.themed):
        assert [figure["light"], figure["dark"]] == [theme == "light", theme == "dark"]


@every_page
def test_a_page_fits_a_telephone(name: str, look: Callable[..., Visit]) -> None:
    assert look(name, width=NARROW).overflow <= 0


@every_page
def test_every_link_inside_the_book_leads_somewhere(name: str, site: Path) -> None:
    assert broken_links(site, site / f"{name}.html") == []


@every_chapter
def test_a_chapter_says_on_what_it_ran(name: str, site: Path) -> None:
    run = json.loads((site / "run.json").read_text())
    said = soup(site / f"{name}.html").select_one("p.imsvd-run").get_text()
    assert run["title"] in said
    assert run["scale"] in said


@every_chapter
def test_no_cell_of_a_chapter_ended_in_an_error(name: str, site: Path) -> None:
    assert soup(site / f"{name}.html").select(".traceback") == []


@pytest.mark.parametrize("name", [name for name in PAGES if re.match(r"\d\d-", name)])
def test_a_chapter_bears_the_number_of_its_file(name: str, site: Path) -> None:
    page = soup(site / f"{name}.html")
    number = str(int(name[:2]))
    assert page.select_one("h1 .section-number").get_text().strip() == f"{number}."
    labels = [label.get_text() for label in page.select("figcaption .caption-number, span.eqno")]
    assert labels or name not in CHAPTERS
    assert all(re.search(rf"\b{number}\.\d+", label) for label in labels), labels


@pytest.mark.parametrize("name", [name for name in CHAPTERS if re.match(r"\d\d-", name)])
def test_every_exercise_has_a_collapsed_solution_below_it(name: str, site: Path) -> None:
    page = soup(site / f"{name}.html")
    exercises = page.select("div.exercise")
    assert 3 <= len(exercises) <= 8
    assert len(page.select("div.solution.dropdown")) == len(exercises)


def test_every_stored_result_is_listed_and_can_be_had(site: Path) -> None:
    page = soup(site / "appendix" / "results.html")
    listed = {link.get_text() for link in page.select("table a.download")}
    stored = {
        json.loads(path.read_text())["name"]
        for path in (REPOSITORY / "book" / "results").glob("*.json")
    }
    assert listed == stored


def test_the_animated_picture_obeys_mouse_and_keyboard(address: str, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto(f"{address}/index.html")
    picture, slider = (
        page.locator(".imsvd-animation img").first,
        page.locator(".imsvd-animation input"),
    )
    label = page.locator(".imsvd-animation output")
    last = picture.get_attribute("src")
    last_label = label.inner_text()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert picture.get_attribute("src") != last
    assert label.inner_text() != last_label
    page.keyboard.press("End")
    assert picture.get_attribute("src") == last
    button = page.get_by_role("button", name="Play")
    button.click()
    page.wait_for_function(
        "first => document.querySelector('.imsvd-animation output').innerText !== first",
        arg=last_label,
    )
    page.get_by_role("button", name="Pause").click()
    page.close()


def test_readers_who_ask_for_less_motion_get_the_slider_alone(
    address: str, chromium: Browser
) -> None:
    context = chromium.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{address}/index.html")
    assert page.locator(".imsvd-animation button").is_hidden()
    assert page.locator(".imsvd-animation input").is_visible()
    context.close()


def test_the_search_finds_a_word_of_the_book(address: str, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto(f"{address}/search.html?q=redundancy")
    page.wait_for_selector("#search-results li", timeout=10_000)
    page.close()


BROKEN = r"""<!DOCTYPE html><html lang="en"><head><script src="{mathjax}"></script></head>
<body><article style="background:#fff">
<p>\(\nosuchmacro\) and $x$</p><p style="color:#ccc">faint</p><img src="data:,"><img src="http://example.org/x.png" alt="">
<a href="broken.html#none">x</a><a href="nowhere.html">y</a><div style="width:900px">wide</div><script>undefined.x</script>
<div class="imsvd-figure"><img class="imsvd-light" src="{dot}"><img class="imsvd-dark" src="{dot}"></div></article></body></html>"""


def test_these_checks_see_what_is_broken(tmp_path: Path, site: Path, chromium: Browser) -> None:
    (tmp_path / "_static").symlink_to(site / "_static")
    dot = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAAC"
    page = BROKEN.replace("{mathjax}", "_static/mathjax/tex-svg.js").replace("{dot}", dot)
    (tmp_path / "broken.html").write_text(page)
    server = serve(tmp_path)
    seen = visit(chromium, f"http://127.0.0.1:{server.server_port}/broken.html", width=NARROW)
    server.shutdown()
    assert seen.foreign_requests == ["http://example.org/x.png"]
    assert any("undefined" in error for error in seen.console_errors)
    assert len(seen.tex_errors) >= 2
    assert "" in seen.alts
    assert any("faint" in text for text in seen.faint)
    assert seen.overflow > 0
    assert [figure["light"] for figure in seen.themed] == [figure["dark"] for figure in seen.themed]
    assert len(broken_links(tmp_path, tmp_path / "broken.html")) == 2


@cache
def soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(page: Path) -> set[str]:
    return {tag["id"] for tag in soup(page).select("[id]")}


def broken_links(root: Path, page: Path) -> list[str]:
    """Links of a page to pages, files or places that are not there."""
    broken = []
    for tag in soup(page).select("a[href], link[href]"):
        url, place = urldefrag(tag["href"])
        if urlsplit(url).scheme or url.startswith("//"):
            continue
        target = (page.parent / unquote(urlsplit(url).path)).resolve() if url else page.resolve()
        target = target / "index.html" if target.is_dir() else target
        if (
            not target.is_relative_to(root.resolve())
            or not target.exists()
            or (place and target.suffix == ".html" and unquote(place) not in anchors(target))
        ):
            broken.append(tag["href"])
    return broken
