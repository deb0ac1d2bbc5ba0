"""Build one chapter alone, for those who write it: `python tests/book/build_one.py
book/04-the-loss.md --shot /tmp/shots`.

References into other chapters cannot be resolved this way and are reported; `make book` is the
judge.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapter", type=Path)
    parser.add_argument(
        "--shot", type=Path, help="folder for screenshots, light and dark, wide and narrow"
    )
    arguments = parser.parse_args()
    name = arguments.chapter.resolve().relative_to(REPOSITORY / "book").with_suffix("").as_posix()
    folder = REPOSITORY / "_build" / "one" / name.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    toc = folder / "_toc.yml"
    pages = "" if name == "index" else f"parts:\n- numbered: true\n  chapters:\n  - file: {name}\n"
    pages += f"{'' if pages else 'parts:' + chr(10)}- chapters:\n  - file: appendix/bibliography\n"
    toc.write_text(f"format: jb-book\nroot: index\n{pages}")
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(REPOSITORY / "book"),
        "--path-output",
        str(folder),
        "--config",
        str(REPOSITORY / "_config.yml"),
        "--toc",
        str(toc),
        "-n",
    ]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}).returncode
    page = folder / "_build" / "html" / f"{name}.html"
    if status == 0 and arguments.shot:
        from screenshots import shoot

        shoot([page], arguments.shot)
    print(page)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
