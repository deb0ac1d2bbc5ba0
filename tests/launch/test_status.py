"""How tasks stand, from what Slurm has been seen to answer and from what runs record."""

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from imsvd_core.launch import queue, status
from imsvd_core.launch.graph import Graph, Task
from imsvd_core.launch.queue import alive
from imsvd_core.launch.status import (
    Standing,
    graphs_under,
    last_words,
    progress,
    stand,
    standings_of,
    summary,
    watch,
)
from imsvd_core.launch.submit import Submission
from imsvd_core.results import write_json

# Slurm 22.05.8: of `ask`'s own calls
SQUEUE = """\
3|a/child|CANCELLED|2026-11-23T03:17:33|0:00|0|DependencyNeverSatisfied|0|
2|a/bad|FAILED|2026-11-23T03:17:32|0:01|512|NonZeroExitCode|0|
5|a/knn|PENDING|N/A|0:00|0|Dependency|0|
6|a/big|PENDING|2026-11-23T04:17:32|0:00|0|Resources|0|
7|a/later|PENDING|2026-11-23T03:27:30|0:00|0|BeginTime|0|
10|a/again|PENDING|2026-11-23T03:18:36|0:00|0|BeginTime|1|
1|a/pretrain|RUNNING|2026-11-23T03:17:32|0:02|0|None|2|
12|a/killed|FAILED|2026-11-23T03:17:32|0:02|9|RaisedSignal:9(Killed)|0|
13|a/ending|COMPLETING|2026-11-23T03:17:32|0:04|256|NonZeroExitCode|0|
14|a/doomed|PENDING|N/A|0:00|0|DependencyNeverSatisfied|0|
15|a/held|PENDING|N/A|0:00|0|JobHeldUser|0|
16|a/limit|PENDING|N/A|0:00|0|QOSMaxJobsPerUserLimit|0|
"""
SACCT = """\
10|a/again|REQUEUED|2026-11-23T03:18:27|00:00:03|0:0
10|a/again|PENDING|Unknown|00:00:00|0:0
20|a/nothing|COMPLETED|2026-11-23T03:17:32|00:00:08|0:0
21|a/node|NODE_FAIL|2026-11-23T03:17:32|00:01:08|1:0
21|a/node|TIMEOUT|2026-11-23T03:19:32|00:10:08|0:0
22|allocation|CANCELLED by 0|2026-11-23T03:17:57|00:00:00|0:0
23|a/purged|RUNNING|2026-11-23T03:17:57|00:00:09|0:0
24|a/signal|FAILED|2026-11-23T03:17:57|00:00:09|0:9
25|another|FAILED|2026-11-23T03:17:57|00:00:09|2:0
"""
NAMES = {
    "20": "a/nothing",
    "21": "a/node",
    "22": "a/canc",
    "23": "a/purged",
    "24": "a/signal",
    "25": "a/mine",
    "26": "a/unknown",
}


def task(name: str, *needs: str, out: Path = Path("nowhere")) -> Task:
    run, _, kind = name.partition("/")
    argv = ("pretrain", "cifar10") if kind in ("pretrain", "") else ("evaluate", kind, "a")
    return Task(name, argv, out / run, out / run / f"{kind}.json", needs)


def sent(
    job: str, name: str = "a/x", executor: str = "slurm", folder: object = "nowhere", tasks: int = 1
) -> Submission:
    return Submission(name, ("pretrain",), job, executor, str(folder), tasks, "")


def record(folder: Path, submission: Submission) -> None:
    write_json(
        folder / "submission.json",
        {key: value for key, value in vars(submission).items() if key != "job"},
    )


@pytest.fixture
def slurm(monkeypatch):
    """What `ask` calls, and the answers: text, or an error."""
    calls, answers = [], {"squeue": SQUEUE, "sacct": SACCT}

    def run(*command):
        calls.append(command)
        answer = answers[command[0]]
        if isinstance(answer, Exception):
            raise answer
        option, column = ("--name=", 1) if command[0] == "squeue" else ("--jobs=", 0)
        (words,) = (word.removeprefix(option) for word in command if word.startswith(option))
        lines = answer.splitlines(keepends=True)
        return "".join(line for line in lines if line.split("|")[column] in words.split(","))

    monkeypatch.setattr(queue, "_run", run)
    return calls, answers


