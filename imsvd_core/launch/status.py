"""How a graph's tasks stand, derived anew from their files and the queue, and shown live in the
terminal."""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from imsvd_core.launch import queue
from imsvd_core.launch.graph import GRAPH, Graph, Task, finished
from imsvd_core.launch.submit import Submission
from imsvd_core.results import read_result

State = Literal[
    "done", "running", "pending", "failed", "cancelled", "not run", "not submitted", "unknown"
]
STYLES: Mapping[State, str] = {
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
_PAST = {"failed": "failed", "cancelled": "was cancelled"}
_TAIL = 1 << 18  # bytes of metrics.jsonl that are read: some hundred lines
_REASONS = {
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
    state: State
    #: What it waits for, how far it is, what it gave, why it failed.
    words: str = ""
    #: The id of its last job.
    job: str | None = None
    #: Whether its job has come to its end, and Slurm is clearing up.
    ending: bool = False
    #: The last lines of a failed job's log.
    log: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        return self.state in ("running", "pending")


def standings_of(
    graph: Graph, ask: Callable[..., dict[str, queue.Entry]] = queue.ask
) -> dict[str, Standing]:
    """How every task stands, by name.

    Raises ValueError where a folder holds a run with other settings than the graph's.
    """
    submissions = {
        task.name: submission for task in graph if (submission := read_submission(task.folder))
    }
    complete: set[str] = set()
    for task in graph:
        if task.result.exists() and complete.issuperset(task.needs):
            complete.add(task.name)
    jobs = {
        submission.job_id: submission.name
        for name, submission in submissions.items()
        if submission.executor == "slurm" and name not in complete
    }
    try:
        entries, trouble = ask(jobs), ""
    except queue.NoAnswer as error:
        entries, trouble = {}, str(error)
    # after the queue: a job that has left it by itself has its result
    done = {task.name for task in graph if finished(task)}
    standings: dict[str, Standing] = {}
    for task in graph:
        submission = submissions.get(task.name)
        needs = [standings[need] for need in task.needs]
        if task.name in done and all(need.state == "done" for need in needs):
            job = submission.job_id if submission else None
            standings[task.name] = Standing(task, "done", outcome(task), job)
        elif submission and submission.executor != "slurm" and queue.alive(submission):
            standings[task.name] = Standing(
                task, "running", progress(task) or "starting", submission.job_id
            )
        elif submission and trouble:
            standings[task.name] = Standing(task, "unknown", trouble, submission.job_id)
        else:
            entry = entries.get(submission.job_id) if submission else None
            standings[task.name] = stand(task, needs, submission, entry)
    return standings


def stand(
    task: Task, needs: Sequence[Standing], submission: Submission | None, entry: queue.Entry | None
) -> Standing:
    """How an unfinished task stands that does not run here.

    `entry` is what Slurm says of its last submission.
    """
    job = submission.job_id if submission else None
    lost = [need for need in needs if need.state in ("failed", "cancelled", "not run")]
    attempt = f"attempt {entry.restarts + 1}" if entry and entry.restarts else ""
    if entry and entry.live and entry.state != "PENDING":
        word = "" if entry.state == "RUNNING" else entry.state.lower()
        return Standing(
            task,
            "running",
            _joined(progress(task) or "starting", attempt, word),
            job,
            entry.state == "COMPLETING",
        )
    if lost:
        # it may be in the queue still: Slurm takes it out
        reasons = [
            need.words if need.state == "not run" else f"{need.task.name} {_PAST[need.state]}"
            for need in lost
        ]
        return Standing(task, "not run", " and ".join(dict.fromkeys(reasons)), job)
    if submission is None:
        return Standing(task, "not submitted")
    if entry and entry.live and entry.reason != "DependencyNeverSatisfied":
        return Standing(
            task, "pending", _joined(_why(entry, needs), attempt and f"requeued, {attempt}"), job
        )
    if entry and entry.live:
        return Standing(task, "not run", "an earlier job that it waits for has failed", job)
    of_job = () if entry is None else (f"job {job}", f"after {entry.elapsed}")
    log = last_words(submission)
    if entry and entry.state == "CANCELLED":
        return Standing(task, "cancelled", _joined(*of_job), job, log=log)
    return Standing(task, "failed", _joined(_failure(submission, entry), *of_job), job, log=log)


def _failure(submission: Submission, entry: queue.Entry | None) -> str:
    """Why a job that has ended counts as failed."""
    if entry is None and submission.executor != "slurm":
        return "ended without a result"
    if entry is None:
        return f"Slurm does not know job {submission.job_id} any more"
    if entry.state == "FAILED":
        code = entry.exit_code
        return f"exit code {code}" if code.isdigit() else code or "failed"
    if entry.state == "COMPLETED":
        return "completed, but left no result"
    if entry.state in queue.LIVE:
        return f"left the queue, {entry.state} when last heard of"
    return entry.state


def outcome(task: Task) -> str:
    """What a finished task gave: accuracies, and how long it took."""
    result = read_result(task.result)
    figures = [
        f"{_named(name)} {value:g} %"
        for name, value in result["figures"].items()
        if isinstance(value, int | float) and (name == "linear" or name.startswith("knn_"))
    ]
    return _joined(*figures, _duration(result["provenance"]["seconds"]))


def progress(task: Task) -> str:
    """How far a running task is, from what it has recorded; "" before it records anything."""
    config = task.settings or _json(task.run_dir / "config.json")
    paths = [task.run_dir / "metrics.jsonl"]
    if task.argv[0] == "evaluate":
        config = config.get("linear", {}) if task.argv[1] == "linear" else {}
        paths = sorted(
            (task.run_dir / task.argv[1]).glob("*/metrics.jsonl"),
            key=lambda path: path.stat().st_mtime,
        )
    lines = _tail(paths[-1]) if paths else []
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return ""
    if not config:
        # a protocol's, whose length no file tells
        return f"step {steps[-1]['step']}"
    last, loop = steps[-1], config["loop"]
    total = round(last["step"] / last["epoch"]) * loop["epochs"]
    parts = [
        f"step {last['step']} of {total}",
        f"loss {last['loss']:.3f}" if last["loss"] is not None else "loss not finite",
    ]
    for name, value in next((line for line in reversed(lines) if "gallery" in line), {}).items():
        if name.startswith("knn_"):
            parts.append(f"{_named(name)} {value:g} %")
    if speed := last.get("samples_per_second"):
        parts += [
            f"{speed:.0f} images/s",
            f"{_duration((total - last['step']) * loop['batch_size'] / speed)} left",
        ]
    return _joined(*parts)


_BLAME = re.compile(r"srun: error: (\S+: tasks? (\d+).*)")


def last_words(submission: Submission, lines: int = 3) -> tuple[str, ...]:
    """The last lines of a job's log: of the rank that srun blames first, else of the first rank
    that wrote any; with srun's own line where the rank did not end by itself."""
    first = _log_lines(submission, 0, "err")
    blamed = next((match for line in first if (match := _BLAME.match(line))), None)
    ranks = sorted(
        range(submission.tasks), key=lambda rank: blamed is None or rank != int(blamed[2])
    )
    for ending in ("err", "out"):
        for rank in ranks:
            written = _log_lines(submission, rank, ending)
            if not written:
                continue
            last = tuple([line for line in written if not line.startswith("srun:")][-lines:])
            if blamed and "Exited with exit code" not in blamed[1]:
                return (*last, blamed[1])
            return last or tuple(written[-lines:])
    return ()


def _log_lines(submission: Submission, rank: int, ending: str) -> list[str]:
    """The lines that end a rank's log."""
    try:
        with open(
            Path(submission.folder) / f"{submission.job_id}_{rank}_log.{ending}", "rb"
        ) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            return [
                line.rstrip()
                for line in file.read().decode(errors="replace").splitlines()
                if line.strip()
            ]
    except OSError:
        return []


def read_submission(folder: Path) -> Submission | None:
    """The last submission that left its record in `folder`; None if there is none."""
    try:
        return Submission.read(folder)
    except ValueError as error:
        raise ValueError(f"{folder / 'submission.json'} is not a submission: remove it") from error


def graphs_under(folder: Path) -> list[Graph]:
    """The graphs of `imsvd reproduce` in `folder` or right under it; runs of `imsvd launch` count
    as graphs of one task.

    Raises ValueError if there are none.
    """
    graphs = []
    for place in [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]:
        if (place / GRAPH).exists():
            graphs.append(Graph.load(place))
        elif launched := _launched(place):
            graphs.append(Graph(launched))
        if place == folder and graphs:
            break
    if not graphs:
        raise ValueError(
            f"folder={str(folder)!r} holds nothing that was launched: give the folder of "
            "`imsvd reproduce`, the run folder of `imsvd launch`, or a folder of such folders"
        )
    return graphs


def _launched(run_dir: Path) -> list[Task]:
    """What `imsvd launch` has sent for a run: its training, and evaluations."""
    jobs = {
        place: read_submission(place)
        for place in (run_dir / "jobs", *sorted((run_dir / "jobs").glob("*/")))
    }
    return [
        Task(
            "/".join((run_dir.name, *place.relative_to(run_dir / "jobs").parts)),
            tuple(sent.argv),
            run_dir,
            run_dir / f"{place.name if place.parent != run_dir else 'result'}.json",
        )
        for place, sent in jobs.items()
        if sent
    ]


def table(standings: Iterable[Standing], title: str = "") -> Table:
    """The standings as a table: those of one run together."""
    standings = list(standings)
    first: dict[Path, int] = {}
    for place, standing in enumerate(standings):
        first.setdefault(standing.task.run_dir, place)
    shown = Table(
        "task", "state", "", title=title or None, title_justify="left", box=None, pad_edge=False
    )
    for standing in sorted(standings, key=lambda standing: first[standing.task.run_dir]):
        words = Text(standing.words)
        for line in standing.log:
            words.append(f"\n  {line}", style="dim")
        shown.add_row(standing.task.name, Text(standing.state, style=STYLES[standing.state]), words)
    return shown


def summary(standings: Iterable[Standing]) -> str:
    """Such as "15 tasks: 3 done, 2 running, 10 pending"."""
    states = [standing.state for standing in standings]
    counts = [f"{states.count(state)} {state}" for state in STYLES if state in states]
    return f"{len(states)} task{'s' if len(states) != 1 else ''}: {', '.join(counts)}"


def watch(
    look_again: Callable[[], Iterable[Standing]],
    console: Console,
    *,
    once: bool = False,
    seconds: float = REFRESH,
) -> list[Standing]:
    """Show what `look_again` returns until nothing is on its way any more, or Ctrl-C; once if
    `once`, or if this is no terminal."""
    standings = list(look_again())
    if once or not console.is_terminal:
        console.print(table(standings), summary(standings), sep="\n")
        return standings
    # the jobs go on after Ctrl-C
    with live_table(console, keep=True) as update, contextlib.suppress(KeyboardInterrupt):
        update(standings)
        while any(standing.live or standing.state == "unknown" for standing in standings):
            time.sleep(seconds)
            standings = list(look_again())
            update(standings)
    return standings


@contextlib.contextmanager
def live_table(
    console: Console, *, keep: bool = False
) -> Iterator[Callable[[Iterable[Standing]], None]]:
    """The function that it yields shows standings on the terminal, in place of the last ones."""
    if not console.is_terminal:
        yield lambda standings: None
        return
    with Live(console=console, auto_refresh=False, transient=not keep) as live:

        def update(standings: Iterable[Standing]) -> None:
            standings = list(standings)
            # the summary first: a low terminal cuts off the end
            live.update(Group(Text(summary(standings)), table(standings)), refresh=True)

        yield update


def _why(entry: queue.Entry, needs: Sequence[Standing]) -> str:
    """Why a job is pending, in words."""
    open_needs = [need.task.name for need in needs if need.state != "done"]
    if entry.reason == "Dependency":
        return f"waits for {' and '.join(open_needs) or 'other jobs'}"
    if entry.reason == "BeginTime":
        return f"begins at {entry.start.replace('T', ' ')}" if entry.start else "begins later"
    words = _REASONS.get(entry.reason, f"waits: {entry.reason}").format(job=entry.job_id)
    if entry.start and entry.reason == "Resources":
        words += f", expected at {entry.start.replace('T', ' ')}"
    return words


def _named(name: str) -> str:
    return name.replace("knn_", "kNN-")


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    """1.2 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a metrics.jsonl, oldest first."""
    try:
        with open(path, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - _TAIL)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines(keepends=True)[bool(start) :]
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
