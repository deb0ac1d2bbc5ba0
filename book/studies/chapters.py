"""How long each chapter runs on the device at hand (the boxes at the heads of the chapters quote it
for a GPU).

python book/studies/chapters.py RESULT.json [CHAPTER ...]
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient

from imsvd_core.data import sources
from imsvd_core.recipes import current_scale
from imsvd_core.results import provenance, write_result
from imsvd_core.system.devices import pick_device

BOOK = Path(__file__).parents[1]


def main(result: Path, names: list[str]) -> None:
    chapters = [BOOK / f"{name}.md" for name in names] or sorted(BOOK.glob("[0-9]*.md"))
    figures: dict[str, float] = {}
    paths = [str(BOOK / "_ext"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the cells import kit.py
    for chapter in chapters:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            NotebookClient(
                jupytext.read(chapter), timeout=3600, resources={"metadata": {"path": folder}}
            ).execute()
            figures[chapter.stem] = round(time.perf_counter() - start, 1)
        print(chapter.stem, figures[chapter.stem], flush=True)
    device = pick_device()
    origin = provenance(
        config={"scale": current_scale()},
        seed=0,
        device=device,
        dataset=sources.title(),
        seconds=sum(figures.values()),
    )
    write_result(result, f"chapters-{device.type}", {"seconds": figures}, origin, overwrite=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
