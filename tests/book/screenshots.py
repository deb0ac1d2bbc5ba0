"""Photograph rendered pages, light and dark, wide and narrow, for people to look at.

python tests/book/screenshots.py _build/html /tmp/shots
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from browser import CHROMIUM, FLAGS, settled

WIDTHS = {"wide": 1400, "narrow": 390}


def shoot(pages: Iterable[Path], folder: Path) -> list[Path]:
    """Save PNGs of whole `pages` into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    shots = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for size, width in WIDTHS.items():
            for theme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": 900})
                context.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
                page = context.new_page()
                for path in pages:
                    page.goto(path.resolve().as_uri())
                    settled(page)
                    shots.append(folder / f"{path.stem}-{size}-{theme}.png")
                    page.screenshot(path=shots[-1], full_page=True)
                context.close()
        browser.close()
    return shots


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    for shot in shoot(sorted(source.rglob("*.html")) if source.is_dir() else [source], target):
        print(shot)
