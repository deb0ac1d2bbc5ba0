"""Files that are either whole or absent, and folders that one process has to itself."""

import os
import socket
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success flush it to disk and rename it into place.

    A reader sees the old file or the new one, never a part; after an error or a kill the old one stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


class Hold:
    """A folder kept from other processes while this object lives; the system ends it with the process, however that dies."""

    def __init__(self, folder: Path):
        if fcntl is None:
            return
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not kept by forked workers that live on
        except (BlockingIOError, PermissionError):
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(f"run_dir={str(folder)!r} is in use by {holder or 'another process'}: "
                             "wait for its end, stop it, or give another folder") from None
        except OSError:  # a file system without locks
            os.close(handle)
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        weakref.finalize(self, os.close, handle)


_holds: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()


def hold(folder: Path | str) -> Hold:
    """Keep other processes out of `folder`, an existing one, for as long as what is returned lives; this process may hold
    it several times. Raises ValueError naming the process that holds it. Does nothing where the system has no such locks.
    """
    path = Path(folder).resolve()
    held = _holds.get(path)
    if held is None:
        held = _holds[path] = Hold(path)
    return held


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
