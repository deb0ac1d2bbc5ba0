"""The end of a process that makes no progress, with a trace of where it hangs."""

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from imsvd_core.distributed import world

#: Seconds between a process's trace and its end, in which the other ranks leave theirs.
LINGER = 15.0
_moves = 0


def moved() -> None:
    """Note that this process makes progress."""
    global _moves
    _moves += 1


@contextmanager
def watched(minutes: float, setting: str) -> Iterator[None]:
    """End this process if `moved` is not called for so long inside the block; 0 for never.

    Every thread's trace goes to its standard error first. `setting` is what a message names. A
    process in which somebody works by hand, in a notebook say, may pause as long as it likes.
    """
    ended = threading.Event()
    if minutes and not (hasattr(sys, "ps1") or "ipykernel" in sys.modules):
        threading.Thread(target=_watch, args=(60 * minutes, setting, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(seconds: float, setting: str, ended: threading.Event) -> None:
    pause = min(seconds / 10, 10)
    seen, idle = _moves, 0.0
    # counted by own pauses: time in which the whole process is suspended is none
    while not ended.wait(pause):
        idle = idle + pause if seen == _moves else 0.0
        seen = _moves
        if idle >= seconds:
            rank, ranks = world()
            words = f"rank {rank} of {ranks} has made no progress for {idle / 60:.3g} minutes; "
            os.write(2, f"{words}it hangs here, and ends ({setting} is its patience):\n".encode())
            faulthandler.dump_traceback(2)
            if not ended.wait(LINGER):
                os._exit(1)
