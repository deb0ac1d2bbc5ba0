"""The README keeps its promises."""

from __future__ import annotations

import re
import subprocess

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_python_lines_run_as_they_stand() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})


def test_every_make_target_that_is_named_exists_and_is_listed() -> None:
    listed = subprocess.run(
        ["make", "-s"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"book", "test"} <= named
    for target in named | {"notebooks", "serve", "bench", "clean"}:
        assert f"make {target}" in listed


def test_the_picture_is_there_and_says_what_is_seen() -> None:
    for path in re.findall(r'src(?:set)?="([^"]+)"', README):
        assert (REPOSITORY / path).is_file()
    (alt,) = re.findall(r'alt="([^"]+)"', README)
    assert len(alt) > 60


def test_an_old_python_is_refused_with_a_remedy(tmp_path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.0" && exit 0\nexit 1\n')
    old.chmod(0o755)
    ready = tmp_path / "ready"
    command = ["make", f"PYTHON={old}", f"READY={ready}", f"BIN={tmp_path}", str(ready)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.10.0" in done.stderr
    assert "make PYTHON=" in done.stderr
