"""The request to stop that shells and clusters send as a signal: heard at any time, answered where
nothing is lost. And processes that end with their parent."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

#: Exit status of a command that was stopped by a signal: 128 + SIGTERM, as shells have it.
STOPPED = 143


class Stopped(RuntimeError):
    """A signal stopped the work; what was done is saved, and the same call continues it."""


_signal = 0  # the last one that asked to stop
_interruptible = False
_SIGNALS = signal.SIGTERM, signal.SIGUSR2


@contextmanager
def handle_stop_signals(*, override: bool = False) -> Iterator[None]:
    """Until the end of the block SIGTERM and SIGUSR2 make `stop_requested()` true; work that looks
    at it saves and stops.

    Only in the main thread. A signal that the caller handles or ignores already is left alone,
    unless `override`, which also hears a signal that was blocked until now.
    """
    global _signal
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler == signal.SIG_DFL or (override and handler not in (_hear, None)):
                replaced[number] = signal.signal(number, _hear)
        if override:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if replaced:
            _signal = 0


def stop_requested() -> int:
    """The signal that asked this process to stop, in a `handle_stop_signals` block; 0 for none."""
    return _signal


@contextmanager
def interruptible() -> Iterator[None]:
    """Work that may be cut off anywhere, since it is repeated whole: a signal raises Stopped."""
    global _interruptible
    outer, _interruptible = _interruptible, True
    try:
        if _signal:
            raise Stopped("told to stop: run the same command to go on")
        yield
    finally:
        _interruptible = outer


def _hear(number: int, frame: object) -> None:
    global _signal
    _signal = number
    if _interruptible:
        name = signal.Signals(number).name
        raise Stopped(f"told to stop by {name}: run the same command to go on")


def orphaned(parent: int) -> bool:
    """Whether `parent`, which started this process, has ended."""
    return os.getppid() != parent


@cache  # once a process
def end_with(parent: int) -> None:
    """Let this process end within seconds after its parent, however that dies."""

    def watch() -> None:
        while not orphaned(parent):
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
