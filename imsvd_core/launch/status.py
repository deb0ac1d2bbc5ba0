"""How a graph's tasks stand, derived anew from their files and the queue, and shown live in the
terminal."""

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from imsvd_core.launch import queue
from imsvd_core.launch.graph import GRAPH, Graph, Task, finished, stored_config
from imsvd_core.launch.submit import Submission
from imsvd_core.results import read_result

#: The states of a task, and how they are shown.
STYLES = {
    "done": "green",
    "running": "cyan",
    "pending": "yellow",
    "failed": "bold red",
    "cancelled": "red",
    "not run": "magenta",
    "not submitted": "dim",
    "unknown": "dim",
}
REFRESH = 3.0  # seconds
_TAIL = 1 << 18  # bytes of a record or a log that are read: some hundred lines
_BLAME = re.compile(r"srun: error: (\S+: tasks? (\d+).*)")
_REASONS = {
    "BeginTime": "begins later",
    "Resources": "waits for free resources",
    "Priority": "waits: other jobs come first",
    "": "waits for the scheduler",
    "JobHeldUser": "held: scontrol release {job}",
    "JobHeldAdmin": "held by the administrator",
    "PartitionTimeLimit": "asks for more time than its partition gives",
    "launch_failed_requeued_held": "held after its start failed: scontrol release {job}",
}


@dataclass(frozen=True)
class Standing:
    """One task, now."""

    task: Task
    #: One of `STYLES`.
    state: str
    #: What it waits for, how far it is, what it gave, why it failed.
    words: str = ""
    #: The id of its last job.
    job: str | None = None
    #: The last lines of a failed job's log.
    log: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        return self.state in ("running", "pending")


def standings_of(graph: Graph) -> dict[str, Standing]:
    """How every task stands, by name.

    Raises ValueError where a folder holds a run with other settings than the graph's.
    """
    submissions = {task.name: Submission.read(task.folder) for task in graph}
    jobs = {}
    for task in graph:
        submission = submissions[task.name]
        results = (task.result, *(graph[need].result for need in task.needs))
        complete = all(result.exists() for result in results)
        if submission and submission.executor == "slurm" and not complete:
            jobs[submission.job_id] = submission.name
    try:
        entries, trouble = queue.ask(jobs), ""
    except queue.NoAnswer as error:
        entries, trouble = {}, str(error)
    # after the queue: a job that has left it by itself has its result
    done = {task.name for task in graph if finished(task)}
    standings: dict[str, Standing] = {}
    for task in graph:
        submission = submissions[task.name]
        job = submission.job_id if submission else None
        needs = [standings[need] for need in task.needs]
        if task.name in done and all(need.state == "done" for need in needs):
            standing = Standing(task, "done", outcome(task), job)
        elif submission and submission.executor != "slurm" and queue.alive(submission):
            standing = Standing(task, "running", progress(task) or "starting", job)
        elif submission and trouble:
            standing = Standing(task, "unknown", trouble, job)
        else:
            standing = stand(task, needs, submission, entries.get(job or ""))
        standings[task.name] = standing
    return standings


def stand(
    task: Task, needs: Sequence[Standing], submission: Submission | None, entry: queue.Entry | None
) -> Standing:
    """How an unfinished task stands that does not run here.

    `entry` is what Slurm says of its last submission.
    """
    job = submission.job_id if submission else None
    attempt = f"attempt {entry.restarts + 1}" if entry and entry.restarts else ""
    if entry and entry.live and entry.state != "PENDING":
        word = "" if entry.state == "RUNNING" else entry.state.lower()
        words = _joined(progress(task) or "starting", attempt, word)
        return Standing(task, "running", words, job)
    lost = [
        need.words if need.state == "not run" else f"{need.task.name} {need.state}"
        for need in needs
        if need.state in ("failed", "cancelled", "not run")
    ]
    if entry and entry.live and entry.reason == "DependencyNeverSatisfied":
        lost = lost or ["an earlier job that it waits for has failed"]
    if lost:
        # it may be in the queue still: Slurm takes it out
        return Standing(task, "not run", " and ".join(dict.fromkeys(lost)), job)
    if submission is None:
        return Standing(task, "not submitted")
    if entry and entry.live:
        words = _joined(_why(entry, needs), attempt and f"requeued, {attempt}")
        return Standing(task, "pending", words, job)
    state = "cancelled" if entry and entry.state == "CANCELLED" else "failed"
    words = _failure(submission, entry) if state == "failed" else ""
    if entry:
        words = _joined(words, f"job {job}", f"after {entry.elapsed}")
    return Standing(task, state, words, job, log=last_words(submission))


def _failure(submission: Submission, entry: queue.Entry | None) -> str:
    """Why a job that has ended counts as failed."""
    if entry is None and submission.executor != "slurm":
        return "ended without a result"
    if entry is None:
        return f"Slurm does not know job {submission.job_id} any more"
    if entry.exit_code and entry.state == "FAILED":
        code = entry.exit_code
        return f"exit code {code}" if code > 0 else f"signal {-code}"
    if entry.state == "COMPLETED":
        return "completed, but left no result"
    if entry.state in queue.LIVE:
        return f"left the queue, {entry.state} when last heard of"
    return entry.state


def _why(entry: queue.Entry, needs: Sequence[Standing]) -> str:
    """Why a job is pending, in words."""
    words = _REASONS.get(entry.reason, f"waits: {entry.reason}").format(job=entry.job_id)
    if entry.reason == "Dependency":
        open_needs = [need.task.name for need in needs if need.state != "done"]
        words = f"waits for {' and '.join(open_needs) or 'other jobs'}"
    return _joined(words, entry.start and f"expected at {entry.start}")


