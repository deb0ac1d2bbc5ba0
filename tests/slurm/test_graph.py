"""All tables and figures as a graph of jobs on a real Slurm: one parent fails, its cause is mended,
the graph goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from runs import few_pictures

import imsvd_core
from imsvd_core.launch.graph import Graph
from imsvd_core.launch.status import Standing, standings_of
from imsvd_core.launch.submit import Submission

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # eighteen jobs, each of which imports torch

LOST = "vicreg-2-epochs"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return few_pictures(tmp_path_factory.mktemp("few"), 40, 20)


@pytest.fixture
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    added = cluster.env | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(imsvd_core.__file__).parent.parent),
    }
    for name, value in added.items():
        monkeypatch.setenv(name, value)
    yield dict(os.environ)
    cluster.empty()


def until_quiet(cluster: Cluster, out: Path, timeout: float = 600) -> dict[str, Standing]:
    """How the tasks stand when none is on its way any more, and the queue is empty: a job ends
    after its result is there."""
    end = time.monotonic() + timeout
    while True:
        standings = standings_of(Graph.load(out))
        if not any(one.live for one in standings.values()) and not cluster.squeue():
            return standings
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout:g} s: {standings}")
        time.sleep(1)


def test_a_graph_with_a_failing_parent_runs_as_designed_and_a_second_call_runs_what_failed_alone(
    cluster: Cluster,
    environment: dict[str, str],
    data: str,
    tmp_path: Path,
    figures: dict[str, Any],
) -> None:
    out, calls = tmp_path / "out", []
    observed = figures.setdefault("graphs", [])

    def imsvd(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "imsvd_core.cli", *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def reproduce() -> str:
        start = time.monotonic()
        said = imsvd(
            "reproduce",
            "--all",
            "--scale",
            "smoke",
            "--out",
            str(out),
            "--data",
            data,
            "--time",
            "30",
            "--options",
            "export",
            "NONE",  # as some clusters have it; the ranks get their environment all the same
        )
        calls.append(time.monotonic() - start)
        return said

    torn = out / LOST / "checkpoints" / "step-000000001.pt"
    torn.parent.mkdir(parents=True)
    torn.write_text("torn")
    start = time.monotonic()
    assert "15 submitted, 0 on their way already, 0 done" in reproduce()
    said = reproduce()  # at once: everything is in the queue, or has already done or failed
    assert " submitted as" not in said
    first = until_quiet(cluster, out)
    seconds = time.monotonic() - start

    lost = {f"{LOST}/{kind}" for kind in ("pretrain", "linear", "knn")}
    assert {name for name, one in first.items() if one.state == "done"} == first.keys() - lost
    failed = first[f"{LOST}/pretrain"]
    assert failed.state == "failed"
    assert failed.words.startswith("exit code ")
    assert any("none of the 1 checkpoints" in line for line in failed.log), failed
    for name in lost - {failed.task.name}:
        assert (first[name].state, first[name].words) == ("not run", f"{LOST}/pretrain failed")
        assert cluster.state(first[name].job) == "CANCELLED"  # and not pending for ever
    assert _starts_after_its_needs(cluster, first)
    observed.append(
        {"graph": "first call", "jobs": 15, "seconds": round(seconds, 1), **_counts(first)}
    )

    torn.unlink()
    before = {
        name: one.task.result.stat().st_mtime_ns
        for name, one in first.items()
        if one.state == "done"
    }
    start = time.monotonic()
    said = reproduce()
    assert "3 submitted, 0 on their way already, 12 done" in said
    assert "none of the 1 checkpoints" in said.replace("\n", " ")
    second = until_quiet(cluster, out)
    observed.append(
        {
            "graph": "second call",
            "jobs": 3,
            "seconds": round(time.monotonic() - start, 1),
            **_counts(second),
        }
    )
    assert all(one.state == "done" for one in second.values())
    assert before == {name: second[name].task.result.stat().st_mtime_ns for name in before}
    assert {name for name in second if second[name].job != first[name].job} == lost

    assert "15 tasks: 15 done: there is nothing left to do" in reproduce()
    assert "15 tasks: 15 done" in imsvd("status", str(out))
    told = cluster.run("sacct", "-X", "-n", "-P", "-o", "JobName", "-S", "2000-01-01").split()
    assert (
        sum(name.endswith(_mark(second)) for name in told) <= 18
    )  # never sent more often than needed
    observed.append(
        {
            "graph": "all calls",
            "jobs": 18,
            "seconds_of_calls": [round(call, 1) for call in calls],
            **_counts(second),
        }
    )


def _counts(standings: dict[str, Standing]) -> dict[str, int]:
    states = [one.state for one in standings.values()]
    return {state.replace(" ", "_"): states.count(state) for state in sorted(set(states))}


def _mark(standings: dict[str, Standing]) -> str:
    """How the names of all jobs of this graph end."""
    submission = Submission.read(next(iter(standings.values())).task.folder)
    return "@" + submission.name.split("@")[1]


def _starts_after_its_needs(cluster: Cluster, standings: dict[str, Standing]) -> bool:
    times = {name: cluster.job(one.job) for name, one in standings.items() if one.state == "done"}
    return all(
        times[need]["EndTime"] <= times[name]["StartTime"]
        for name in times
        for need in standings[name].task.needs
    )
