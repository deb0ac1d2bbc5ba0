"""From a command to a job in the queue, with the code as it is now."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

import imsvd_core
from imsvd_core.launch.job import Job
from imsvd_core.results import code_version, write_json
from imsvd_core.system.cluster import LaunchConfig
from imsvd_core.system.config import from_plain

#: Environment variables that a job needs, whatever the cluster exports. Data set and scale stand in
#: its command.
KEPT = ("IMSVD_DATA",)
#: What Slurm and submitit replace in the names of logs, and what ends an entry of PYTHONPATH.
REPLACED = "%\\:\n"
#: sbatch's word for a limit that other jobs make room under when they end.
ROOM = r"\w*Submit\w*Limit|\w*MaxJobCount\w*|temporarily unavailable"
#: Options that the environment (SBATCH_ACCOUNT, say) may give where the script does not.
DEFAULTS = ("account", "partition", "qos", "constraint", "reservation", "clusters")


class NoRoom(ValueError):
    """As many jobs are queued as may be."""


@dataclass(frozen=True)
class Submission:
    """A job that was sent, as submission.json keeps it."""

    name: str
    #: The `imsvd` command.
    argv: tuple[str, ...]
    job_id: str
    executor: str
    #: Of its logs, `{job_id}_{rank}_log.out` and `.err`.
    folder: str
    tasks: int
    #: UTC, ISO 8601.
    submitted: str
    #: Only where it was sent.
    job: submitit.Job | None = field(default=None, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path | str) -> "Submission | None":
        """The last one of `folder`; None if there is none."""
        path = Path(folder) / "submission.json"
        try:
            return from_plain(cls, json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not a submission: remove it") from error

    def write(self) -> None:
        """Keep it in its folder, in place of an earlier one."""
        fields = {key: value for key, value in vars(self).items() if key != "job"}
        write_json(Path(self.folder) / "submission.json", fields)


def submit(
    argv: Sequence[str],
    *,
    name: str,
    folder: Path,
    config: LaunchConfig,
    code: Path,
    after: Sequence[str] = (),
) -> Submission:
    """Send `imsvd argv` as the job `name`.

    Args:
        folder: of logs, and of submission.json, which is written as soon as the job has its number.
        code: what `snapshot` returned.
        after: numbers of Slurm jobs that have to end well before; if one does not, this one is
            taken out of the queue.

    Raises ValueError with what sbatch says, where it refuses, NoRoom if for the number of jobs; and
    for a folder whose name would be read as a pattern.
    """
    folder = folder.absolute()
    if reason := unusable(folder):
        raise ValueError(reason)
    # squeue takes a comma for two names
    name = re.sub(r"[^\w.@/+-]", "_", name)
    job, local = Job(argv, config.max_requeues), config.executor == "local"
    try:
        with (
            _outside_any_job(config),
            submitit.helpers.environment_variables(**_environment(config, code) if local else {}),
            _in_background(folder) if local else nullcontext(),
        ):
            sent = _executor(config, name, folder, code, after).submit(job)
    except submitit.core.utils.FailedJobError as error:
        words = str(error).strip()
        if limit := re.search(ROOM, words):
            how = "call again when jobs have ended"
            raise NoRoom(f"the queue has no room ({limit[0]}): {how}") from None
        raise ValueError(f"sbatch refused {name}: {words}") from None
    facts = (name, tuple(argv), sent.job_id, config.executor, str(folder), config.ranks)
    submission = Submission(*facts, job.submitted, sent)
    submission.write()
    return submission


def batch_script(
    name: str, folder: Path, config: LaunchConfig, code: Path, after: Sequence[str] = ()
) -> str:
    """What `submit` would hand to sbatch; needs no Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = folder.absolute()
    if reason := unusable(folder):
        raise ValueError(reason)
    command = f"{_python(code)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command, folder, **_slurm_parameters(config, name, code, after))


def unusable(folder: Path) -> str:
    """Why Slurm would not take the name of a run's folder literally; "" if it does."""
    for mark in REPLACED:
        if mark in str(folder):
            return (
                f"run_dir={str(folder)!r} holds {mark!r}, which Slurm or Python would not take "
                "literally: give another folder"
            )
    return ""


