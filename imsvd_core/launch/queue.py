"""What Slurm says of jobs: one squeue and, for those that have left the queue, one sacct for all of
them. And of a job on this machine, whether it lives."""

import os
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imsvd_core.launch.submit import Submission

#: States in which a job is still to run, runs, or may come back. All others are ends.
LIVE = frozenset(
    [
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "SUSPENDED",
        "STOPPED",
        "SIGNALING",
        "STAGE_OUT",
        "COMPLETING",
        "RESIZING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
    ]
)
SLURM_TIMEOUT = 60  # seconds
_FIELDS = ("JobID", "State", "Reason", "StartTime", "TimeUsed", "RestartCnt", "exit_code", "Name")


@dataclass(frozen=True)
class Entry:
    """A job as Slurm sees it now."""

    job_id: str
    name: str
    #: Slurm's own word, such as RUNNING.
    state: str
    #: Why it is pending, in Slurm's own word.
    reason: str = ""
    #: When it started or is expected to, as Slurm prints it; "" if unknown.
    start: str = ""
    #: Of the current attempt, as Slurm prints it.
    elapsed: str = ""
    restarts: int = 0
    #: Such as 2, or "signal 9"; "" for 0 and for jobs that have not ended.
    exit_code: str = ""
    #: Whether squeue says so, not the accounting, which lags behind.
    in_queue: bool = True

    @property
    def live(self) -> bool:
        """Whether it may still do something; a job that squeue does not know has left the queue."""
        return self.in_queue and self.state in LIVE


class NoAnswer(RuntimeError):
    """squeue could not be asked."""


def ask(jobs: Mapping[str, str], names: Collection[str] = ()) -> dict[str, Entry]:
    """What Slurm says of jobs {id: name}, and of queued jobs that bear one of `names`; by id.

    A job that neither squeue nor sacct knows is left out. Raises NoAnswer if squeue cannot be
    asked; sacct may be missing.
    """
    every_name = {*names, *jobs.values()}
    if not every_name:
        return {}
    form = ",".join(f"{field}:|" for field in _FIELDS)
    listed = read_squeue(
        _run(
            "squeue",
            "--noheader",
            "--states=all",
            f"--Format={form}",
            f"--name={','.join(sorted(every_name))}",
        )
    )
    entries = {
        entry.job_id: entry
        for entry in listed
        if entry.name in names or jobs.get(entry.job_id) == entry.name
    }
    if gone := sorted(jobs.keys() - entries.keys()):
        try:
            accounts = _run(
                "sacct",
                "--allocations",
                "--parsable2",
                "--noheader",
                f"--jobs={','.join(gone)}",
                "--format=JobIDRaw,State,ExitCode,Start,Elapsed,JobName",
            )
        except NoAnswer:
            # many clusters keep no accounts
            return entries
        # of several records of one job the last one counts; one that never began is an allocation
        for entry in read_sacct(accounts):
            if entry.job_id in gone and entry.name in (jobs[entry.job_id], "allocation"):
                entries[entry.job_id] = entry
    return entries


def read_squeue(text: str) -> list[Entry]:
    """The jobs that squeue printed, in `_FIELDS`."""
    entries = []
    for line in text.splitlines():
        values = line.strip().rstrip("|").split("|")
        if len(values) != len(_FIELDS):
            continue
        job, state, reason, start, elapsed, restarts, status, name = values
        entries.append(
            Entry(
                job,
                name,
                state,
                "" if reason in ("None", "N/A") else reason,
                _known(start),
                elapsed,
                _number(restarts),
                _of_wait(_number(status)),
            )
        )
    return entries


def read_sacct(text: str) -> list[Entry]:
    """The jobs that sacct printed, oldest first: the six columns that `ask` asks for."""
    entries = []
    for line in text.splitlines():
        values = line.split("|")
        if len(values) != 6:
            continue
        job, state, code, start, elapsed, name = values
        status, _, signal = code.partition(":")
        code = "" if status == "0" else status
        if signal not in ("", "0"):
            code = f"signal {signal}"
        entries.append(
            Entry(
                job,
                name,
                (state.split() or [""])[0],
                "",
                _known(start),
                elapsed,
                0,
                code,
                in_queue=False,
            )
        )
    return entries


def cancel(job_ids: Iterable[str]) -> None:
    """scancel them."""
    _run("scancel", *job_ids)


def alive(submission: Submission) -> bool:
    """Whether a job that was started on this machine still runs."""
    number = int(submission.job_id) if submission.job_id.isdigit() else 0
    try:
        # a child of this process that has ended
        if number <= 0 or os.waitpid(number, os.WNOHANG)[0] == number:
            return False
    except (ChildProcessError, AttributeError):
        # another's child; Windows
        pass
    try:
        os.kill(number, 0)
        command = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
        if not command:
            # it is dead and not waited for yet, or just being started
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            return state not in "ZX"
    except PermissionError:
        return True
    except FileNotFoundError:  # no such view of processes here
        return not Path("/proc/self").exists()
    except OSError:
        return False
    # else the number has gone to another process
    return submission.folder in command


def _of_wait(status: int) -> str:
    if status & 127:
        return f"signal {status & 127}"
    return str(status >> 8) if status >> 8 else ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _known(time: str) -> str:
    return "" if time in ("N/A", "Unknown", "None", "") else time


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]} cannot be asked: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise NoAnswer(
            f"{command[0]} failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
        )
    return done.stdout
