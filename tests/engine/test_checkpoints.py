"""Checkpoints: whole or absent, safe to read, never the only copy."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

from imsvd_core.engine import checkpoints
from imsvd_core.engine.metrics import Metrics
from imsvd_core.system.faults import DiskFull
from imsvd_core.system.files import atomic_write
from imsvd_core.system.run_folder import RunFolder

STATE = {"weights": torch.arange(3.0), "step": 7, "nested": {"list": [1, "two"]}}


def test_state_comes_back_and_old_files_go(tmp_path):
    for step in (1, 2, 10):
        checkpoints.save(RunFolder(tmp_path), step, STATE, keep=2)
    assert [path.name for path in checkpoints.paths(tmp_path / "checkpoints")] == [
        "step-000000010.pt",
        "step-000000002.pt",
    ]
    path = checkpoints.newest(tmp_path / "checkpoints")
    state = checkpoints.load(path)
    assert path.name == "step-000000010.pt"
    assert torch.equal(state["weights"], STATE["weights"])
    assert state["nested"] == STATE["nested"]


@pytest.mark.parametrize("damage", ["truncate", "empty", "foreign", "text"])
def test_a_bad_file_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage):
    checkpoints.save(RunFolder(tmp_path), 1, {"step": 1})
    newest = checkpoints.save(RunFolder(tmp_path), 2, {"step": 2})
    content = newest.read_bytes()
    if damage == "foreign":
        torch.save({"model": torch.zeros(2)}, newest)
    else:
        newest.write_bytes(
            {"truncate": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage]
        )
    with pytest.raises(checkpoints.CheckpointError, match=r"step-000000002.pt"):
        checkpoints.load(newest)
    path = checkpoints.newest(tmp_path / "checkpoints")
    state = checkpoints.load(path)
    assert state == {"step": 1}
    assert "step-000000002.pt" in caplog.text


def test_a_full_disk_is_told_with_what_is_needed_and_what_stands(tmp_path):
    run, weights = RunFolder(tmp_path), {"weights": torch.zeros(2, 10**5)}
    stands = checkpoints.save(run, 1, STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file of 0.1 MB is as if the disk were full: the system says so in a write
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        with pytest.raises(DiskFull) as full:
            checkpoints.save(run, 2, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = str(full.value)
    assert f"{tmp_path}/checkpoints/step-000000002.pt does not fit" in told
    assert re.search(r"[\d,.]+ MB are free there: make room, for 0.8 MB are needed", told)
    assert told.endswith(f"loop.keep=2; the same command goes on from {stands}")
    assert "\n" not in told
    assert list(stands.parent.iterdir()) == [stands]


def test_a_full_disk_is_told_of_the_record_too(tmp_path):
    metrics = Metrics(RunFolder(tmp_path))
    metrics.path = "/dev/full"
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        metrics.append(1, 0.1, {"loss": 1.0})


def test_no_file_means_a_fresh_start_but_only_bad_files_do_not(tmp_path):
    assert checkpoints.newest(tmp_path / "checkpoints") is None
    checkpoints.save(RunFolder(tmp_path), 1, STATE).write_bytes(b"torn")
    with pytest.raises(checkpoints.CheckpointError, match="none of the 1 checkpoints"):
        checkpoints.newest(tmp_path / "checkpoints")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "step-000000001.pt"
    torch.save({"format": checkpoints.FORMAT, "state": Evil()}, path, pickle_module=pickle)
    with pytest.raises(checkpoints.CheckpointError):
        checkpoints.load(path)
    assert not (tmp_path / "ran").exists()


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write_half():
        with atomic_write(target) as file:
            file.write(b"half of the new")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys\nfrom imsvd_core.system.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        " file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_what_a_killed_save_left_and_what_a_resumption_undid_goes_with_the_next_save(tmp_path):
    for step in (10, 15):
        checkpoints.save(RunFolder(tmp_path), step, STATE)
    checkpoints.paths(tmp_path / "checkpoints")[0].write_bytes(b"torn")
    (tmp_path / "checkpoints" / ".step-000000012.pt.abc.part").write_bytes(b"half")
    for step in (12, 14):
        checkpoints.save(RunFolder(tmp_path), step, STATE, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000012.pt",
        "step-000000014.pt",
    ]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    checkpoints.save(RunFolder(tmp_path), 1, STATE)
    assert calls == ["fsync", "replace", "fsync"]