def test_slurm_is_asked_once_for_all_and_the_accounts_for_those_that_have_left(slurm):
    calls, _ = slurm
    jobs = {entry.job_id: entry.name for entry in queue.read(SQUEUE, in_queue=True)} | NAMES
    entries = queue.ask(jobs)
    assert [command[0] for command in calls] == ["squeue", "sacct"]
    assert f"--jobs={','.join(sorted(NAMES))}" in calls[1]
    assert set(entries) == set(jobs) - {"25", "26"}  # a number that another job has had is not ours
    assert entries["21"].state == "TIMEOUT"  # of several records the last
    assert not entries["23"].live  # it has left the queue, whatever the accounts say


def test_a_job_is_ours_by_number_and_name_and_found_by_its_name_alone(slurm):
    assert queue.ask({"2": "a/bad", "5": "another"}).keys() == {"2"}
    assert queue.ask({}, ["a/bad"]).keys() == {"2"}
    calls, _ = slurm
    del calls[:]
    assert queue.ask({}) == {}
    assert not calls


def test_a_cluster_without_accounts_is_one_too(slurm):
    _, answers = slurm
    answers["sacct"] = queue.NoAnswer("sacct failed: Slurm accounting storage is disabled")
    assert queue.ask({"1": "a/pretrain", **NAMES}).keys() == {"1"}
    answers["squeue"] = queue.NoAnswer("squeue cannot be asked")
    with pytest.raises(queue.NoAnswer):
        queue.ask(NAMES)


def test_commands_that_fail_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(queue.NoAnswer, match="squeue cannot be asked"):
        queue.ask(NAMES)
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'squeue: error: nobody there' >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    with pytest.raises(queue.NoAnswer, match="squeue failed: squeue: error: nobody there"):
        queue.ask(NAMES)


@pytest.mark.parametrize(
    ("job", "state", "words"),
    [
        ("1", "running", "starting, attempt 3"),
        ("2", "failed", "exit code 2, job 2, after 0:01"),
        ("3", "cancelled", "job 3, after 0:00"),
        ("5", "pending", "waits for a/pretrain"),
        ("6", "pending", "waits for free resources, expected at 2026-11-23 04:17:32"),
        ("7", "pending", "begins later, expected at 2026-11-23 03:27:30"),
        (
            "10",
            "pending",
            "begins later, expected at 2026-11-23 03:18:36, requeued, attempt 2",
        ),
        ("12", "failed", "signal 9, job 12, after 0:02"),
        ("13", "running", "starting, completing"),
        ("14", "not run", "an earlier job that it waits for has failed"),
        ("15", "pending", "held: scontrol release 15"),
        ("16", "pending", "waits: QOSMaxJobsPerUserLimit"),
        ("20", "failed", "completed, but left no result, job 20, after 00:00:08"),
        ("21", "failed", "TIMEOUT, job 21, after 00:10:08"),
        ("22", "cancelled", "job 22, after 00:00:00"),
        ("23", "failed", "left the queue, RUNNING when last heard of, job 23, after 00:00:09"),
        ("24", "failed", "signal 9, job 24, after 00:00:09"),
        ("26", "failed", "Slurm does not know job 26 any more"),
    ],
)
def test_the_state_of_an_unfinished_task(job, state, words):
    entries = {
        entry.job_id: entry
        for entry in [*queue.read(SACCT, in_queue=False), *queue.read(SQUEUE, in_queue=True)]
    }
    running = Standing(task("a/pretrain"), "running")
    standing = stand(task("a/x"), [running], sent(job), entries.get(job))
    assert (standing.state, standing.words) == (state, words)


