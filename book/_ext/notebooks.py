"""The chapters as Jupyter notebooks, and a copy of the book whose chapters are those notebooks,
executed.

    python book/_ext/notebooks.py FOLDER             # writes FOLDER/*.ipynb, and kit.py for them
    python book/_ext/notebooks.py FOLDER --execute   # lays FOLDER out like this repository and runs
    every notebook

(nbmake passes over folders named `_build`, so executed notebooks live elsewhere.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jupytext
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BOOK = REPOSITORY / "book"


def pages(toc: dict) -> Iterator[str]:
    """Names of the book's pages, in their order."""
    yield toc["root"]
    for part in toc.get("parts", [toc]):
        yield from (chapter["file"] for chapter in part["chapters"])


def is_notebook(page: Path) -> bool:
    """Whether a page computes: then its header names a kernel."""
    text = page.read_text(encoding="utf-8")
    return text.startswith("---") and "kernelspec:" in text.split("\n---", 1)[0]


def convert(folder: Path) -> list[Path]:
    """Write every page that computes as a notebook, and copy the others; returns the notebooks."""
    names = list(pages(yaml.safe_load((REPOSITORY / "_toc.yml").read_text(encoding="utf-8"))))
    computing = {name for name in names if is_notebook(BOOK / f"{name}.md")}
    for name in names:
        target = folder / f"{name}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = _LINK.sub(
            partial(_to_notebook, computing), (BOOK / f"{name}.md").read_text(encoding="utf-8")
        )
        if name in computing:
            jupytext.write(jupytext.reads(text, fmt="md:myst"), target.with_suffix(".ipynb"))
        else:
            target.write_text(text, encoding="utf-8")
    shutil.copyfile(BOOK / "_ext" / "kit.py", folder / "kit.py")  # the cells import it
    return [folder / f"{name}.ipynb" for name in names if name in computing]


_LINK = re.compile(r"(\]\((?:\.\./)*)([\w/-]+)\.md(#[\w-]+)?\)")


def _to_notebook(computing: set[str], link: re.Match[str]) -> str:
    """A link to a chapter leads to its notebook."""
    start, name, place = link.groups()
    return f"{start}{name}.ipynb{place or ''})" if name in computing else link[0]


def lay_out(folder: Path) -> list[Path]:
    """Lay `folder` out like this repository, with notebooks for chapters; returns the notebooks."""
    shutil.rmtree(folder, ignore_errors=True)
    notebooks = convert(folder / "book")
    for name in ("_static", "results", "references.bib"):
        if (BOOK / name).exists():
            (folder / "book" / name).symlink_to(BOOK / name)
    (folder / "imsvd_core").symlink_to(REPOSITORY / "imsvd_core")
    shutil.copyfile(REPOSITORY / "_toc.yml", folder / "_toc.yml")
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    config["sphinx"]["local_extensions"] = {"imsvd_book": str(BOOK / "_ext")}
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return notebooks


def execute(folder: Path) -> int:
    """Run all notebooks at scale smoke, two at a time, on one data set; returns pytest's exit
    status."""
    from imsvd_core.data import sources

    notebooks = lay_out(folder)
    scale = os.environ.get("IMSVD_SCALE", "smoke")
    dataset = sources.resolve(os.environ.get("IMSVD_DATASET", "auto"))
    chosen = {"IMSVD_SCALE": scale, "IMSVD_DATASET": dataset}
    (folder / "environment.json").write_text(json.dumps(chosen) + "\n", encoding="utf-8")
    print(f"The chapters run at scale {scale!r} on the data set {dataset!r}.", flush=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--overwrite",
        "--nbmake-timeout=600",
        "--timeout=600",
    ]
    command += ["-n", "2", "-p", "no:cacheprovider", "--durations=0", *map(str, notebooks)]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **chosen, "OMP_NUM_THREADS": "1"}
    ).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--execute", action="store_true")
    arguments = parser.parse_args()
    if arguments.execute:
        raise SystemExit(execute(arguments.folder.resolve()))
    for notebook in convert(arguments.folder):
        print(notebook)
