"""What is sent, and what a job does when it is told to stop: on this machine, through submitit's
local executor."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import imsvd_core
from imsvd_core.cli import main
from imsvd_core.data import memory as datasets
from imsvd_core.launch import LaunchConfig, Submission, batch_script, job, queue, snapshot, submit
from imsvd_core.launch.submit import NoRoom, _environment
from imsvd_core.networks import NetworkConfig
from imsvd_core.results import read_result
from imsvd_core.runs.backbones import save_backbone
from imsvd_core.runs.pretrain import build_network

OPTIONS = [
    "cifar10",
    "--scale",
    "smoke",
    "--data",
    "attributes",
    "--samples",
    "80",
    "--loop.batch-size",
    "16",
    "--loop.epochs",
    "4",
    "--look",
    "16",
    "--loop.log-every",
    "1",
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


def test_the_batch_script_asks_for_what_was_configured(tmp_path, monkeypatch):
    monkeypatch.setenv("IMSVD_DATA", "/data of ours")
    config = LaunchConfig(
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=10,
        mem_gb=200,
        partition="gpu",
        account="vision",
        qos="long",
        constraint="v100",
        exclude="n7",
        options={"reservation": "night"},
        time="1-00:00:00",
        grace_seconds=300,
        setup=("module load cuda",),
    )
    lines = batch_script("run", tmp_path, config, tmp_path / "code", after=("7", "8")).splitlines()
    for option in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=10",
        "mem=204800MB",
        "partition=gpu",
        "account=vision",
        "qos=long",
        "constraint=v100",
        "exclude=n7",
        "reservation=night",
        "time=1440",
        "signal=USR2@300",
        "requeue",
        "dependency=afterok:7:8",
        "kill-on-invalid-dep=yes",
        "job-name=run",
        "open-mode=append",
    ):
        assert f"#SBATCH --{option}" in lines, option
    assert lines.index("module load cuda") < next(
        number for number, line in enumerate(lines) if "export SRUN_CPUS_PER_TASK=" in line
    )
    assert "export IMSVD_DATA='/data of ours'" in lines
    assert any(line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines)


def test_a_script_exports_to_its_ranks_whatever_was_exported_to_it_and_nothing_of_the_builder_s(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    config = LaunchConfig(options={"export": "NONE"})
    script = batch_script("run", tmp_path, config, tmp_path / "code")
    assert script.index("export SLURM_EXPORT_ENV=ALL") < script.index("\nsrun ")
    assert "IMSVD_DATASET" not in script
    assert "IMSVD_SCALE" not in script


@pytest.mark.parametrize("name", ["of-%j", "100%", "back\\slash", "at:noon", "two\nlines"])
def test_a_folder_whose_name_slurm_would_not_take_literally_is_refused(tmp_path, name):
    folder, config = tmp_path / name / "jobs", LaunchConfig(executor="local")
    with pytest.raises(ValueError, match="would not take literally: give another folder"):
        submit(["pretrain"], name="run", folder=folder, config=config, code=tmp_path)
    with pytest.raises(ValueError, match="would not take literally"):
        batch_script("run", folder, config, tmp_path)
    assert not folder.exists()


def fake_sbatch(folder, monkeypatch, *lines):
    """An sbatch in PATH that does what the lines of shell say."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text("\n".join(("#!/bin/sh", *lines)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("sbatch: error: AssocMaxSubmitJobLimit", NoRoom),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", NoRoom),
        ("sbatch: error: QOSGrpSubmitJobsLimit", NoRoom),
        ("Batch job submission failed: Resource temporarily unavailable", NoRoom),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit", ValueError),
        ("sbatch: error: invalid partition specified: gpu", ValueError),
    ],
)
def test_a_full_queue_is_told_from_what_will_never_be_sent(tmp_path, monkeypatch, words, kind):
    policy = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    fake_sbatch(tmp_path, monkeypatch, f'echo "{words}\n{policy}" >&2; exit 1')
    with pytest.raises(ValueError, match="has no room" if kind is NoRoom else "refused") as refusal:
        submit(["x"], name="run", folder=tmp_path / "run", config=LaunchConfig(), code=tmp_path)
    assert type(refusal.value) is kind


