"""What `imsvd doctor` and every dry run see, and what they advise."""

import os
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from imsvd_core.cli import main
from imsvd_core.system import looks

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """A machine of our own, without Slurm's variables and programs."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))


def program(folder: Path, name: str, says: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{says}\nEND\n")
    (folder / name).chmod(0o755)


def test_shared_memory_of_docker_s_default_size_is_a_fault(monkeypatch):
    for total, fault in ((64 << 20, True), (8 << 30, False)):
        usage = Usage(total, 0, total)
        monkeypatch.setattr(looks.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert ("--shm-size" in looks.shared_memory_look().remedy) is fault


def test_a_folder_that_cannot_be_written_is_a_fault_and_looking_leaves_nothing(
    tmp_path, monkeypatch
):
    assert not looks.folder_look(tmp_path / "new" / "run").remedy
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert "Not a directory" in str(looks.folder_look(tmp_path / "file" / "run"))

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert looks.folder_look(tmp_path).remedy == "give another (--run-dir, --out)"


def test_a_disk_with_less_than_a_run_needs_is_a_fault(tmp_path):
    assert not looks.disk_look(tmp_path / "run").remedy
    assert "make room" in looks.disk_look(tmp_path / "run", 1e9).remedy


def test_a_data_root_that_is_missing_is_a_fault_and_one_that_is_read_only_is_named(
    tmp_path, monkeypatch
):
    assert "IMSVD_DATA" in looks.root_look(tmp_path / "none").remedy
    assert str(looks.root_look(tmp_path)) == f"data root: {tmp_path}"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "read-only" in looks.root_look(tmp_path).seen
    assert not looks.root_look(tmp_path).remedy


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SLURM_STEP_NUM_TASKS", "2", "a run here waits for 2 ranks: unset WORLD_SIZE and"),
        ("WORLD_SIZE", "8", "waits for 8 ranks"),
        ("SBATCH_PARTITION", "debug", "unset SBATCH_PARTITION, if"),
        ("SLURM_CONF", "/etc/slurm.conf", ""),
    ],
)
def test_inherited_variables_that_change_a_run_or_a_job_are_named(monkeypatch, name, value, words):
    assert str(looks.inherited_look()) == "inherited: nothing of Slurm"
    monkeypatch.setenv(name, value)
    assert words in looks.inherited_look().remedy
    assert bool(words) is bool(looks.inherited_look().remedy)


def test_a_limit_of_submissions_that_is_too_low_for_what_is_to_be_sent_is_a_fault(tmp_path):
    assert "no sbatch here" in looks.submission_look().seen
    for name, says in (("sbatch", ""), ("id", "ann"), ("sacctmgr", "4|\n|10"), ("squeue", "7\n8")):
        program(tmp_path, name, says)
    assert looks.submission_look(2).seen == "2 jobs are queued, of at most 4; 2 to be sent"
    assert not looks.submission_look(2).remedy
    assert "--wait" in looks.submission_look(3).remedy
    program(tmp_path, "sacctmgr", "|")
    assert looks.submission_look(9).seen == "2 jobs are queued, no limit is known"


def test_gpus_that_torch_cannot_use_and_interfaces_that_are_not_here_are_faults(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here" in looks.cuda_look().seen
    monkeypatch.setattr(looks.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    assert "fits the driver" in looks.cuda_look().remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides all" in looks.cuda_look().seen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert str(looks.nccl_look()) == "NCCL: 2.28.9"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0,ib7")
    assert "ib7" in looks.nccl_look().seen


def test_doctor_is_a_line_each_and_exits_with_1_if_anything_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path))
    main(["doctor", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "/dev/shm",
        "run folder",
        "disk",
        "data root",
        "inherited",
        "submission",
        "CUDA",
        "NCCL",
    ]
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(tmp_path)])
    assert stop.value.code == 1
    assert "→ set IMSVD_DATA" in capsys.readouterr().out
