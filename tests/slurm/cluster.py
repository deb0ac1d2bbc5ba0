"""A real Slurm of two nodes on this machine: munge, MariaDB, slurmdbd, slurmctld, and a slurmd on
each of n1 and n2.

A node is a PID, UTS and mount namespace: it has its own host name and its own processes, and when
its first process is killed the kernel kills all others, as when a machine loses power. Everything
listens on loopback, on ports that were free, and keeps its files in one scratch folder, so that
several clusters may run side by side. All of it ends with the process that started it, however that
ends.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = (
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "munged",
    "mariadbd",
    "mariadb-install-db",
    "sbatch",
    "unshare",
    "nsenter",
    "setpriv",
)
ENDS = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
TIED = ("setpriv", "--pdeathsig", "KILL")  # ends with the process that started it
INIT = """
mount --bind "$1" /etc/hosts && hostname "$2" && touch "$3" || exit 1
while :; do sleep 1; done  # and reap whoever was left an orphan
"""
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root, to give each node its name"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge slurmdbd mariadb-server"
    tried = subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces for the nodes: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """Two nodes under Slurm; use it as a context. `env` is what a process needs in order to speak
    to it.

    Partition `main` is the default and gives way: a job in `high` preempts it, after 20 s of grace;
    it is requeued. A requeue takes about 6 s, to give up a dead node about 15.

    Args:
        folder: scratch folder, new or empty; its logs stay when the cluster is gone.
        cpus: processors that each node claims to have.
    """

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder = folder.resolve()
        ports = dict(
            zip(("controller", "database", *NODES), _free_ports(2 + len(NODES)), strict=True)
        )
        self._values = {"folder": self.folder, "cpus": cpus, **ports}
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))
        }
        self.env |= {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": PATH,
            "MYSQL_UNIX_PORT": str(self.folder / "db.socket"),
        }
        self._stack = ExitStack()  # of what is to be ended, the latest first
        self._machines: dict[
            str, int
        ] = {}  # of each node, the first process, as this machine counts

    # start and end

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.empty()
        finally:
            self._stack.close()

    def _start(self) -> None:
        folder, database = self.folder, self.folder / "db"
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        for name in ("slurm.conf", "slurmdbd.conf"):
            text = (Path(__file__).parent / name).read_text()
            for key, value in self._values.items():
                text = text.replace(f"@{key}@", str(value))
            (folder / name).write_text(text)
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "hosts").write_text(
            f"127.0.0.1 localhost {socket.gethostname()}\n127.0.0.1 {' '.join(NODES)}\n"
        )
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(1024))

        self._daemon(
            "munged",
            "--foreground",
            "--force",
            "--num-threads=2",
            *(
                f"--{option}={folder}/munge{suffix}"
                for option, suffix in (
                    ("key-file", ".key"),
                    ("socket", ".socket"),
                    ("pid-file", ".pid"),
                    ("log-file", ".log"),
                    ("seed-file", ".seed"),
                )
            ),
        )
        self._stack.callback(shutil.rmtree, database, ignore_errors=True)  # a hundred megabytes
        self.run(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={database}",
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )
        self._daemon(
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={database}",
            "--skip-networking",
            f"--socket={folder}/db.socket",
            f"--pid-file={folder}/db.pid",
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
        )
        self._until(
            "MariaDB answers",
            lambda: self._works(
                "mariadb",
                "--no-defaults",
                "-uroot",
                f"--socket={folder}/db.socket",
                "-e",
                "create database slurm_acct",
            ),
        )
        self._daemon("slurmdbd", "-D", SLURM_CONF=str(folder / "slurmdbd.conf"))
        self._until(
            "slurmdbd answers",
            lambda: self._works("sacctmgr", "-i", "-Q", "add", "cluster", "book"),
        )
        self._daemon("slurmctld", "-D", "-f", self.env["SLURM_CONF"], "-c")
        for node in NODES:
            self.start_node(node)

    def _daemon(self, *command: str, **environment: str) -> int:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            process = subprocess.Popen(
                [*TIED, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**self.env, **environment},
                start_new_session=True,
            )
        self._stack.callback(_end, process)
        return process.pid

    # nodes

    def start_node(self, node: str) -> None:
        """Start a node that was killed, or the slurmd of one that lives without; wait until Slurm
        can use it."""
        if node not in self._machines:
            up = self.folder / f"{node}.up"
            up.unlink(missing_ok=True)
            shell = self._daemon(
                "unshare",
                "--uts",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                INIT,
                "sh",
                str(self.folder / "hosts"),
                node,
                str(up),
            )
            self._until(f"{node} has started", up.exists)
            self._machines[node] = next(
                process.pid for process in _processes() if process.parent == shell
            )
        self._daemon(
            "nsenter",
            f"--target={self._machines[node]}",
            "--uts",
            "--mount",
            "--pid",
            "slurmd",
            "-D",
            "-f",
            self.env["SLURM_CONF"],
            "-N",
            node,
        )
        self._until(
            f"{node} is idle",
            lambda: self.run("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T").strip() == "idle",
        )

    def kill_node(self, node: str) -> None:
        """Kill everything that runs on a node at one blow: slurmd, slurmstepd, ranks."""
        os.kill(self._machines.pop(node), signal.SIGKILL)

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's slurmd alone; what it had started lives on."""
        os.kill(
            next(process.pid for process in self._on(node) if process.name == "slurmd"),
            signal.SIGKILL,
        )

    def processes(self, node: str) -> list[str]:
        """The command lines of what jobs have running on a node, slurmstepd included."""
        init = self._machines.get(node)
        return [
            process.command
            for process in self._on(node)
            if process.name != "slurmd"
            and init != process.pid
            and not (process.parent == init and process.name == "sleep")
        ]

    def _on(self, node: str) -> list["Process"]:
        if node not in self._machines:
            return []
        space = os.readlink(f"/proc/{self._machines[node]}/ns/pid")
        return [process for process in _processes() if process.space == space]

    # jobs

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """What a command says on its standard output. Raises RuntimeError with its complaint if it
        fails."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, **options
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}: "
                f"{done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Send a shell script as a job; returns its id."""
        output = (
            ()
            if any(option.startswith("--output") for option in options)
            else (f"--output={self.folder}/job-%j.out",)
        )
        return (
            self.run("sbatch", "--parsable", *output, *options, input=f"#!/bin/sh\n{script}\n")
            .strip()
            .split(";")[0]
        )

    def scancel(self, *options: str) -> None:
        self.run("scancel", *options)

    def squeue(self) -> dict[str, str]:
        """State of every job that has not ended, by id."""
        return dict(line.split() for line in self.run("squeue", "-h", "-o", "%A %T").splitlines())

    def sacct(self, job: str) -> list[dict[str, str]]:
        """The accounts' record of a job, one for every attempt, oldest first."""
        fields = ("JobID", "State", "ExitCode", "Submit", "Start", "End", "NodeList")
        told = self.run("sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", ",".join(fields))
        return [dict(zip(fields, line.split("|"), strict=True)) for line in told.splitlines()]

    def job(self, job: str) -> dict[str, str]:
        """All that the controller knows of a job: JobState, Restarts, Reason, StartTime, ..."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, job: str, states: str | tuple[str, ...] = ENDS, timeout: float = 60) -> str:
        """Wait until a job is in one of `states`; returns that. Raises TimeoutError telling all
        about the job."""
        wanted = (states,) if isinstance(states, str) else states
        self._until(
            f"job {job} is {' or '.join(wanted)}",
            lambda: self.state(job) in wanted,
            timeout,
            lambda: self.job(job),
        )
        return self.state(job)

    def settings(self, *names: str) -> dict[str, str]:
        """What the controller goes by."""
        told = (line.partition("=") for line in self.run("scontrol", "show", "config").splitlines())
        return {name.strip(): value.strip() for name, _, value in told if name.strip() in names}

    def empty(self) -> None:
        """End all jobs, the unwilling ones by force, and wait until nothing of them is left."""
        user = f"--user={os.geteuid()}"
        self.run("scancel", user, check=False)
        with suppress(TimeoutError):
            self._until("the queue is empty", lambda: not self.squeue(), 5)
            return
        self.run("scancel", "--full", "--signal=KILL", user, check=False)
        self._until("the queue is empty", lambda: not self.squeue(), 30, self.squeue)

    def _works(self, *command: str) -> bool:
        return (
            subprocess.run(command, env=self.env, capture_output=True, timeout=60).returncode == 0
        )

    def _until(
        self,
        what: str,
        happened: Callable[[], bool],
        timeout: float = 60,
        about: Callable[[], object] | None = None,
    ) -> None:
        end = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"not within {timeout:g} s: {what}; "
                    f"{about() if about else 'the logs'} in {self.folder}"
                )
            time.sleep(0.1)


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    name: str
    command: str
    space: str  #: its PID namespace


def _processes() -> Iterator[Process]:
    """All processes of this machine, as it counts them; the dead that nobody has asked after yet
    are left out."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            status = dict(
                line.split(":", 1)
                for line in (folder / "status").read_text().splitlines()
                if ":" in line
            )
            command = (
                (folder / "cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
            if command:
                yield Process(
                    int(folder.name),
                    int(status["PPid"]),
                    status["Name"].strip(),
                    command,
                    os.readlink(folder / "ns" / "pid"),
                )


def _end(process: subprocess.Popen) -> None:
    """By force: what the daemons would save is thrown away."""
    process.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
