"""The notice to stop: heard where it is heeded, answered at once only where nothing can be lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from imsvd_core.system import signals

NAMES = ["SIGTERM", "SIGUSR2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notice_is_noted_and_what_answered_before_answers_again(name):
    number = getattr(signal, name)
    with signals.handle_stop_signals():
        assert not signals.stop_requested()
        os.kill(os.getpid(), number)
        assert signals.stop_requested() == number
        with signals.handle_stop_signals():  # pretraining, inside a command
            assert signals.stop_requested()
        assert signals.stop_requested()
    assert not signals.stop_requested()
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("before", [signal.SIG_IGN, lambda *_: None])
def test_what_the_caller_answers_is_left_alone_unless_overridden(before):
    old = signal.signal(signal.SIGTERM, before)
    try:
        for override in (False, True):
            with signals.handle_stop_signals(override=override):
                os.kill(os.getpid(), signal.SIGTERM)
                assert bool(signals.stop_requested()) is override
            assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, old)


def test_interruptible_work_is_cut_off_at_once_also_by_a_notice_that_came_before():
    with signals.handle_stop_signals():
        message = "told to stop by SIGTERM: run the same command"
        with pytest.raises(signals.Stopped, match=message), signals.interruptible():
            _work_through_a_signal()
        with pytest.raises(signals.Stopped), signals.interruptible():
            raise AssertionError("not reached")
        os.kill(os.getpid(), signal.SIGTERM)  # no longer raises


def _work_through_a_signal():
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("not reached")


def test_a_process_ends_with_its_parent_however_that_dies():
    child = "import os, time; from imsvd_core.system import signals\n"
    child += "signals.end_with(os.getppid()); print('ready', flush=True); time.sleep(120)"
    parent = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
        "child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        start = time.monotonic()
        # the pipe closes when the child, too, has ended
        assert process.stdout.read() == ""
        assert time.monotonic() - start < 60
