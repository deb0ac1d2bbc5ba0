"""A process that hangs ends with a trace; see also tests/engine/test_trainer.py."""

import sys
import time

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from imsvd_core.system import watchdog
from imsvd_core.system.watchdog import watched


def hang(rank, size):
    watchdog.LINGER = 2
    with watched(0.3 / 60, "patience"):
        if rank:
            time.sleep(60)
        dist.barrier()


def test_every_rank_leaves_its_trace_when_one_of_them_hangs(ranks, capfd):
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        ranks(hang, 2)
    told = capfd.readouterr().err
    for rank in (0, 1):
        assert f"rank {rank} of 2 has made no progress for 0.00" in told
    assert "in barrier" in told


@pytest.mark.parametrize(("minutes", "by_hand"), [(0, False), (0.1 / 60, True)])
def test_nobody_is_watched_who_works_by_hand_or_does_not_want_it(monkeypatch, minutes, by_hand):
    ends = []
    monkeypatch.setattr(watchdog, "LINGER", 0)
    monkeypatch.setattr(watchdog.os, "_exit", ends.append)
    if by_hand:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with watched(minutes, "patience"):
        time.sleep(0.3)
    assert not ends
