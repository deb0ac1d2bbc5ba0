"""The notice to stop: heard where it is heeded, answered at once only where nothing can be lost."""

import os
import signal

import pytest

from imsvd_core.system import signals

NAMES = [name for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_notice_is_noted_and_what_answered_before_answers_again(name):
    number = getattr(signal, name)
    with signals.heed():
        assert not signals.told()
        os.kill(os.getpid(), number)
        assert signals.told() == number
        with signals.heed():  # pretraining, inside a command
            assert signals.told()
        assert signals.told()
    assert not signals.told() and signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("before", [signal.SIG_IGN, lambda *_: None])
def test_what_the_caller_answers_is_left_alone_unless_overridden(before):
    old = signal.signal(signal.SIGTERM, before)
    try:
        for override in (False, True):
            with signals.heed(override=override):
                os.kill(os.getpid(), signal.SIGTERM)
                assert bool(signals.told()) is override
            assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, old)


def test_interruptible_work_is_cut_off_at_once_also_by_a_notice_that_came_before():
    with signals.heed():
        with (
            pytest.raises(signals.Stopped, match="told to stop by SIGTERM: run the same command"),
            signals.interruptible(),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")
        with pytest.raises(signals.Stopped), signals.interruptible():
            raise AssertionError("not reached")
        os.kill(os.getpid(), signal.SIGTERM)  # no longer raises
