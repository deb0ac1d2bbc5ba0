"""Files that are either whole or absent."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path | str, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success flush it to disk and rename it
    into place.

    A reader sees the old file or the new one, never a part; after an error or a kill the old one
    stands. It stands, too, if `check`, which is called right before the renaming, raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            # a successor has tidied up
            check()
            raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Let a rename in it survive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
