"""A graph of runs brought to its end: what is finished stays, what runs goes on, the rest is
submitted."""

import contextlib
import hashlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from imsvd_core.data.sources import data_root
from imsvd_core.launch import queue
from imsvd_core.launch.graph import Graph, Task
from imsvd_core.launch.plan import in_all, plan, refusals
from imsvd_core.launch.status import Standing, overview, standings_of, summary, table
from imsvd_core.launch.submit import NoRoom, Submission, snapshot, submit
from imsvd_core.recipes import Recipe
from imsvd_core.system.cluster import LaunchConfig
from imsvd_core.system.config import from_plain
from imsvd_core.system.looks import looks
from imsvd_core.system.run_folder import RunFolder

#: How often a job that runs here is looked at.
PAUSE_SECONDS = 1.0
#: States of a task whose job has ended without a result, and of one that waited for such a job.
UNDONE = ("failed", "cancelled")
LOST = (*UNDONE, "not run")
#: How long it waits before it asks again whether the queue has room.
ROOM_SECONDS = 60.0


def reproduce(
    graph: Graph,
    out: Path,
    config: LaunchConfig,
    console: Console,
    *,
    dry_run: bool = False,
    wait: bool = False,
) -> bool:
    """Bring `graph`, whose folder is `out`, to its end; returns whether nothing has failed, nor had
    to be left unsent since the queue holds as many jobs as it may (with `wait`, it waits for room).

    Whether a task is finished, on its way or lost is found out anew each time. With Slurm, what is
    neither finished nor on its way is submitted, each task to start after those that it needs; this
    returns at once. Else tasks run here, one after the other, shown live, and a task that needs a
    failed one is not run.

    Raises ValueError, before anything is submitted, if a training's plan is refused, if a folder
    holds a run with other settings, if another call is at work in `out`, if a task is on its way
    with other settings or elsewhere, or if Slurm does not answer.
    """
    # one call at a time
    with contextlib.nullcontext() if dry_run else RunFolder(out):
        standings = list(standings_of(graph).values())
        if all(standing.state == "done" for standing in standings):
            end = f"{summary(standings)}: there is nothing left to do"
            console.print(table(standings), end, sep="\n")
            return True
        _refuse_strangers(standings, config)
        missing = [
            standing.task
            for standing in standings
            if standing.state != "done" and not standing.live
        ]
        plans = [
            plan(task.argv[1], from_plain(Recipe, task.settings), config, task.run_dir)
            for task in missing
            if task.argv[0] == "pretrain"
        ]
        if dry_run:
            names = ", ".join(task.name for task in missing)
            would = f"would submit {len(missing)}: {names}"
            told = [in_all(plans)] if plans else []
            disk = sum(part.disk_gb for part in plans)
            told += map(str, looks(out, data_root(), disk, len(missing)))
            console.print(overview(standings), *told, would, sep="\n", highlight=False)
            return True
        if plans and (refused := refusals(plans)):
            raise ValueError("nothing was submitted:\n  " + "\n  ".join(refused))
        graph.save(out)
        code = snapshot(out / "code")
        ended = [standing for standing in standings if standing.state in UNDONE]
        if ended:
            console.print(table(ended, "to be done again:"))
        if config.executor == "slurm":
            return _submit_all(graph, out, config, code, console, wait)
        return _run_all(graph, out, config, code, console)


def job_name(task: Task, out: Path) -> str:
    """A name that no other task's job bears, of this graph or another."""
    return f"{task.name}@{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"


def _refuse_strangers(standings: Sequence[Standing], config: LaunchConfig) -> None:
    """Raise ValueError for a job on its way that has other settings or runs elsewhere."""
    for standing in standings:
        submission = Submission.read(standing.task.folder) if standing.live else None
        if submission and (submission.executor == "slurm") != (config.executor == "slurm"):
            raise ValueError(
                f"executor={config.executor!r}: {standing.task.name} is on its way by "
                f"{submission.executor} (job {submission.job_id}): wait for its end, or stop it"
            )
        if submission and submission.argv != standing.task.argv:
            raise ValueError(
                f"{standing.task.name} is on its way with other settings: stop it "
                f"(job {submission.job_id}), or give another --out"
            )


