"""Run folders: one process at a time writes to one.

A cluster may take a process for dead that is not, and start its job again: then two write to one
folder. Each process that takes a folder therefore leaves a token there, a later attempt replaces
it, and a process that no longer finds its own token cannot write: it is fenced off.
"""

import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from imsvd_core.system import files
from imsvd_core.system.config import plain
from imsvd_core.system.faults import Fault

#: Environment variable: which attempt of which job this is; a later one compares greater.
ATTEMPT = "IMSVD_ATTEMPT"
TOKEN = ".attempt"
#: How long an attempt waits for the one that it supersedes to let go.
HANDOVER_SECONDS = 30.0

log = logging.getLogger(__name__)


class Superseded(Fault):
    """A later attempt at the same work has taken the folder over: this process must not write."""


class RunFolder:
    """A folder that this process has to itself inside `with`; its writes there are fenced.

        with RunFolder("runs/first") as run:
            run.write("result.json", {"knn": 81.2})

    Blocks of one object may be nested; the outermost one lets go. The system ends the lock with the
    process, however that dies. Outside a block nothing is locked, and writes are not fenced.

    The lock keeps out a second process. Where it does not hold (a file system without locks, a node
    that was thought dead), the token does: of two attempts (`ATTEMPT`) the later takes the folder.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._depth = 0
        self._lock = ExitStack()
        self._own: dict[str, Any] = {}

    def __enter__(self) -> "RunFolder":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def on_rank_0(self) -> Iterator["RunFolder"]:
        """As `with run`, for all ranks together: rank 0 has the folder, and all get its refusal."""
        from imsvd_core.distributed import on_rank_0  # imports torch, which few processes here need

        on_rank_0(self.acquire)()
        try:
            yield self
        finally:
            self.release()

    def acquire(self) -> None:
        """Make the folder, lock it, and leave this process's token there.

        Raises ValueError naming the process that has it, unless that is an earlier attempt at the
        same work; Superseded if a later attempt has it.
        """
        if self._depth == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self._own = _new_token()
            with ExitStack() as lock:
                self._take(lock.enter_context(open(self.path / ".lock", "ab")))
                self._lock = lock.pop_all()
        self._depth += 1

    def release(self) -> None:
        """Leave a block; the token stays, and tells who was the last. Nothing happens outside."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._lock.close()

    def check(self) -> None:
        """Raise Superseded if another process has taken the folder over, or removed it.

        An earlier attempt that fell asleep while it took the folder, and wakes, does not keep it.
        """
        if self._depth == 0:
            return
        current = self._token()
        if _supersedes(self._own, current):
            self._leave_token()
        elif current.get("unique") != self._own["unique"]:
            reason = f"taken over by {current['holder']}" if current else "removed"
            raise Superseded(
                f"run_dir={str(self.path)!r} has been {reason}: this process writes no more"
            )

    def atomic_write(self, name: Path | str) -> AbstractContextManager[BinaryIO]:
        """`files.atomic_write` of a file in the folder, its token checked before the renaming.

        Raises Superseded, with the old file standing.
        """
        return files.atomic_write(self.path / name, self.check)

    def write(self, name: Path | str, content: Any) -> None:
        """Write bytes as they are, or anything else as JSON, whole or not at all."""
        if not isinstance(content, bytes):
            content = json.dumps(plain(content), indent=1, allow_nan=False).encode() + b"\n"
        with self.atomic_write(name) as file:
            file.write(content)

    def _take(self, file: BinaryIO) -> None:
        free, current = _lock(file), self._token()
        holder = current.get("holder", "another process")
        if _supersedes(current, self._own):
            raise Superseded(
                f"run_dir={str(self.path)!r} belongs to a later attempt ({holder}): this one ends"
            )
        if not free and not _supersedes(self._own, current):
            raise ValueError(
                f"run_dir={str(self.path)!r} is in use by {holder}: wait for its end, "
                "stop it, or give another folder"
            )
        self._leave_token()
        if not free:
            log.warning("taking %s over from %s, which may not be dead", self.path, holder)
            deadline = time.monotonic() + HANDOVER_SECONDS
            while not _lock(file) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _token(self) -> dict[str, Any]:
        """Of whoever has the folder, or had it last; {} if nobody. A failed read is repeated."""
        for pause in (0.1, 1, 5, None):
            try:
                return json.loads((self.path / TOKEN).read_text())
            except (FileNotFoundError, ValueError):
                return {}
            except OSError:
                if pause is None:
                    raise
                time.sleep(pause)
        return {}

    def _leave_token(self) -> None:
        with files.atomic_write(self.path / TOKEN) as file:
            file.write(json.dumps(self._own).encode() + b"\n")


def _lock(file: BinaryIO) -> bool:
    """Lock the file until it is closed; False if another process has locked it.

    True, too, where the file system has no locks. lockf's locks, unlike flock's, are not kept by
    forked workers that live on.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError | PermissionError)
    return True


def _new_token() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    return {
        "holder": f"{holder}, job {job}" if job else holder,
        "unique": uuid.uuid4().hex,
        "attempt": os.environ.get(ATTEMPT),
    }


def _supersedes(token: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` is an attempt, and `token` a later one."""
    return bool(other.get("attempt")) and (token.get("attempt") or "") > other["attempt"]
