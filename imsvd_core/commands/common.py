"""What the commands share."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from imsvd_core.distributed import world
from imsvd_core.results import read_result
from imsvd_core.system.ranks import process_group


def peek(argv: Sequence[str], option: str) -> str | None:
    """The value of an option that decides from what the other settings start."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value")
    value: str | None = parser.parse_known_args(argv)[0].value
    return value


def usage(text: str, argv: Sequence[str]) -> SystemExit:
    """Print a usage; to be raised: 0 where it was asked for, else 2."""
    print(text)
    return SystemExit(0 if argv[:1] in (["-h"], ["--help"]) else 2)


def wide_console() -> Console:
    """For tables: as wide as the terminal, wider where they are read later."""
    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def ranks(device: str | None) -> Iterator[None]:
    """The process group of a command, in which rank 0 alone writes to the log."""
    with process_group(device or "auto"):
        if world()[0]:
            logging.getLogger().setLevel(logging.ERROR)
        yield


def show_result(path: Path) -> Path:
    """Print the figures of a result, on rank 0; whole curves stay in the file."""
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
