"""`imsvd pretrain` under torchrun and submitit: one run of two processes, exact after any kill."""

import json
import os
import signal
import subprocess
import sys

import pytest
import submitit
import torch

from imsvd_core.cli import main
from imsvd_core.data import memory as datasets

OPTIONS = [
    "pretrain",
    "cifar10",
    "--scale",
    "smoke",
    "--data",
    "attributes",
    "--samples",
    "80",
    "--loop.batch-size",
    "16",
    "--loop.accumulate",
    "2",
    "--loop.save-every",
    "2",
    "--no-progress",
    "--knn.neighbors",
    "20",
    "--knn.gallery",
    "40",
    "--knn.queries",
    "20",
    "--watch.gallery",
    "40",
    "--watch.queries",
    "20",
]
DRIVER = """
import os, signal, sys
from imsvd_core.data import memory as datasets
from imsvd_core.cli import main
from imsvd_core.engine.trainer import Trainer

datasets.ATTRIBUTES_SIZES = {"train": 600, "test": 200}
last, train_one = int(sys.argv.pop(1)), Trainer.take_step

def train_until_killed(self, batches):
    if self.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    if self.step == 3 and self.rank == 1 and "RANK_1_FAILS" in os.environ:
        raise ValueError("rank 1 alone failed")
    if self.step == 3 and self.rank == 0 and "LAUNCHER_DIES" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
    return train_one(self, batches)

Trainer.take_step = train_until_killed
main()
"""


@pytest.fixture
def driver(tmp_path):
    (tmp_path / "imsvd").write_text(DRIVER)
    return str(tmp_path / "imsvd")


def torchrun(driver, run_dir, kill_at=-1, **environment):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            driver,
            str(kill_at),
            *OPTIONS,
            "--run-dir",
            str(run_dir),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def submit(driver, run_dir):
    executor = submitit.LocalExecutor(run_dir.with_suffix(".log"))
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    command = [
        "env",
        "OMP_NUM_THREADS=1",
        sys.executable,
        driver,
        "-1",
        *OPTIONS,
        "--run-dir",
        str(run_dir),
    ]
    return executor.submit(submitit.helpers.CommandFunction(command)).results()


@pytest.mark.slow  # three times two processes
def test_a_run_of_two_ranks_killed_and_resumed_under_torchrun_is_the_one_that_submitit_left_alone(
    driver, tmp_path
):
    told, silent = submit(driver, tmp_path / "whole")
    assert "written to" in told
    assert "written to" not in silent
    assert torchrun(driver, tmp_path / "killed", kill_at=7).returncode != 0
    assert (tmp_path / "killed" / "checkpoints" / "step-000000006.pt").exists()
    resumed = torchrun(driver, tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    for line in ("resumed", "each rank's batch-norm sees its own"):
        assert resumed.stderr.count(line) == 1
    assert resumed.stdout.count("written to") == 1

    ends = [
        torch.load(tmp_path / name / "checkpoints" / "step-000000010.pt", weights_only=True)[
            "state"
        ]
        for name in ("whole", "killed")
    ]
    for name, value in ends[0]["method"].items():
        assert torch.equal(value, ends[1]["method"][name]), name
    assert "network.backbone.conv1.weight" in ends[0]["method"]
    records = [
        [
            {key: value for key, value in json.loads(line).items() if key != "samples_per_second"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    ]
    assert records[0] == records[1]
    assert [line["step"] for line in records[0]] == [
        0,
        1,
        2,
        3,
        4,
        5,
        5,
        6,
        7,
        8,
        9,
        10,
        10,
    ]
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")
    ]
    assert [result["provenance"]["world_size"] for result in results] == [2, 2]
    assert results[0]["figures"]["knn_20"] == results[1]["figures"]["knn_20"]


@pytest.mark.slow  # two processes
def test_another_number_of_ranks_is_refused_in_one_line(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    main([*OPTIONS, "--run-dir", str(tmp_path / "alone")])
    refused = torchrun(driver, tmp_path / "alone")
    assert refused.stderr.count("imsvd pretrain: ") == 1
    assert "world_size: 1 before, 2 now" in refused.stderr
    assert "exitcode  : 2" in refused.stderr
    assert 'Traceback (most recent call last):\n  File "' + driver not in refused.stderr


@pytest.mark.slow  # twice two processes
def test_ranks_whose_launcher_is_gone_save_and_stop_together(driver, tmp_path):
    orphans = torchrun(
        driver, tmp_path / "run", LAUNCHER_DIES="yes"
    )  # returns when they have closed its pipes
    assert orphans.returncode == -signal.SIGKILL
    assert orphans.stderr.count(" of 10: run the same command to go on") == 1
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) < 10
    assert not (tmp_path / "run" / "result.json").exists()
    assert torchrun(driver, tmp_path / "run").returncode == 0
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == [
        0,
        1,
        2,
        3,
        4,
        5,
        5,
        6,
        7,
        8,
        9,
        10,
        10,
    ]


@pytest.mark.slow  # two processes
def test_an_error_of_one_rank_is_told_and_ends_both(driver, tmp_path):
    failed = torchrun(driver, tmp_path / "run", RANK_1_FAILS="yes")
    assert failed.returncode != 0
    assert failed.stderr.count("imsvd pretrain: rank 1 alone failed") == 1
