"""Ranks that do not meet say for whom they wait, and give up."""

import os
from datetime import timedelta

import pytest

from imsvd_core.system import ranks
from imsvd_core.system.faults import Fault


@pytest.fixture
def alone(monkeypatch, free_port):
    """This process as the only one of two ranks that Slurm's shell could have started."""
    shell = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(free_port()),
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # so that what is exported here is taken back
        monkeypatch.delenv(name)
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))


def test_a_rank_that_nobody_joins_says_for_whom_it_waits_and_gives_up(alone, caplog):
    words = r"waits for rank 1, after 1 s: start all ranks .*NUM_TASKS=1"
    with pytest.raises(Fault, match=words), ranks.process_group("cpu"):
        pass
    assert "rank 0 of 2, at localhost:" in caplog.text


def test_the_remedy_for_one_process_alone_works(alone, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with ranks.process_group("cpu"):
        assert "WORLD_SIZE" not in os.environ


def test_a_world_size_that_nobody_placed_is_refused(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "WORLD_SIZE=2 is set, and RANK, MASTER_ADDR not: unset it"
    with pytest.raises(ValueError, match=words), ranks.process_group("cpu"):
        pass
