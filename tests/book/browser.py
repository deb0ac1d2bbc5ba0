"""Debian's Chromium with its network closed, driven by Playwright."""

from __future__ import annotations

import shutil

from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def settled(page: Page) -> None:
    """Wait until MathJax, where the page has it, has set all formulas."""
    page.wait_for_function(
        "() => !document.querySelector('script[src*=mathjax]') || (window.MathJax?.startup?.promise !== undefined)"
    )
    page.evaluate("() => window.MathJax?.startup?.promise")
