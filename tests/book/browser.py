"""Debian's Chromium with its network closed, driven by Playwright, and what it finds wrong with a
page."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

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


@dataclass
class Visit:
    """What a visit to a page showed."""

    foreign_requests: list[str] = field(default_factory=list)
    failed_requests: list[str] = field(default_factory=list)
    console_errors: list[str] = field(default_factory=list)
    tex_errors: list[str] = field(default_factory=list)
    formulas: int = 0
    alts: list[str] = field(default_factory=list)
    themed: list[dict] = field(
        default_factory=list
    )  #: per two-theme figure: which of its images are seen
    faint: list[str] = field(
        default_factory=list
    )  #: texts whose contrast to what lies behind them is below 4.5
    overflow: int = 0  #: pixels by which the page is wider than the window


def settled(page: Page) -> None:
    """Wait until MathJax, where the page has it, has set all formulas."""
    page.wait_for_function(
        "() => !document.querySelector('script[src*=mathjax]') || window.MathJax?.startup?.promise !== undefined"
    )
    page.evaluate("() => window.MathJax?.startup?.promise")


def visit(browser: Browser, url: str, *, theme: str = "light", width: int = WIDE) -> Visit:
    """Open `url` in a fresh profile and note everything that is wrong with it."""
    seen = Visit()
    origin = "/".join(url.split("/")[:3])
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
    page = context.new_page()
    local = (origin, "data:", "blob:", "about:")
    page.on(
        "request",
        lambda r: None if r.url.startswith(local) else seen.foreign_requests.append(r.url),
    )
    page.on("requestfailed", lambda r: seen.failed_requests.append(r.url))
    page.on("response", lambda r: seen.failed_requests.append(r.url) if r.status >= 400 else None)
    page.on("console", lambda m: seen.console_errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: seen.console_errors.append(str(error)))
    page.goto(url)
    settled(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = page.evaluate(_INSPECT)
    context.close()
    seen.tex_errors, seen.formulas, seen.alts = found["tex"], found["formulas"], found["alts"]
    seen.themed, seen.faint, seen.overflow = found["themed"], found["faint"], found["overflow"]
    return seen


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
    overflow: document.documentElement.scrollWidth - window.innerWidth,
  };
}"""