def outcome(task: Task) -> str:
    """What a finished task gave: accuracies, and how long it took."""
    result = read_result(task.result)
    seconds = result["provenance"]["seconds"]
    return _joined(*_accuracies(result["figures"]), str(timedelta(seconds=round(seconds))))


def progress(task: Task) -> str:
    """How far a running task is, from what it has recorded; "" before it records anything."""
    config, records = task.settings or stored_config(task), "metrics.jsonl"
    if task.argv[0] == "evaluate":
        kind = task.argv[1]
        # how long a protocol takes no file tells
        config = config.get("linear", {}) if kind == "linear" else {}
        records = f"{kind}/*/{records}"
    newest = max(task.run_dir.glob(records), key=os.path.getmtime, default=None)
    lines = [json.loads(line) for line in _tail(newest) if line.endswith("\n")] if newest else []
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return ""
    last = steps[-1]
    if not config:
        return f"step {last['step']}"
    loop = config["loop"]
    total = round(last["step"] / last["epoch"]) * loop["epochs"]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
    watched = [line for line in lines if "gallery" in line]
    accuracies = _accuracies(watched[-1]) if watched else []
    parts = [f"step {last['step']} of {total}", f"loss {loss}", *accuracies]
    if speed := last.get("samples_per_second"):
        left = timedelta(seconds=round((total - last["step"]) * loop["batch_size"] / speed))
        parts += [f"{speed:.0f} images/s", f"{left} left"]
    return _joined(*parts)


def _accuracies(figures: Mapping[str, Any]) -> list[str]:
    return [
        f"{name.replace('knn_', 'kNN-')} {value:g} %"
        for name, value in figures.items()
        if name == "linear" or name.startswith("knn_")
    ]


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def last_words(submission: Submission, lines: int = 3) -> tuple[str, ...]:
    """The last lines of a job's log: of the rank that srun blames first, else of the first rank
    that wrote any; with srun's own line where the rank did not end by itself."""
    blames = map(_BLAME.match, _log(submission, 0, "err"))
    blame = next((match for match in blames if match), None)
    ranks = sorted(range(submission.tasks), key=lambda rank: not blame or rank != int(blame[2]))
    for ending in ("err", "out"):
        for rank in ranks:
            written = _log(submission, rank, ending)
            last = [line for line in written if not line.startswith("srun:")][-lines:]
            if blame and written and "Exited with exit code" not in blame[1]:
                last.append(blame[1])
            if written:
                return tuple(last or written[-lines:])
    return ()


def _log(submission: Submission, rank: int, ending: str) -> list[str]:
    """The lines that end a rank's log."""
    path = Path(submission.folder) / f"{submission.job_id}_{rank}_log.{ending}"
    return [line.rstrip() for line in _tail(path) if line.strip()]


def _tail(path: Path) -> list[str]:
    """The last lines of a file, the first of them whole; none if it is not there."""
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
            file.seek(start)
            return file.read().decode(errors="replace").splitlines(keepends=True)[bool(start) :]
    except OSError:
        return []


def graphs_under(folder: Path) -> list[Graph]:
    """The graphs of `imsvd reproduce` in `folder` or right under it; runs of `imsvd launch` count
    as graphs of one task.

    Raises ValueError if there are none.
    """
    for places in ([folder], sorted(folder.glob("*/"))):
        graphs = [
            Graph.load(place) if (place / GRAPH).exists() else Graph(_launched(place))
            for place in places
        ]
        if graphs := [graph for graph in graphs if len(graph)]:
            return graphs
    raise ValueError(
        f"folder={str(folder)!r} holds nothing that was launched: give the folder of "
        "`imsvd reproduce`, the run folder of `imsvd launch`, or a folder of such folders"
    )


def _launched(run_dir: Path) -> list[Task]:
    """What `imsvd launch` has sent for a run: its training, and evaluations."""
    jobs = run_dir / "jobs"
    tasks = []
    for place in (jobs, *sorted(jobs.glob("*/"))):
        if sent := Submission.read(place):
            name = "/".join((run_dir.name, *place.relative_to(jobs).parts))
            result = "result" if place == jobs else place.name
            tasks.append(Task(name, sent.argv, run_dir, run_dir / f"{result}.json"))
    return tasks


def table(standings: Iterable[Standing], title: str | None = None) -> Table:
    """The standings as a table: those of one run together."""
    shown = Table("task", "state", "", title=title, title_justify="left", box=None, pad_edge=False)
    for standing in sorted(standings, key=lambda standing: standing.task.run_dir):
        state = Text(standing.state, style=STYLES[standing.state])
        words = Text("\n  ".join((standing.words, *standing.log)))
        shown.add_row(standing.task.name, state, words)
    return shown


def summary(standings: Iterable[Standing]) -> str:
    """Such as "15 tasks: 3 done, 2 running, 10 pending"."""
    counts = Counter(standing.state for standing in standings)
    parts = [f"{counts[state]} {state}" for state in STYLES if counts[state]]
    return f"{counts.total()} task{'s' if counts.total() != 1 else ''}: {', '.join(parts)}"


def overview(standings: Collection[Standing]) -> Group:
    """Summary and table; the summary first: a low terminal cuts off the end."""
    return Group(Text(summary(standings)), table(standings))


def watch(
    look_again: Callable[[], Collection[Standing]], console: Console, *, once: bool = False
) -> None:
    """Show what `look_again` returns until nothing is on its way any more, or Ctrl-C; once if
    `once`, or if this is no terminal."""
    # the jobs go on after Ctrl-C
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            standings = look_again()
            live.update(overview(standings), refresh=True)
            goes_on = any(each.live or each.state == "unknown" for each in standings)
            if once or not goes_on or not console.is_terminal:
                break
            time.sleep(REFRESH)
