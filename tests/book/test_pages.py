"""Every rendered page, opened in a browser that can reach nothing but this machine."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from browser import NARROW, WIDE, WIDTHS, Visit, visit
from bs4 import BeautifulSoup
from conftest import REPOSITORY, serve
from notebooks import is_notebook, pages
from playwright.sync_api import Browser, Page

TOC = yaml.safe_load((REPOSITORY / "_toc.yml").read_text(encoding="utf-8"))
PAGES = list(pages(TOC))
CHAPTERS = [name for name in PAGES if is_notebook(REPOSITORY / "book" / f"{name}.md")]
ALSO = ["genindex", "search"]  # written by Sphinx, and a reader's way in all the same

NOT_PROSE = ".cell_input, .output, .highlight, .solution, .headerlink, .imsvd-run, script, style"

every_page = pytest.mark.parametrize("name", PAGES + ALSO)
every_chapter = pytest.mark.parametrize("name", CHAPTERS)


@pytest.fixture(scope="session")
def look(address: str, chromium: Browser) -> Callable[..., Visit]:
    """Visit a page of the book by its name, once."""

    @cache
    def look_once(name: str) -> Visit:
        return visit(chromium, f"{address}/{name}.html")

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
    seen = look(name)
    assert seen.faint[theme] == []
    for figure in filter(lambda figure: figure["both"], seen.themed[theme]):
        assert [figure["light"], figure["dark"]] == [theme == "light", theme == "dark"]


@every_page
def test_a_page_fits_every_window(name: str, look: Callable[..., Visit]) -> None:
    assert [width for width in WIDTHS if look(name).overflow[width] > 0] == []


@every_page
def test_no_listing_output_formula_or_table_is_cut_on_a_laptop(
    name: str, look: Callable[..., Visit]
) -> None:
    assert look(name).clipped[WIDE] == []


@every_page
def test_a_telephone_shows_figures_at_a_size_that_can_be_read(
    name: str, look: Callable[..., Visit]
) -> None:
    assert look(name).small == []


@every_page
def test_folds_solutions_and_sliders_obey_clicks_and_keys(
    name: str, look: Callable[..., Visit]
) -> None:
    assert look(name).stuck == []


@every_page
def test_a_page_violates_no_rule_of_accessibility(name: str, look: Callable[..., Visit]) -> None:
    assert look(name).violations == []


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


@pytest.fixture
def open_page(address: str, chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page of the book by its name, in a window of a width."""
    contexts = []

    def opened(name: str, width: int = WIDE) -> Page:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.goto(f"{address}/{name}.html")
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [NARROW, 768])
@pytest.mark.parametrize("menu", ["primary", "secondary"])
def test_a_small_windows_menus_open_and_close_by_click_and_by_key(
    menu: str, width: int, open_page: Callable[..., Page]
) -> None:
    page = open_page("01-two-views", width)
    button = page.locator(f".bd-header-article .{menu}-toggle")
    drawer = page.locator(f"#pst-{menu}-sidebar-modal")
    for use in (button.click, lambda: button.press("Enter")):
        use()
        assert drawer.is_visible()
        page.keyboard.press("Escape")
        assert drawer.is_hidden()
    button.click()
    place = drawer.locator("a[href]:not([href='#'])").last
    target = place.get_attribute("href")
    place.click()
    page.wait_for_url(f"**{target.split('/')[-1]}")


def test_a_wide_windows_contents_hide_and_come_back(open_page: Callable[..., Page]) -> None:
    page = open_page("01-two-views")
    button, contents = page.locator(".primary-toggle"), page.locator("#pst-primary-sidebar")
    for use in (button.click, lambda: button.press("Enter")):
        use()
        contents.wait_for(state="hidden")
        use()
        contents.wait_for(state="visible")


