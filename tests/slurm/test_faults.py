"""What a cluster does to a training: real jobs, two ranks, on a real Slurm."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from cluster import NODES, Cluster
from runs import Run, few_pictures

from imsvd_core.launch import LaunchConfig, snapshot, submit

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
]  # each trains a run to its end, most of them in two attempts

EPOCHS, BATCH, SAMPLES = 4, 64, 960
EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * EPOCH
SAVE_SECONDS = 3.0
MIDDLE = 20  #: a step in the middle of an epoch
TRAINING = [
    "pretrain",
    "cifar10",
    "--scale",
    "smoke",
    "--samples",
    str(SAMPLES),
    "--loop.epochs",
    str(EPOCHS),
    "--loop.save-minutes",
    str(SAVE_SECONDS / 60),
    "--loop.log-every",
    "1",
    "--no-progress",
]
TWO_NODES = LaunchConfig(nodes=2, tasks_per_node=1, time="30")

SLOWLY = """
import os as _os
_train_one = Trainer.take_step
def _slowly(self, batches):
    if _os.environ.get("SLURM_RESTART_COUNT", "0") in {attempts}:
        time.sleep({seconds})
    return _train_one(self, batches)
Trainer.take_step = _slowly
"""
FAILING = """
_train_one = Trainer.take_step
def _failing(self, batches):
    if self.rank == 1 and self.step == 5:
        raise RuntimeError("rank 1 alone failed")
    return _train_one(self, batches)
Trainer.take_step = _failing
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return few_pictures(tmp_path_factory.mktemp("data") / "cifar10", 100, 40)


