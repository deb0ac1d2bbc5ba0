"""Debian's Chromium with its network closed, driven by Playwright, and what it finds wrong with a
page."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.resources import files

from playwright.sync_api import Browser, Page

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
WIDE, NARROW = 1280, 390  # pixels: a laptop, a telephone
WIDTHS = (NARROW, 768, WIDE, 1920)
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")


@dataclass
class Visit:
    """What a visit to a page showed."""

    foreign_requests: list[str] = field(default_factory=list)
    failed_requests: list[str] = field(default_factory=list)
    console_errors: list[str] = field(default_factory=list)
    tex_errors: list[str] = field(default_factory=list)
    formulas: int = 0
    alts: list[str] = field(default_factory=list)
    #: by theme, per two-theme figure: which of its images are seen
    themed: dict[str, list[dict]] = field(default_factory=dict)
    #: by theme, texts whose contrast to what lies behind them is below 4.5
    faint: dict[str, list[str]] = field(default_factory=dict)
    #: by width, pixels by which the page is wider than the window
    overflow: dict[int, int] = field(default_factory=dict)
    #: by width, listings, outputs, formulas and tables that are cut
    clipped: dict[int, list[str]] = field(default_factory=dict)
    #: figures that a telephone shows below three quarters of the size that they are drawn for
    small: list[str] = field(default_factory=list)
    #: folds and sliders that do not do what they are there for, by click or by key
    stuck: list[str] = field(default_factory=list)
    #: what axe finds against WCAG, A and AA
    violations: list[str] = field(default_factory=list)
    stopped: bool = False


def settled(page: Page) -> None:
    """Wait until MathJax, where the page has it, has set all formulas."""
    page.wait_for_function(
        "() => !document.querySelector('script[src*=mathjax]') || window.MathJax?.startup?.promise !== undefined"
    )
    page.evaluate("() => window.MathJax?.startup?.promise")


def visit(browser: Browser, url: str) -> Visit:
    """Open `url` once in a fresh profile, use what it has to be used, look at it in both themes and
    at all widths, and note everything that is wrong with it."""
    seen = Visit()
    origin = "/".join(url.split("/")[:3])
    context = browser.new_context(viewport={"width": WIDE, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    local = (origin, "data:", "blob:", "about:")

    def note(kind: list[str], text: str) -> None:
        if not seen.stopped:
            kind.append(text)

    page.on(
        "request",
        lambda r: None if r.url.startswith(local) else note(seen.foreign_requests, r.url),
    )
    page.on("requestfailed", lambda r: note(seen.failed_requests, r.url))
    page.on("response", lambda r: note(seen.failed_requests, r.url) if r.status >= 400 else None)
    page.on("console", lambda m: note(seen.console_errors, m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: note(seen.console_errors, str(error)))
    page.goto(url)
    settled(page)
    seen.stuck = [*page.evaluate(_UNFOLD), *stuck_keys(page)]
    for theme in ("dark", "light"):
        page.evaluate(_THEME, theme)
        found = page.evaluate(_INSPECT)
        seen.themed[theme], seen.faint[theme] = found["themed"], found["faint"]
    seen.tex_errors, seen.formulas, seen.alts = found["tex"], found["formulas"], found["alts"]
    for width in sorted(WIDTHS, reverse=True):
        page.set_viewport_size({"width": width, "height": 900})
        size = page.evaluate(_MEASURE)
        seen.overflow[width], seen.clipped[width] = size["overflow"], size["clipped"]
    seen.small = size["small"]
    seen.stopped = True  # what axe asks for is its own affair
    page.wait_for_timeout(350)  # the theme gives tab stops when a window has stopped changing
    seen.violations = page.evaluate(_FREEZE + AXE) or []
    seen.violations = page.evaluate(
        _AXE, {"type": "rule", "values": ["scrollable-region-focusable"]}
    )
    page.set_viewport_size({"width": WIDE, "height": 900})
    page.wait_for_timeout(350)
    seen.violations += page.evaluate(_AXE, {"type": "tag", "values": LEVELS})
    page.evaluate(_THEME, "dark")
    seen.violations += page.evaluate(_AXE, {"type": "rule", "values": ["color-contrast"]})
    context.close()
    return seen


def stuck_keys(page: Page) -> list[str]:
    """The first fold and all sliders, by key."""
    stuck = []
    for fold in page.locator("article details > summary").all()[:1]:
        opened = fold.evaluate("fold => fold.parentElement.open")
        fold.press("Enter")
        stuck += ["fold by key"] * (fold.evaluate("fold => fold.parentElement.open") == opened)
        fold.press("Enter")
    for fold in page.locator("article button.toggle-button").all()[:1]:
        opened = fold.get_attribute("aria-expanded") or fold.get_attribute("class")
        fold.press("Enter")
        now = fold.get_attribute("aria-expanded") or fold.get_attribute("class")
        stuck += ["solution by key"] * (now == opened)
        fold.press("Enter")
    for animation in page.locator(".imsvd-animation").all():
        picture, slider = animation.locator("img").first, animation.locator("input")
        last = picture.get_attribute("src")
        slider.press("ArrowLeft")
        before = picture.get_attribute("src")
        slider.press("Home")
        first = picture.get_attribute("src")
        slider.press("End")
        right = len({first, before, last}) > 1 and picture.get_attribute("src") == last != before
        stuck += [] if right else [f"slider {animation.get_attribute('id')}"]
    return stuck


_THEME = (
    r"""(theme) => { Object.assign(document.documentElement.dataset, { theme, mode: theme }); }"""
)

_UNFOLD = r"""() => {
  const stuck = [];
  for (const fold of document.querySelectorAll("article details")) {
    fold.querySelector("summary").click();
    if (!fold.open) stuck.push("fold: " + fold.innerText.slice(0, 40));
  }
  for (const button of document.querySelectorAll("article button.toggle-button")) {
    const box = button.closest(".toggle");
    button.click();
    if (box.classList.contains("toggle-hidden")) stuck.push("solution: " + box.innerText.slice(0, 40));
  }
  return stuck;
}"""

_MEASURE = r"""() => {
  const wide = (n) => n.getBoundingClientRect().width > 0 && n.scrollWidth > n.clientWidth + 1;
  const kinds = "article :is(pre, mjx-container[display=true], div.math, .output, .pst-scrollable-table-container, table)";
  const drawn = (image) => image.closest("picture") && image.currentSrc !== image.src ? image.naturalWidth
    : Number(image.getAttribute("width"));
  return {
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    clipped: [...document.querySelectorAll(kinds)].filter(wide)
      .map((n) => `${n.tagName} +${n.scrollWidth - n.clientWidth}: ${n.innerText.slice(0, 60)}`),
    small: [...document.querySelectorAll(".imsvd-figure img[class*=imsvd-]:not(.imsvd-pixels)")]
      .filter((image) => image.offsetWidth && image.offsetWidth < 0.74 * drawn(image)).map((image) => image.alt),
  };
}"""

# Axe looks at every node for a second or more: a token of code of each colour and a box for each formula are enough.
_FREEZE = r"""(() => {
  const seen = new Set();
  for (const svg of document.querySelectorAll("mjx-container svg")) {
    const { width, height } = svg.getBoundingClientRect();
    Object.assign(svg.style, { width: width + "px", height: height + "px" });
    svg.replaceChildren();
  }
  document.querySelectorAll(".imsvd-pairs li:nth-child(n + 2)").forEach((pair) => pair.remove());
  for (const pre of document.querySelectorAll("article pre")) {
    const [inner, outer] = [pre.scrollWidth, pre.clientWidth];
    const filler = document.createElement("span");
    filler.textContent = "x"; // without a text nobody would want to scroll there
    filler.style.cssText = `display: block; height: 1px; width: ${inner > outer + 1 ? inner : 1}px`;
    const kept = [...pre.querySelectorAll("span[class]")].filter((token) => {
      const kind = `${!!pre.closest(".cell_output")} ${token.className}`;
      return !token.children.length && !seen.has(kind) && seen.add(kind);
    });
    pre.replaceChildren(...kept, filler);
  }
})();
"""

_AXE = r"""async (runOnly) => (await axe.run(document, { runOnly, resultTypes: ["violations"] })).violations
  .map((v) => `${v.id} (${v.nodes.length}): ${v.nodes[0].html.slice(0, 150)}`)"""

_INSPECT = r"""() => {
  const article = document.querySelector("article") || document.body;
  const shown = (node) => getComputedStyle(node).display !== "none" && node.getBoundingClientRect().width > 0;

  // TeX: what MathJax marks as wrong, and formulas that it did not take for formulas.
  const bad = "[mathcolor=red], [fill=red], [data-mml-node=merror], merror, [data-mjx-error]";
  const tex = [...document.querySelectorAll(bad)].map((n) => n.closest("mjx-container")?.innerText || n.outerHTML.slice(0, 200));
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest("pre, code, script, style, mjx-container")) continue;
    if (/\\[()\[\]]|\$\$|\$[^$\s][^$]*\$|\\(frac|sum|log|mathbb|hat|bar)\b/.test(node.data)) tex.push(node.data.trim());
  }

  const themed = [...document.querySelectorAll(".imsvd-figure")].map((figure) => ({
    light: [...figure.querySelectorAll("img.imsvd-light")].some((i) => shown(i) && i.naturalWidth > 0),
    dark: [...figure.querySelectorAll("img.imsvd-dark")].some((i) => shown(i) && i.naturalWidth > 0),
    both: figure.querySelectorAll("img.imsvd-light, img.imsvd-dark").length === 2,
  }));

  // Contrast of text to the nearest painted background, after WCAG 2.
  const rgba = (text) => { const c = text.match(/[\d.]+/g).map(Number); return [...c.slice(0, 3), c[3] ?? 1]; };
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
  const behind = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const color = rgba(getComputedStyle(n).backgroundColor);
      if (color[3] > 0.9) return color;
    }
    return [255, 255, 255, 1];
  };
  const faint = [...article.querySelectorAll("p, li, figcaption span, td, th, h1, h2, h3, pre span, code, .imsvd-badge, a")]
    .filter((n) => shown(n) && n.innerText?.trim() && n.querySelector("p, li, mjx-container, img") === null)
    .filter((n) => {
      const [low, high] = [luminance(rgba(getComputedStyle(n).color)), luminance(behind(n))].sort((a, b) => a - b);
      return high / low < 4.5;
    })
    .map((n) => `${n.tagName} ${n.className}: ${n.innerText.slice(0, 60)}`);

  return {
    tex, themed, faint: [...new Set(faint)],
    formulas: document.querySelectorAll("mjx-container").length,
    alts: [...document.querySelectorAll("img")].map((image) => image.getAttribute("alt") ?? ""),
  };
}"""