@pytest.mark.parametrize("way", ["click", "key"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_the_search_finds_a_word_and_shows_no_tex(
    width: int, way: str, open_page: Callable[..., Page]
) -> None:
    page = open_page("04-the-loss", width)
    if way == "key":
        page.keyboard.press("Control+k")
    else:
        page.locator(".search-button__button:visible").first.click()
    page.keyboard.type("total correlation")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li p.context", timeout=10_000)
    page.wait_for_function(
        "!document.querySelector('#search-results .search-summary')?.innerText.includes('...')"
    )
    found = page.locator("#search-results").inner_text()
    assert "correlation" in found
    assert not re.search(r"\\[A-Za-z(\[]|\$|[_^]\{", found)


def test_a_picture_is_enlarged_by_tap_and_by_key(open_page: Callable[..., Page]) -> None:
    page = open_page("01-two-views", NARROW)
    figure, large = (
        page.locator(".imsvd-figure:has(picture)").first,
        page.locator(".imsvd-enlarged"),
    )
    shown = figure.locator("img:visible")
    for use in (shown.click, lambda: figure.locator("button").press("Enter")):
        use()
        assert large.locator("img").evaluate("image => image.offsetWidth") > 1.5 * NARROW
        assert large.locator("img").get_attribute("alt") == shown.get_attribute("alt")
        page.keyboard.press("Escape")
        assert large.is_hidden()


def test_the_bibliography_bears_the_marks_of_the_text(site: Path) -> None:
    labels = soup(site / "appendix" / "bibliography.html").select(".citation > .label")
    listed = {label.get_text().strip("[]").replace("\xa0", " ") for label in labels}
    for name in CHAPTERS:
        for mark in soup(site / f"{name}.html").select(
            "article a.reference[href*='bibliography.html#']"
        ):
            cited = mark.get_text().replace("\xa0", " ")
            assert any(cited in label or cited == label.split(", ")[0] for label in listed), cited


def test_the_printed_batch_script_is_free_of_the_builders_environment(site: Path) -> None:
    outputs = soup(site / "15-full-scale.html").select(".cell_output pre")
    scripts = [one.get_text() for one in outputs if "#SBATCH" in one.get_text()]
    assert scripts
    assert not re.search(r"export IMSVD_(?!DATA=)\w+|/root|/home", "".join(scripts))


@pytest.mark.parametrize("name", [name for name in CHAPTERS if re.match(r"\d\d-", name)])
def test_a_chapter_is_read_in_half_an_hour(name: str, site: Path) -> None:
    article = BeautifulSoup(str(soup(site / f"{name}.html").article), "html.parser")
    for part in article.select(NOT_PROSE):
        part.decompose()
    for formula in article.select(".math"):
        formula.replace_with(" formula ")
    assert len(article.get_text(" ").split()) <= 4500


def test_readers_who_ask_for_less_motion_get_the_slider_alone(
    address: str, chromium: Browser
) -> None:
    context = chromium.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{address}/index.html")
    assert page.locator(".imsvd-controls button").is_hidden()
    assert page.locator(".imsvd-animation input").is_visible()
    context.close()


BROKEN = r"""<!DOCTYPE html><html lang="en"><head><script src="{mathjax}"></script></head>
<body><article style="background:#fff">
<p>\(\nosuchmacro\) and $x$</p><p style="color:#ccc">faint</p><img src="data:,"><img src="http://example.org/x.png" alt="">
<a href="broken.html#none">x</a><a href="nowhere.html">y</a><div style="width:2000px">wide</div><pre style="width:9em;overflow:auto">much too long a line of code for nine ems</pre><details><summary onclick="return false">fold</summary></details><script>undefined.x</script>
<div class="imsvd-figure"><img class="imsvd-light" width="2000" style="width:200px" src="{dot}"><img class="imsvd-dark" src="{dot}"></div></article></body></html>"""


def test_these_checks_see_what_is_broken(tmp_path: Path, site: Path, chromium: Browser) -> None:
    (tmp_path / "_static").symlink_to(site / "_static")
    dot = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAAC"
    page = BROKEN.replace("{mathjax}", "_static/mathjax/tex-svg.js").replace("{dot}", dot)
    (tmp_path / "broken.html").write_text(page)
    server = serve(tmp_path)
    seen = visit(chromium, f"http://127.0.0.1:{server.server_port}/broken.html")
    server.shutdown()
    assert seen.foreign_requests == ["http://example.org/x.png"]
    assert any("undefined" in error for error in seen.console_errors)
    assert len(seen.tex_errors) >= 2
    assert "" in seen.alts
    assert all(any("faint" in text for text in seen.faint[theme]) for theme in seen.faint)
    assert min(seen.overflow.values()) > 0
    assert any("nine ems" in text for text in seen.clipped[WIDE])
    assert seen.stuck == ["fold: fold", "fold by key"]
    assert len(seen.small) == 1
    assert {"image-alt", "color-contrast", "scrollable-region-focusable"} <= {
        violation.split(" ")[0] for violation in seen.violations
    }
    themed = seen.themed["light"]
    assert [figure["light"] for figure in themed] == [figure["dark"] for figure in themed]
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
