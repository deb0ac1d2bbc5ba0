"""What Slurm says of jobs: one squeue and, for those that have left the queue, one sacct for all of
them. And of a job on this machine, whether it lives."""

import contextlib
import os
import subprocess
from collections.abc import Collection, Mapping
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
#: The same facts under squeue's names and sacct's; the accounts lack the last two.
_SQUEUE = ("JobID", "Name", "State", "StartTime", "TimeUsed", "exit_code", "Reason", "RestartCnt")
_SACCT = ("JobIDRaw", "JobName", "State", "Start", "Elapsed", "ExitCode")


@dataclass(frozen=True)
class Entry:
    """A job as Slurm sees it now."""

    job_id: str
    name: str
    #: Slurm's own word, such as RUNNING.
    state: str
    #: When it started or is expected to; "" if unknown.
    start: str = ""
    #: Of the current attempt, as Slurm prints it.
    elapsed: str = ""
    #: Minus the number of the signal that ended it, if one did.
    exit_code: int = 0
    #: Why it is pending, in Slurm's own word.
    reason: str = ""
    restarts: int = 0
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
    every_name = sorted({*names, *jobs.values()})
    if not every_name:
        return {}
    form = ",".join(f"{field}:|" for field in _SQUEUE)
    names_only = f"--name={','.join(every_name)}"
    listed = _run("squeue", "--noheader", "--states=all", names_only, f"--Format={form}")
    entries = {entry.job_id: entry for entry in read(listed, in_queue=True)}
    gone = sorted(jobs.keys() - entries.keys())
    accounts = ""
    if gone:
        form, jobs_only = ",".join(_SACCT), f"--jobs={','.join(gone)}"
        with contextlib.suppress(NoAnswer):  # many clusters keep no accounts
            accounts = _run("sacct", "-n", "--allocations", jobs_only, "-P", f"--format={form}")
    # of several records of one job the last one counts; one that never began is an allocation
    for entry in read(accounts, in_queue=False):
        if entry.name in (jobs[entry.job_id], "allocation"):
            entries[entry.job_id] = entry
    return entries


def read(text: str, *, in_queue: bool) -> list[Entry]:
    """The jobs that squeue (`in_queue`) or else sacct printed, with the fields that `ask` wants."""
    fields = _SQUEUE if in_queue else _SACCT
    entries = []
    for line in text.splitlines():
        values = [_known(value) for value in line.strip().removesuffix("|").split("|")]
        if len(values) == len(fields):
            job, name, state, start, elapsed, status, *waiting = values
            reason, restarts = waiting or ("", "0")
            start, state = start.replace("T", " "), state.partition(" ")[0]
            facts = (start, elapsed, _exit_code(status), reason, int(restarts))
            entries.append(Entry(job, name, state, *facts, in_queue))
    return entries


def cancel(job_id: str) -> None:
    """Take a job out of the queue."""
    _run("scancel", job_id)


def alive(submission: Submission) -> bool:
    """Whether a job that was started on this machine still runs."""
    if not submission.job_id.isdigit():
        return False
    number = int(submission.job_id)
    with contextlib.suppress(ChildProcessError):  # another's child
        if os.waitpid(number, os.WNOHANG)[0]:
            return False
    process = Path("/proc", submission.job_id)
    try:
        if not process.parent.exists():  # no such view of processes here
            os.kill(number, 0)
            return True
        command = (process / "cmdline").read_bytes().decode(errors="replace")
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # one that is being started has no command yet; else the number has gone to another process
    return state not in "ZX" and (not command or submission.folder in command)


def _known(value: str) -> str:
    return "" if value in ("N/A", "Unknown", "None") else value


def _exit_code(status: str) -> int:
    """Of a status as wait gives it, 512, or as the accounts print it, 2:0."""
    code, signal = map(int, status.split(":")) if ":" in status else divmod(int(status), 256)
    return -(signal & 127) or code


def _run(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SLURM_TIMEOUT, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        raise NoAnswer(f"{command[0]} failed: {error.stderr.strip() or error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]} cannot be asked: {error}") from error