def test_what_is_inherited_of_slurm_s_variables_overrules_nothing_that_the_script_says(
    tmp_path, monkeypatch
):
    fake_sbatch(tmp_path, monkeypatch, f"env > {tmp_path}/seen; echo Submitted batch job 7")
    inherited = {
        "SBATCH_PARTITION": "debug",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_ACCOUNT": "theirs",
        "SBATCH_RESERVATION": "day",
        "SLURM_NTASKS": "1",
        "SLURM_CONF": "/etc/ours",
    }
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    config = LaunchConfig(partition="gpu", options={"reservation": "night"})
    submit(["x"], name="run", folder=tmp_path / "run", config=config, code=tmp_path)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert {name for name in inherited if name in seen} == {"SBATCH_ACCOUNT", "SLURM_CONF"}


@pytest.mark.slow  # a process that imports torch
def test_a_snapshot_is_what_runs_whatever_happens_to_the_code_after_it(tmp_path):
    code = snapshot(tmp_path)
    assert snapshot(tmp_path) == code  # once
    assert [path.name for path in tmp_path.iterdir()] == [code.name]
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import imsvd_core.results as r; print(r.__file__); print(r.code_version())",
        ],
        capture_output=True,
        text=True,
        cwd=Path(imsvd_core.__file__).parents[1],  # whose code must not be taken
        env={**os.environ, **_environment(LaunchConfig(executor="local"), code)},
    ).stdout.split()
    assert Path(told[0]).is_relative_to(code)
    assert told[1] == imsvd_core.results.code_version()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_notice_that_comes_while_python_still_imports_waits_until_it_is_heeded(number):
    shield = Path(job.__file__).with_name("shield.py")
    listens = (
        "import os, signal, time; print('here', flush=True); input()\n"
        "from imsvd_core.system import signals\n"
        "with signals.handle_stop_signals(override=True): print(signals.stop_requested() == "
        + f"{int(number)})"
    )
    with subprocess.Popen(
        [sys.executable, "-IS", shield, sys.executable, "-c", listens],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.communicate("\n")[0] == "True\n"
        assert process.returncode == 0


def test_without_slurm_a_launch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="executor='slurm' needs sbatch, which is not here"):
        submit(["pretrain"], name="run", folder=tmp_path, config=LaunchConfig(), code=tmp_path)


def test_a_dry_run_prints_script_and_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["launch", *OPTIONS, "--dry-run", "--nodes", "2", "--partition", "main"])
    told = capsys.readouterr().out
    assert "#SBATCH --partition=main" in told
    assert "cifar10: 2 processes without GPU (2 × 1), 8 images on each" in told
    for look in ("/dev/shm", "run folder", "disk", "data root", "inherited", "submission", "NCCL"):
        assert f"\n{look}: " in told
    assert not list(tmp_path.iterdir())


def test_what_the_plan_refuses_is_not_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["launch", *OPTIONS, "--executor", "local", "--tasks-per-node", "3"])
    assert stop.value.code == 2
    assert "not sent:\n  batch_size=16 cannot be cut" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # several times two processes
def test_a_job_told_by_usr2_saves_starts_again_and_ends_as_if_nothing_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("told", "whole"):
        main(
            ["launch", *OPTIONS, "--executor", "local", "--tasks-per-node", "2", "--run-dir", name]
        )
    sent = {name: Submission.read(tmp_path / name / "jobs") for name in ("whole", "told")}
    records = tmp_path / "told" / "metrics.jsonl"
    wait_for(lambda: records.exists() and records.read_text().count("loss") > 3)
    for rank in ranks_of(sent["told"].job_id):
        os.kill(rank, signal.SIGUSR2)
    for name in sent:
        wait_for((tmp_path / name / "result.json").exists)
    log = (tmp_path / "told" / "jobs" / f"{sent['told'].job_id}_0_log.err").read_text()
    assert log.count("run the same command to go on") == 1
    assert log.count("resumed ") == 1
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "step-000000020.pt", weights_only=True)[
            "state"
        ]["method"]
        for name in sent
    ]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    origins = [
        json.loads((tmp_path / name / "result.json").read_text())["provenance"] for name in sent
    ]
    assert [origin["commit"] for origin in origins] == [imsvd_core.results.code_version()] * 2
    assert all(origin["command"].startswith("imsvd pretrain cifar10 ") for origin in origins)


