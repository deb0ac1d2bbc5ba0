"""Workers: what they hand over must fit, and one that dies ends the run with a reason."""

import os
import signal
from collections import namedtuple

import pytest
import torch

from imsvd_core.data.workers import stream
from imsvd_core.system import looks
from imsvd_core.system.faults import Fault

Usage = namedtuple("Usage", "total used free")


def unpicklable(part):
    return torch.zeros(3), lambda: part


def killed(part):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("read", [unpicklable, killed])
def test_a_worker_that_cannot_hand_over_or_is_killed_ends_the_run_with_a_reason(read, capfd):
    with pytest.raises(
        Fault, match=r"that reads images has died .*: it may lack memory \(/dev/shm"
    ):
        list(stream(read, range(3), workers=1))
    assert ("cannot hand over" in capfd.readouterr().err) is (read is unpicklable)


def test_too_little_shared_memory_for_what_waits_is_refused_before_the_start(monkeypatch):
    monkeypatch.setattr(looks.shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    with pytest.raises(
        ValueError, match=r"67 MB free of 67 MB, and 120 MB are needed → .*shm-size"
    ):
        list(stream(unpicklable, range(3), workers=2, part_bytes=20 * 10**6))
    whole = list(stream(lambda part: (torch.tensor(part),), range(3), workers=0, part_bytes=10**12))
    assert [item.item() for (item,) in whole] == [0, 1, 2]
