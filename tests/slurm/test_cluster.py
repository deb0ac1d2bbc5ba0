"""The Slurm that the other tests here use: it starts, loses nodes, and leaves nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, missing

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
STUBBORN = "trap '' TERM; while :; do sleep 1; done"


def running(folder: Path) -> list[str]:
    """The processes of this machine that a cluster in `folder`, or a job of it, has started."""
    mark, found = f"SLURM_CONF={folder}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes():
                found.append(
                    (environment.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
        except OSError:  # it has just ended
            continue
    return [command for command in found if command]


def test_nothing_is_left_of_a_cluster_whose_test_fails_while_a_job_will_not_end(tmp_path):
    def failing_test():
        with Cluster(tmp_path) as cluster:
            job = cluster.sbatch(STUBBORN, "--nodes=2", "--ntasks-per-node=1")
            cluster.wait_for(job, "RUNNING")
            assert len(running(tmp_path)) > 10
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_test()
    assert not running(tmp_path)


def test_nothing_is_left_of_a_cluster_that_could_not_start(tmp_path, monkeypatch):
    log = tmp_path / "slurmctld.log"

    def fail(cluster: Cluster, node: str) -> None:
        # the controller runs by then, and opens its log when it comes to it
        cluster._until("slurmctld opens its log", log.exists)
        cluster.run("false")

    monkeypatch.setattr(Cluster, "start_node", fail)
    with pytest.raises(RuntimeError, match="false ended with 1"), Cluster(tmp_path):
        pass
    assert not running(tmp_path)
    assert log.exists()


def test_nothing_is_left_of_a_cluster_whose_owner_was_killed(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from cluster import Cluster\n"
        "with Cluster(Path(sys.argv[1])) as cluster:\n"
        f"    cluster.wait_for(cluster.sbatch({STUBBORN!r}), 'RUNNING'); os.abort()"
    )
    owner = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
    )
    assert owner.returncode < 0, owner.stderr
    time.sleep(1)
    assert (tmp_path / "slurmctld.log").exists()
    assert not running(tmp_path)


def test_a_job_outlives_a_slurmd_and_not_its_node(cluster):
    job = cluster.sbatch("exec sleep 300", "--nodelist=n1")
    cluster.wait_for(job, "RUNNING")
    cluster.kill_slurmd("n1")
    assert any("sleep 300" in command for command in cluster.processes("n1"))
    assert not cluster.processes("n2")
    cluster.kill_node("n1")
    assert not cluster.processes("n1")
    cluster.wait_for(job, "PENDING")  # given up, and requeued
    cluster.scancel(job)
    cluster.start_node("n1")
    assert next(attempt["State"] for attempt in cluster.sacct(job)) == "NODE_FAIL"
