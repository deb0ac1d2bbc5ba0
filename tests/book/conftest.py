"""The book rendered from its executed notebooks, served on this machine, visited by a browser whose
network is closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from browser import CHROMIUM, FLAGS
from playwright.sync_api import Browser, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]


def build(
    folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Render the book laid out in `folder` into `folder`/_build/html as `make book` does: warnings
    are errors."""
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(folder / "book")]
    command += ["--config", str(folder / "_config.yml"), "--toc", str(folder / "_toc.yml")]
    command += ["--path-output", str(folder), "-W", "-n", "--keep-going"]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="session")
def rendering() -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the rendered pages, and what the build said."""
    folder = Path(os.environ.get("IMSVD_BOOK", REPOSITORY / "build" / "smoke")).resolve()
    if not (folder / "environment.json").exists():
        reason = f"no executed chapters in {folder}: `make test` makes them"
        if "IMSVD_BOOK" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return folder / "_build" / "html", build(
        folder, json.loads((folder / "environment.json").read_text())
    )


@pytest.fixture(scope="session")
def site(rendering: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The folder of the rendered pages."""
    folder, done = rendering
    if not (folder / "index.html").exists():
        pytest.skip(f"the book was not rendered (status {done.returncode}); another test says why")
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> ThreadingHTTPServer:
    """Serve a folder on a free port of 127.0.0.1; the caller shuts it down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the rendered book is served."""
    server = serve(site)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A browser that can reach this machine only."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