@pytest.mark.slow  # a whole training
def test_debug_trains_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    before = dict(os.environ)
    main(
        [
            "launch",
            *OPTIONS,
            "--executor",
            "debug",
            "--loop.epochs",
            "1",
            "--run-dir",
            str(tmp_path / "run"),
        ]
    )
    assert (tmp_path / "run" / "result.json").exists()
    assert dict(os.environ) == before


@pytest.mark.slow  # a process that imports torch
def test_an_evaluation_is_launched_like_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    monkeypatch.chdir(tmp_path)
    network = NetworkConfig("narrow", cifar_stem=True)
    save_backbone("theirs.safetensors", build_network(network, 0).backbone, network)
    main(
        [
            "launch",
            "evaluate",
            "knn",
            "theirs.safetensors",
            "--executor",
            "debug",
            "--scale",
            "smoke",
            "--data",
            "attributes",
            "--out",
            "here",
        ]
    )
    assert read_result("here/knn-attributes.json")["figures"]["gallery"] == 400
    capsys.readouterr()
    main(["status", "here"])
    assert "here/knn-attributes" in (said := capsys.readouterr().out)
    assert "1 done" in said
    with pytest.raises(SystemExit):
        main(["launch", "evaluate", "kNN", "theirs.safetensors", "--executor", "debug"])
    assert "evaluation='kNN' is unknown: did you mean knn" in capsys.readouterr().err


@pytest.mark.slow  # two Pythons, one after the other
def test_a_local_job_outlives_our_pipes_and_ends_when_it_is_told(tmp_path):
    words = [
        "launch",
        *OPTIONS,
        "--loop.epochs",
        "10000",
        "--executor",
        "local",
        "--run-dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "imsvd_core.cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )  # reads to the end
    assert done.returncode == 0, done.stderr
    assert "sent; its logs are in" in done.stdout, done.stderr
    sent = Submission.read(tmp_path / "jobs")
    assert queue.alive(sent)
    os.kill(int(sent.job_id), signal.SIGTERM)
    wait_for(lambda: not queue.alive(sent))
    assert (
        "told to stop" in (log := (tmp_path / "jobs" / f"{sent.job_id}_0_log.err").read_text())
        or "stopped at step" in log
    )


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def ranks_of(controller):
    return [
        int(pid)
        for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    ]


@pytest.mark.parametrize(
    ("state", "restarts", "expected"),
    [
        ("RUNNING", 2, True),
        ("RUNNING", 3, False),
        ("COMPLETING", 2, False),
        ("CANCELLED", 2, False),
        ("PENDING", 3, False),
    ],
)
def test_only_the_attempt_that_slurm_counts_as_running_asks_to_be_queued_again(
    monkeypatch, tmp_path, state, restarts, expected
):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\necho 'JobId=5 JobName=run\n   JobState={state} Reason=None\n"
        f"   Requeue=1 Restarts={restarts} BatchFlag=1'\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert job._is_running("5", 2) is expected


def test_a_run_whose_job_is_on_its_way_is_not_launched_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", "input()", str(tmp_path / "jobs")], stdin=subprocess.PIPE
    ) as alive:
        told = {
            "name": tmp_path.name,
            "argv": ["pretrain"],
            "job_id": str(alive.pid),
            "executor": "local",
            "tasks": 1,
            "folder": str(tmp_path / "jobs"),
            "submitted": "",
        }
        (tmp_path / "jobs").mkdir()
        (tmp_path / "jobs" / "submission.json").write_text(json.dumps(told))
        with pytest.raises(SystemExit):
            main(["launch", *OPTIONS, "--executor", "local", "--run-dir", str(tmp_path)])
        alive.communicate(b"\n")
    assert (
        f"has a job on its way, {alive.pid} (starting): wait for its end" in capsys.readouterr().err
    )


def test_a_job_s_name_is_one_name_to_squeue(tmp_path):
    sent = submit(
        ["status", "--help"],
        name="k,1 of mine",
        folder=tmp_path / "k,1",
        config=LaunchConfig(executor="local"),
        code=tmp_path,
    )
    assert sent.name == "k_1_of_mine"
    assert Submission.read(tmp_path / "k,1").name == sent.name