@pytest.mark.parametrize("job", ["3", "5", "22", "14"])
def test_what_a_failed_task_should_have_given_is_not_run_and_says_so(job):
    entries = [*queue.read(SACCT, in_queue=False), *queue.read(SQUEUE, in_queue=True)]
    entry = next(entry for entry in entries if entry.job_id == job)
    failed = Standing(task("a/pretrain"), "failed", "exit code 2")
    first = stand(task("a/linear", "a/pretrain"), [failed], sent(job), entry)
    assert (first.state, first.words) == ("not run", "a/pretrain failed")
    second = stand(task("a/more", "a/linear"), [first, failed], sent(job), entry)
    assert (second.state, second.words) == ("not run", "a/pretrain failed")  # the root of it, once
    third = stand(task("a/linear"), [Standing(task("a/pretrain"), "cancelled")], None, None)
    assert (third.state, third.words) == ("not run", "a/pretrain cancelled")


def test_a_result_is_what_counts_and_not_what_slurm_says_of_its_job(tmp_path, slurm):
    graph = Graph([task("a/pretrain", out=tmp_path), task("a/knn", "a/pretrain", out=tmp_path)])
    record(graph["a/pretrain"].folder, sent("13", "a/ending"))
    record(graph["a/knn"].folder, sent("5", "a/knn"))
    write_json(
        graph["a/knn"].result,
        {"name": "", "figures": {"knn_20": 31.0, "gallery": 9}, "provenance": {"seconds": 4.44}},
    )
    assert [one.state for one in standings_of(graph).values()] == [
        "running",
        "pending",
    ]  # the result is of a pretraining that is gone
    write_json(
        graph["a/pretrain"].result,
        {"name": "", "figures": {"knn_20": 30.5}, "provenance": {"seconds": 75}},
    )
    assert [(one.state, one.words) for one in standings_of(graph).values()] == [
        ("done", "kNN-20 30.5 %, 0:01:15"),
        ("done", "kNN-20 31 %, 0:00:04"),
    ]


def test_where_slurm_does_not_answer_nothing_is_said_of_its_jobs(tmp_path, slurm):
    _, answers = slurm
    answers["squeue"] = queue.NoAnswer("squeue cannot be asked")
    graph = Graph([task("a/pretrain", out=tmp_path)])
    record(graph["a/pretrain"].folder, sent("1"))
    assert standings_of(graph)["a/pretrain"] == Standing(
        graph["a/pretrain"], "unknown", "squeue cannot be asked", "1"
    )


def test_progress_is_the_last_step_and_what_remains_at_its_speed(tmp_path):
    one = task("a/pretrain", out=tmp_path)
    write_json(one.run_dir / "config.json", {"loop": {"epochs": 4, "batch_size": 64}})
    lines = [
        {"step": 10, "epoch": 1.0, "knn_20": 25.5, "gallery": 200},
        {"step": 11, "epoch": 1.1, "loss": 9.0},
        {"step": 12, "epoch": 1.2, "loss": 3.14159, "samples_per_second": 28.0},
    ]
    assert progress(one) == ""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (one.run_dir / "metrics.jsonl").write_text(text + '{"step": 13, "epo')
    assert progress(one) == "step 12 of 40, loss 3.142, kNN-20 25.5 %, 28 images/s, 0:01:04 left"
    (one.run_dir / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0.1, "loss": 7}\n' * 20_000 + text
    )  # more than is read
    assert progress(one).startswith("step 12 of 40, loss 3.142, kNN-20 25.5 %")
    probe = task("a/linear", out=tmp_path)
    write_json(one.run_dir / "config.json", {"linear": {"loop": {"epochs": 8, "batch_size": 64}}})
    (one.run_dir / "linear" / "abc").mkdir(parents=True)
    (one.run_dir / "linear" / "abc" / "metrics.jsonl").write_text(
        '{"step": 5, "epoch": 0.5, "loss": null}\n'
    )
    assert progress(probe) == "step 5 of 80, loss not finite"
    assert progress(task("a/knn", out=tmp_path)) == ""


