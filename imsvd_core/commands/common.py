"""What the commands share."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


def wide_console() -> Console:
    """For tables: as wide as the terminal, wider where they are read later."""
    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def ranks(device: str | None) -> Iterator[None]:
    """The process group of a command, in which rank 0 alone writes to the log."""
    from imsvd_core.distributed import world  # imports torch
    from imsvd_core.system.ranks import process_group

    with process_group(device or "auto"):
        if world()[0]:
            logging.getLogger().setLevel(logging.ERROR)
        yield


def show_result(path: Path) -> Path:
    """Print the figures of a result, on rank 0; whole curves stay in the file."""
    from imsvd_core.distributed import world
    from imsvd_core.results import read_result

    if world()[0]:
        return path
    figures = {
        name: value
        for name, value in read_result(path)["figures"].items()
        if not (isinstance(value, list) and value and isinstance(value[0], dict))
    }
    Console().print(figures)
    Console().print(f"written to {path}", highlight=False)
    return path
