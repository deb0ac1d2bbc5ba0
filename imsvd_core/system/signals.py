"""The notice to stop that shells and clusters send: heard at any time, answered where nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 143  #: exit status of what was told to stop: 128 + SIGTERM, as shells have it


class Stopped(RuntimeError):
    """Work that was told to stop did so, with what it had saved; the same call goes on with it."""


_told = 0  # the last notice's number
_interruptible = False
_NOTICES = [
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)
]  # Windows has one


@contextmanager
def heed(*, override: bool = False) -> Iterator[None]:
    """Answer SIGTERM and SIGUSR2 until the end of the block: `told()` becomes true, and work that looks at it stops.

    Only in the main thread; a signal that the caller answers or ignores already is left alone, unless `override`, which
    also hears one that was kept waiting (blocked).
    """
    global _told
    before = {}
    if threading.current_thread() is threading.main_thread():
        answers = {number: signal.getsignal(number) for number in _NOTICES}
        before = {
            number: answer
            for number, answer in answers.items()
            if answer == signal.SIG_DFL or (override and answer not in (_hear, None))
        }
        for number in before:
            signal.signal(number, _hear)
        if override and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTICES)  # one may have been waiting
    try:
        yield
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)
        if before:
            _told = 0


def told() -> int:
    """The signal that told this process to stop, in a `heed` block; 0 for none."""
    return _told


@contextmanager
def interruptible() -> Iterator[None]:
    """Work that may be cut off anywhere, since it is done again whole: a notice raises Stopped at once."""
    global _interruptible
    before, _interruptible = _interruptible, True
    try:
        if _told:
            raise Stopped("told to stop: run the same command to go on")
        yield
    finally:
        _interruptible = before


def _hear(number: int, frame: object) -> None:
    global _told
    _told = number
    if _interruptible:
        name = signal.Signals(number).name
        raise Stopped(f"told to stop by {name}: run the same command to go on")