def test_last_words_are_the_job_s_own_and_of_the_first_rank_that_has_any(tmp_path):
    job = sent("7", folder=tmp_path, tasks=2)
    assert last_words(job) == ()
    (tmp_path / "7_0_log.out").write_text("from standard output\n")
    assert last_words(job) == ("from standard output",)
    (tmp_path / "7_0_log.err").write_text("srun: error: n1: task 0: Exited with exit code 2\n")
    assert last_words(job) == ("srun: error: n1: task 0: Exited with exit code 2",)
    (tmp_path / "7_0_log.err").write_text(
        "a\nb\n\nc\nimsvd pretrain: no\nsrun: error: n1: task 0: Exited with exit code 2\n"
    )
    assert last_words(job) == ("b", "c", "imsvd pretrain: no")


def test_last_words_are_those_of_the_rank_that_failed_first(tmp_path):
    job = sent("7", folder=tmp_path, tasks=2)
    (tmp_path / "7_0_log.err").write_text(
        "Connection reset by peer\n"
        "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited "
        "with exit code 1\n"
    )
    (tmp_path / "7_1_log.err").write_text("resumed run at step 7\n")
    assert last_words(job) == ("resumed run at step 7", "n2: task 1: Killed")
    (tmp_path / "7_0_log.err").write_text(
        "Connection reset by peer\nsrun: error: n2: task 1: Exited with exit code 2\n"
    )
    assert last_words(job) == ("resumed run at step 7",)


def test_a_process_is_a_job_s_own_if_it_works_in_its_folder(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        while not Path(f"/proc/{other.pid}/cmdline").read_bytes():  # it is still being started
            pass
        assert not alive(
            sent(str(other.pid), folder=tmp_path)
        )  # the number has gone to somebody else
        other.kill()
    with subprocess.Popen(["sh", "-c", f"read line # {tmp_path}"], stdin=subprocess.PIPE) as ours:
        assert alive(sent(str(ours.pid), folder=tmp_path))
        ours.kill()
        os.waitid(os.P_PID, ours.pid, os.WEXITED | os.WNOWAIT)
        assert not alive(
            sent(str(ours.pid), folder=tmp_path)
        )  # dead, though nobody has asked after it yet
    assert not alive(sent("DEBUG_1", folder=tmp_path))


def test_status_finds_graphs_and_runs_that_were_launched(tmp_path):
    with pytest.raises(ValueError, match="holds nothing that was launched"):
        graphs_under(tmp_path)
    Graph([task("a/pretrain", out=tmp_path / "table")]).save(tmp_path / "table")
    record(tmp_path / "run" / "jobs", sent("1", "run"))
    assert [[one.name for one in graph] for graph in graphs_under(tmp_path)] == [
        ["run"],
        ["a/pretrain"],
    ]
    (launched,) = graphs_under(tmp_path / "run")
    assert launched["run"].folder == tmp_path / "run" / "jobs"
    assert launched["run"].result == tmp_path / "run" / "result.json"


def test_what_is_shown(tmp_path, monkeypatch):
    done, failed = (
        Standing(task("b/pretrain"), "done", "linear 45 %"),
        Standing(task("a/knn"), "failed", "exit code 2", log=("why [red]",)),
    )
    standings = [Standing(task("a/pretrain"), "running", "step 1 of 9"), done, failed]
    console = Console(record=True, width=100, file=io.StringIO())
    watch(lambda: standings, console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0] == "3 tasks: 1 done, 1 running, 1 failed"
    assert [line.split()[0] for line in lines[2:]] == [
        "a/pretrain",
        "a/knn",
        "why",
        "b/pretrain",
    ]  # a run's tasks together
    assert lines[4].endswith("  why [red]")
    assert summary([done]) == "1 task: 1 done"


def test_watching_ends_when_nothing_is_on_its_way_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    states = iter(["pending", "running", "unknown", "done", "never looked at"])
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    watch(lambda: [Standing(task("a/pretrain"), next(states))], console)
    assert next(states) == "never looked at"
    assert "1 task: 1 running" in console.file.getvalue()
    assert "1 task: 1 done" in console.file.getvalue()