@pytest.fixture(scope="module")
def speaking_to(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, to which this process's own submissions go while the module's tests last."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (cluster.env | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        yield cluster


Launch = Callable[..., Run]


@pytest.fixture(scope="module")
def launch(speaking_to: Cluster, data: str, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Send a training, with `added` at the end of its loop's source if given; other words are
    further arguments of `submit`."""

    def send(
        config: LaunchConfig = TWO_NODES, added: str = "", argv: tuple[str, ...] = (), **more: Any
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        code = snapshot(folder / "code")
        with open(code / "imsvd_core" / "engine" / "trainer.py", "a") as loop:
            loop.write(added)
        sent = time.time()
        told = submit(
            [*TRAINING, "--data", data, "--run-dir", str(folder / "run"), *argv],
            name=folder.name,
            folder=folder / "logs",
            config=config,
            code=code,
            **more,
        )
        return Run(speaking_to, told.job_id, folder / "run", folder / "logs", sent)

    return send


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test finds what another has left in the queue."""
    yield
    request.getfixturevalue("cluster").empty()


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, data: str, figures: dict[str, Any]) -> Run:
    run = launch()
    running = run.until_state("RUNNING")
    first = run.until_step(1)
    assert finish(run) == "COMPLETED", run.about()
    assert run.attempts == 1
    assert max(run.checkpoints) == STEPS == run.step
    assert [line["step"] for line in run.records if "loss" in line] == list(range(1, STEPS + 1))
    slurm = {
        "version": run.cluster.run("sinfo", "-V").strip(),
        "nodes": len(NODES),
        **run.cluster.settings("SlurmdTimeout", "KillWait"),
    }
    figures["setting"] |= {
        "recipe": "cifar10 at scale smoke",
        "dataset": "attributes (drawn)" if data == "attributes" else "CIFAR-10 (JPEG)",
        "samples": SAMPLES,
        "steps": STEPS,
        "ranks": 2,
        "save_interval_s": SAVE_SECONDS,
        "slurm": slurm,
    }
    figures["faults"].append(
        row(
            run, "none", sent_to_running_s=running - run.sent, sent_to_first_step_s=first - run.sent
        )
    )
    return run


def finish(run: Run) -> str:
    """Wait until the job has ended and nothing of it is left anywhere; its last state."""
    run.until_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    run.until_quiet()
    return run.cluster.state(run.job)


def row(run: Run, fault: str, lost: int = 0, **times: float) -> dict[str, Any]:
    """What the book's table says of a fault."""
    return {
        "fault": fault,
        "outcome": run.cluster.state(run.job),
        "attempts": run.attempts,
        "steps_lost": lost,
        "seconds_lost": round(lost * run.seconds_per_step, 2),
        "save_interval_s": SAVE_SECONDS,
        "seconds_per_step": round(run.seconds_per_step, 3),
    } | {name: round(value, 2) for name, value in times.items()}


def follow(run: Run, since: float) -> dict[str, float]:
    """Seconds from an event until the job is in the queue again, from there until it runs, from
    there to its first new step; and the steps that were lost, as `steps_lost`."""
    requeued = run.until("requeued", lambda: run.step and run.attempts > 1)
    saved = max(run.checkpoints.values())
    running = run.until_state("RUNNING")
    first = run.until("a new step", lambda: run.step and run.resumed and run.step > run.resumed[0])
    return {
        "lost": run.reached - run.resumed[0],
        "signal_to_saved_s": saved - since,
        "signal_to_requeued_s": requeued - since,
        "requeued_to_running_s": running - requeued,
        "running_to_step_s": first - running,
    }


def assert_unmarked(run: Run, undisturbed: Run, attempts: int | None = 2) -> None:
    """The run went to its end, in so many attempts, and nothing else shows it."""
    assert finish(run) == "COMPLETED", run.about()
    assert attempts in (None, run.attempts), run.about()
    run.assert_ended_like(undisturbed)
    assert (run.run_dir / "result.json").exists()


def test_two_nodes_undisturbed(undisturbed):
    assert (
        json.loads((undisturbed.run_dir / "result.json").read_text())["provenance"]["world_size"]
        == 2
    )


def test_usr2_in_the_middle_of_an_epoch(launch, undisturbed, figures):
    run = launch()
    run.until_step(MIDDLE)
    told = time.time()
    run.cluster.scancel("--signal=USR2", run.job)
    seen = follow(run, told)
    assert seen["lost"] == 0
    assert run.resumed[0] % EPOCH
    assert_unmarked(run, undisturbed)
    figures["faults"].append(row(run, "USR2 in mid-epoch", **seen))


def test_usr2_while_workers_decode(launch, data, figures):
    """It reaches the workers too, who go on until their trainer has no more use for them."""
    if data == "attributes":
        pytest.skip("workers stream images from a tree of files, and there is none of CIFAR-10")
    argv = ("--data", data.replace("folder:", "tree:"), "--loop.epochs", "2")
    whole, run = launch(argv=argv), launch(argv=argv)
    run.until_step(EPOCH // 2)
    pythons = [
        one
        for node in NODES
        for one in run.cluster.processes(node)
        if one.startswith(sys.executable)
    ]
    assert len(pythons) > 4, pythons  # more than the two runs' ranks: their workers, forked
    told = time.time()
    run.cluster.scancel("--signal=USR2", run.job)
    seen = follow(run, told)
    assert seen["lost"] == 0
    assert "DataLoader worker" not in run.log
    assert finish(whole) == "COMPLETED"
    assert_unmarked(run, whole)
    figures["faults"].append(row(run, "USR2 while workers decode", **seen))


def test_usr2_while_it_still_imports(launch, undisturbed, figures):
    """Nobody listens yet; it waits until somebody does."""
    run = launch()
    run.until_imports()
    told = time.time()
    run.cluster.scancel("--signal=USR2", run.job)
    requeued = run.until("requeued", lambda: run.attempts > 1)
    assert not run.checkpoints
    assert_unmarked(run, undisturbed)
    figures["faults"].append(row(run, "USR2 while it starts", signal_to_requeued_s=requeued - told))


def test_a_job_in_a_higher_partition(launch, undisturbed, figures):
    run = launch()
    run.until_step(MIDDLE)
    told = time.time()
    higher = run.cluster.sbatch("sleep 3", "--partition=high", "--nodes=2", "--exclusive")
    seen = follow(run, told)
    assert run.cluster.state(higher) == "COMPLETED"
    assert seen["lost"] == 0
    assert_unmarked(run, undisturbed)
    figures["faults"].append(row(run, "preempted", **seen))


def test_a_higher_partition_while_it_still_imports(launch, undisturbed, figures):
    run = launch()
    run.until_imports()
    told = time.time()
    run.cluster.sbatch("sleep 3", "--partition=high", "--nodes=2", "--exclusive")
    requeued = run.until("requeued", lambda: run.attempts > 1)
    assert_unmarked(run, undisturbed)
    figures["faults"].append(
        row(run, "preempted while it starts", signal_to_requeued_s=requeued - told)
    )


def test_a_time_limit(launch, undisturbed, figures):
    run = launch(
        replace(TWO_NODES, time="1", grace_seconds=5),
        added=SLOWLY.format(attempts=("0",), seconds=1.2),
    )
    run.until_step(1)
    run.until("requeued", lambda: run.attempts > 1)
    reached = run.step
    run.until("resumed", lambda: run.resumed)
    assert run.resumed[0] == reached
    assert_unmarked(run, undisturbed, attempts=None)
    figures["faults"].append(row(run, "time limit"))


@pytest.mark.parametrize("node", NODES)
def test_a_node_is_lost(node, launch, undisturbed, figures):
    run = launch()
    run.until_step(MIDDLE)
    lost = time.time()
    run.cluster.kill_node(node)
    try:
        run.until("noticed", lambda: run.step and run.cluster.state(run.job) != "RUNNING")
    finally:
        run.cluster.start_node(node)
    seen = follow(run, lost)
    seen.pop("signal_to_saved_s")
    # Slurm's order to end the lost attempt may come a minute late and reach the next one instead:
    # in its middle it saves and is queued again, at its end the job is called FAILED.
    if finish(run) == "FAILED" and (run.run_dir / "result.json").exists():
        run.cluster.run("scontrol", "requeue", run.job)
    assert_unmarked(run, undisturbed, attempts=None)
    told = row(run, f"node lost, {'with' if node == 'n1' else 'without'} rank 0", **seen)
    figures["faults"].append(told)
    assert told["seconds_lost"] <= SAVE_SECONDS + told["seconds_per_step"]


def test_slurmd_alone_is_killed(launch, undisturbed, figures):
    """Its ranks live on and write, until the attempt that takes their place begins."""
    config = replace(TWO_NODES, nodes=1, tasks_per_node=2)
    run = launch(config, added=SLOWLY.format(attempts=("0",), seconds=0.6))
    run.until_step(3)
    node = run.cluster.job(run.job)["NodeList"]
    lost = time.time()
    run.cluster.kill_slurmd(node)
    try:
        seen = follow(run, lost)
        run.until(
            "the superseded ranks have ended",
            lambda: not any("_submit" in one for one in run.cluster.processes(node)),
            20,
        )
        assert run.cluster.job(run.job)["NodeList"] != node
        assert "this process writes no more" in run.log
    finally:
        run.cluster.start_node(node)
    assert_unmarked(run, undisturbed)
    figures["faults"].append(row(run, "slurmd killed, ranks alive", **seen))


def test_a_cancelled_job(launch, figures):
    run = launch()
    run.until_step(MIDDLE)
    told = time.time()
    run.cluster.scancel(run.job)
    assert finish(run) == "CANCELLED"
    ended = time.time()
    step, saved = max(run.checkpoints.items())
    assert run.step == step
    assert saved > told
    assert run.attempts == 1
    time.sleep(8)  # as long as a requeue takes
    assert run.job not in run.cluster.squeue()
    assert run.cluster.state(run.job) == "CANCELLED"
    figures["faults"].append(
        row(run, "cancelled", signal_to_saved_s=saved - told, signal_to_ended_s=ended - told)
    )


def test_a_failing_parent(launch, figures):
    parent = launch(argv=("--loop.epochs", "0"))
    child = launch(after=(parent.job,))
    assert finish(parent) == "FAILED"
    assert "epochs=0 must be at least 1" in parent.log
    assert finish(child) == "CANCELLED"
    assert not child.run_dir.exists()
    assert child.job not in child.cluster.squeue()
    figures["faults"].append(
        {
            "fault": "its parent fails",
            "outcome": "CANCELLED",
            "attempts": 0,
            "steps_lost": 0,
            "seconds_lost": 0,
        }
    )


def test_one_rank_fails(launch, figures):
    run = launch(added=FAILING)
    run.until_step(5)
    failed = time.time()
    assert finish(run) == "FAILED"
    assert run.attempts == 1
    assert "rank 1 alone failed" in run.log
    figures["faults"].append(row(run, "one rank fails", failed_to_ended_s=time.time() - failed))


def test_starting_up(launch, data, figures, tmp_path, request):
    """From the command to the first step: launched, started with srun alone; and srun with the
    imports alone."""
    seconds: dict[str, list[float]] = {"launched": [], "srun": [], "srun_imports": []}
    for number in range(3 if request.config.getoption("--record") else 1):
        run = launch()
        seconds["launched"].append(run.until_step(1) - run.sent)
        run.cluster.empty()
        plain = Run(run.cluster, "", tmp_path / str(number), tmp_path, time.time())
        srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--quiet", sys.executable]
        command = [
            *srun,
            "-m",
            "imsvd_core.cli",
            *TRAINING,
            "--data",
            data,
            "--run-dir",
            str(plain.run_dir),
        ]
        with (
            open(tmp_path / "srun.err", "w") as log,
            subprocess.Popen(command, stderr=log) as process,
        ):
            first = plain.until("the first step", lambda plain=plain: plain.step or process.poll())
            run.cluster.empty()
        assert plain.step, (tmp_path / "srun.err").read_text()
        seconds["srun"].append(first - plain.sent)
        start = time.time()
        subprocess.run([*srun, "-c", "import imsvd_core.runs.pretrain"], check=True)
        seconds["srun_imports"].append(time.time() - start)
    figures["start_up"] |= {
        f"{name}_s": [round(value, 2) for value in values] for name, values in seconds.items()
    }
    assert seconds["launched"][-1] < seconds["srun"][-1] + 10