def _submit_all(
    graph: Graph, out: Path, config: LaunchConfig, code: Path, console: Console, wait: bool
) -> bool:
    names = {job_name(task, out): task for task in graph}
    try:
        queued = [entry for entry in queue.ask({}, names).values() if entry.live]
    except queue.NoAnswer as error:
        raise ValueError(f"executor='slurm': {error}; nothing was submitted") from None
    # looked at after the queue: a job that has left it in between has its result
    standings = standings_of(graph)
    live: dict[str, str] = {}
    for entry in queued:
        task = names[entry.name]
        recorded = Submission.read(task.folder)
        if recorded and recorded.job_id == entry.job_id and standings[task.name].state != "not run":
            live[task.name] = entry.job_id
        else:
            # it waits for a failed one, or we were cut off from recording it
            queue.cancel(entry.job_id)
    jobs = dict(live)
    left = [
        task for task in graph if task.name not in live and standings[task.name].state != "done"
    ]
    sent, full = 0, ""
    while left:
        task = left[0]
        needs = [need for need in task.needs if standings[need].state != "done"]
        if not all(need in jobs for need in needs):  # it has failed while there was no room
            left.pop(0)
            continue
        try:
            after = [jobs[need] for need in needs]
            jobs[task.name] = _submit(task, out, config, code, after).job_id
        except NoRoom as error:
            full = f"{len(left)} wait: {error}"
            if not wait:
                break
            console.print(full, highlight=False)
            time.sleep(ROOM_SECONDS)
            standings = standings_of(graph)
            jobs = {name: job for name, job in jobs.items() if standings[name].state not in LOST}
        else:
            left.pop(0)
            sent += 1
            waits = f", after {', '.join(after)}" if after else ""
            console.print(f"submitted {task.name} as job {jobs[task.name]}{waits}", highlight=False)
    done = sum(standing.state == "done" for standing in standings.values())
    more = f"{full}, or give --wait. " if left else ""
    console.print(
        f"{sent} submitted, {len(live)} on their way already, {done} done. {more}"
        f"`imsvd status {shlex.quote(str(out))}` shows how they get on",
        highlight=False,
        soft_wrap=True,
    )
    return not left


def _submit(
    task: Task, out: Path, config: LaunchConfig, code: Path, after: Sequence[str] = ()
) -> Submission:
    return submit(
        task.argv,
        name=job_name(task, out),
        folder=task.folder,
        config=fitting(task, config),
        code=code,
        after=after,
    )


def fitting(task: Task, config: LaunchConfig) -> LaunchConfig:
    """What the task uses of what is given: an evaluation is the work of one process."""
    if task.argv[0] != "evaluate":
        return config
    return replace(config, nodes=1, tasks_per_node=1, gpus_per_node=min(1, config.gpus_per_node))


def _run_all(graph: Graph, out: Path, config: LaunchConfig, code: Path, console: Console) -> bool:
    with Live(console=console, auto_refresh=False) as live:
        for task in graph:
            standings = standings_of(graph)
            lacks = any(standings[need].state != "done" for need in task.needs)
            if lacks or standings[task.name].state == "done":
                continue
            submission = Submission.read(task.folder)
            # a call that was cut off may have left a job that runs
            if not (submission and queue.alive(submission)):
                submission = _submit(task, out, config, code)
            if submission.job and config.executor == "debug":
                with contextlib.suppress(Exception, SystemExit):  # what it left tells
                    submission.job.results()
            while queue.alive(submission):
                live.update(overview(standings_of(graph).values()), refresh=True)
                time.sleep(PAUSE_SECONDS)
        ends = standings_of(graph).values()
        live.update(overview(ends))
    return all(standing.state == "done" for standing in ends)
