"""Files that are either whole or absent."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from imsvd_core.system.faults import MAKE_ROOM, REMEDIES, DiskFull


@contextmanager
def atomic_write(path: Path | str, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success flush it to disk and rename it
    into place.

    A reader sees the old file or the new one, never a part; after an error or a kill the old one
    stands. It stands, too, if `check`, which is called right before the renaming, raises. Raises
    DiskFull where there is no room.
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
    except BaseException as error:
        _tidy_up(temporary, path, error)
        raise
    _flush_folder(path.parent)


def _tidy_up(temporary: Path, path: Path, error: BaseException) -> None:
    written = temporary.stat().st_size if temporary.exists() else 0
    temporary.unlink(missing_ok=True)
    if reason := _disk_full(error):
        free = shutil.disk_usage(path.parent).free
        raise DiskFull(
            f"{path} does not fit ({reason.strerror} after {written / 1e6:,.1f} MB); "
            f"{free / 1e6:,.1f} MB are free there: make room"
        ) from error


def _disk_full(error: BaseException | None) -> OSError | None:
    """The full disk behind an error, which a library may have hidden."""
    while error is not None:
        if isinstance(error, OSError) and REMEDIES.get(error.errno or 0) == MAKE_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


def _flush_folder(folder: Path) -> None:
    """Let a rename in it survive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