def snapshot(folder: Path) -> Path:
    """Copy the package, as it is now, below `folder`; returns what is to stand in PYTHONPATH.

    A job that starts, or starts again, next week then runs what was submitted. The same code is
    copied once.
    """
    package = Path(imsvd_core.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    home = folder.absolute() / digest.hexdigest()[:12]
    mark = home / package.name / "COMMIT"
    if not mark.exists():
        unneeded = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, mark.parent, ignore=unneeded, dirs_exist_ok=True)
        mark.write_text(code_version())  # the last: now the copy is whole
    return home


@contextmanager
def _outside_any_job(config: LaunchConfig) -> Iterator[None]:
    """Hide the job that we may be in ourselves, and options of sbatch, which would overrule the
    script; but neither where the cluster is, nor what is the user's where the script is silent."""
    said = vars(config) | config.options
    left_open = [name for name in DEFAULTS if said.get(name) is None]
    names = ["SLURM_CONF", *(f"SBATCH_{name.upper()}" for name in left_open)]
    where = {name: os.environ[name] for name in names if name in os.environ}
    with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**where):
        yield


@contextmanager
def _in_background(folder: Path) -> Iterator[None]:
    """Let a process that is started here outlive our terminal and our pipes.

    It writes to a log, and gets no signal when they end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        nothing = stack.enter_context(open(os.devnull))
        log = stack.enter_context(open(folder / "controller.log", "a"))
        for stream, target in enumerate((nothing, log, log)):
            own = os.dup(stream)
            stack.callback(os.close, own)
            stack.callback(os.dup2, own, stream)
            os.dup2(target.fileno(), stream)
        yield


def _executor(
    config: LaunchConfig, name: str, folder: Path, code: Path, after: Sequence[str]
) -> submitit.Executor:
    if config.executor == "debug":
        return submitit.DebugExecutor(folder)
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError(
            "executor='slurm' needs sbatch, which is not here: run this on a login node of the "
            "cluster, or choose executor='local'"
        )
    kind = submitit.SlurmExecutor if config.executor == "slurm" else submitit.LocalExecutor
    executor = kind(folder, max_num_timeout=config.max_requeues, python=_python(code))
    if config.executor == "slurm":
        executor.update_parameters(**_slurm_parameters(config, name, code, after))
        return executor
    executor.update_parameters(
        tasks_per_node=config.ranks_per_node,
        gpus_per_node=config.gpus_per_node,
        timeout_min=config.minutes,
        signal_delay_s=config.grace_seconds,
        # submitit waits for the shell that runs the set-up, and bash would replace itself by the
        # last command
        setup=["trap : EXIT", *config.setup] if config.setup else [],
    )
    return executor


def _environment(config: LaunchConfig, code: Path) -> dict[str, str]:
    """What a local job inherits; a cluster's has it from its script."""
    path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{code}{os.pathsep}{path}" if path else str(code),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(config.cpus_per_task or 1),
    }


def _slurm_parameters(
    config: LaunchConfig, name: str, code: Path, after: Sequence[str]
) -> dict[str, Any]:
    """What submitit writes into the batch script; it leaves out what is None."""
    kept = [f"export {name}={shlex.quote(os.environ[name])}" for name in KEPT if name in os.environ]
    # queued again also where the cluster's default is not to
    options: dict[str, Any] = {"requeue": True, **config.options}
    if after:
        options |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"}
    same = ("nodes", "cpus_per_task", "partition", "account", "qos", "constraint", "exclude")
    return {
        "job_name": name,
        **{key: getattr(config, key) for key in same},
        "ntasks_per_node": config.ranks_per_node,
        "gpus_per_node": config.gpus_per_node or None,
        "mem": config.mem_gb and f"{round(1024 * config.mem_gb)}MB",
        "time": config.minutes,
        "signal_delay_s": config.grace_seconds,
        "additional_parameters": options,
        "wckey": None,  # submitit's own may be unknown
        "srun_args": ["--kill-on-bad-exit=1"],  # no rank outlives one that failed
        "setup": [
            *config.setup,
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export SLURM_EXPORT_ENV=ALL",  # to srun, whatever was exported to the script
            "export PYTHONSAFEPATH=1",  # the folder that we are in may hold another version
            *kept,
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
            # srun does not inherit it
            '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        ],
    }


def _python(code: Path) -> str:
    """This Python behind the shield: a signal to stop that comes while it still imports waits."""
    shield = code / "imsvd_core" / "launch" / "shield.py"
    return shlex.join([sys.executable, "-IS", str(shield), sys.executable])
