"""Files that are either whole or absent, and folders that one process has to itself.

A cluster may take a process for dead that is not, and start its job again: then two write to one folder. Each
process that holds a folder therefore leaves its token there, a later attempt replaces it, and whoever does not find
its own any more cannot write: it is fenced off.
"""

import json
import logging
import os
import socket
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def _pass() -> None:
    """What is checked of a file that belongs to no run."""


@contextmanager
def atomic_write(
    path: Path | str, check: Callable[[], None] = _pass, *, fenced: bool = True
) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success flush it to disk and
    rename it into place.

    A reader sees the old file or the new one, never a part; after an error or a kill the
    old one stands, too if `check`, which is called right before the renaming, raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if fenced:
            check_hold(path)
        check()
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            # a successor may have tidied up
            check()
            raise
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


ATTEMPT = "IMSVD_ATTEMPT"  #: environment variable: which attempt of which job this is; a later one compares greater
TOKEN = ".attempt"
PATIENCE = 30.0  #: seconds that an attempt waits for the one it supersedes to let go

log = logging.getLogger(__name__)


class Superseded(RuntimeError):
    """A later attempt at the same work has taken the folder over: this one must not write there any more."""


class Hold:
    """A folder kept from other processes while this object lives; the system ends it with
    the process, however that dies.

    The lock keeps out whoever comes second. Where it does not hold (a file system without
    locks, a node that was thought dead), the token does: of two attempts (`ATTEMPT`) the
    later takes the folder over.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        self.token = {
            "holder": f"{holder}, job {job}" if job else holder,
            "unique": uuid.uuid4().hex,
            "attempt": os.environ.get(ATTEMPT),
        }
        handle, there = _lock(folder), _token(folder)
        if self._precedes(there):
            raise Superseded(
                f"run_dir={str(folder)!r} belongs to a later attempt "
                f"({there['holder']}): this one ends"
            )
        if handle is None and not self._supersedes(there):
            by = there.get("holder", "another process")
            raise ValueError(
                f"run_dir={str(folder)!r} is in use by {by}: wait for its end, "
                "stop it, or give another folder"
            )
        self._leave_token()
        if handle is None:
            log.warning(
                "taking %s over from an earlier attempt, %s, which may not be dead",
                folder,
                there["holder"],
            )
            end = time.monotonic() + PATIENCE
            while (handle := _lock(folder)) is None and time.monotonic() < end:
                time.sleep(0.1)
        if handle:
            weakref.finalize(self, os.close, handle)

    def check(self) -> None:
        """Raise Superseded if another process has taken the folder over, or removed it.

        An earlier attempt that fell asleep while it took the folder, and wakes, does not
        keep it.
        """
        there = _token(self.folder)
        if self._supersedes(there):
            self._leave_token()
        elif there.get("unique") != self.token["unique"]:
            by = f"taken over by {there['holder']}" if there else "removed"
            raise Superseded(
                f"run_dir={str(self.folder)!r} has been {by}: this process writes no more"
            )

    def _supersedes(self, other: dict) -> bool:
        theirs = other.get("attempt")
        return bool(theirs) and (self.token["attempt"] or "") > theirs

    def _precedes(self, other: dict) -> bool:
        ours = self.token["attempt"]
        return bool(ours) and ours < (other.get("attempt") or "")

    def _leave_token(self) -> None:
        with atomic_write(self.folder / TOKEN, fenced=False) as file:
            file.write(json.dumps(self.token).encode() + b"\n")


def _lock(folder: Path) -> int | None:
    """A file handle that locks the folder, 0 where the system has no such locks, or None if another process has it."""
    if fcntl is None:
        return 0
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(
            handle, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # unlike flock's, not kept by forked workers that live on
    except OSError as error:
        os.close(handle)
        return None if isinstance(error, BlockingIOError | PermissionError) else 0
    return handle


def _token(folder: Path) -> dict:
    """Who holds the folder, or held it last; {} if nobody did. A file system that stumbles is asked again."""
    for pause in (0.1, 1, 5, None):
        try:
            return json.loads((folder / TOKEN).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)


_holds: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()


def hold(folder: Path | str) -> Hold:
    """Keep other processes out of `folder`, an existing one, for as long as what is returned lives; this process may hold
    it several times.

    Raises ValueError naming the process that holds it, unless that is an earlier attempt at the same work (`ATTEMPT`);
    Superseded if a later one does.
    """
    path = Path(folder).resolve()
    held = _holds.get(path)
    if held is None:
        held = _holds[path] = Hold(path)
    return held


def check_hold(path: Path | str) -> None:
    """Raise Superseded if this process holds a folder at or above `path`, and another has taken it over."""
    path = Path(path).resolve()
    for folder, held in list(_holds.items()):
        if path.is_relative_to(folder):
            held.check()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
