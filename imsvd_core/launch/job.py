"""A command as a cluster's job: stopped it saves and is queued again, killed it is resumed,
superseded it is fenced off.

submitit → Job() → imsvd_core.cli.run(argv) → Trainer     on every rank
            └─ SIGUSR2, SIGTERM → stop_requested() ─┘     the ranks agree at a step's end, rank 0
                                                          saves, all leave, and rank 0 asks Slurm
                                                          to queue the job again
"""

import faulthandler
import logging
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import submitit

from imsvd_core.system import signals
from imsvd_core.system.run_folder import ATTEMPT

COMMAND = "imsvd_core.cli:run"  #: what a job calls, with its command line
#: Seconds after which a rank that hangs while it leaves is ended, with a trace of where it hung.
LINGER = 30.0

log = logging.getLogger(__name__)


class Job:
    """What submitit calls on every rank: an `imsvd` command that goes on, as often as the
    cluster takes its nodes away.

    It answers signals in place of submitit's handler, which would save and requeue from
    within a step, on rank 0 alone.

    Args:
        argv: the command line, ["pretrain", "cifar10", …]; all state is in its folder.
        max_requeues: attempts after the first.
    """

    def __init__(self, argv: Sequence[str], max_requeues: int = 1000):
        self.argv = list(argv)
        self.max_requeues = max_requeues
        self.submitted = datetime.now(UTC).isoformat(timespec="microseconds")

    def __call__(self) -> None:
        environment = submitit.JobEnvironment()
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        os.environ[ATTEMPT] = f"{self.submitted}#{attempt:06d}"
        if environment.cluster != "debug":  # which shares this process with others
            sys.argv = ["imsvd", *self.argv]  # what results name as their command
            _forget_earlier_attempt(environment)
        form = "%(asctime)s %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, force=True)
        if environment.global_rank == 0:
            log.info(
                "attempt %d of job %s: imsvd %s", attempt, environment.job_id, " ".join(self.argv)
            )
        with signals.handle_stop_signals(override=True):
            try:
                pkgutil.resolve_name(COMMAND)(self.argv)
            except signals.Stopped as stopped:
                self._leave(environment, attempt, str(stopped))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same again, should submitit ask: everything is in the run's folder."""
        return submitit.helpers.DelayedSubmission(self)

    def _leave(self, environment: submitit.JobEnvironment, attempt: int, why: str) -> None:
        """End this rank, all else being saved; rank 0 has the job queued again if it is
        still this attempt's."""
        if environment.global_rank > 0:
            faulthandler.dump_traceback_later(LINGER, exit=True)
            raise SystemExit(0)  # else srun would kill rank 0, which has yet to ask
        log.info("%s", why)
        if environment.cluster == "local":
            if signals.stop_requested() == signal.SIGUSR2:
                environment._requeue(0)  # exits with what the local controller knows
        elif environment.cluster == "slurm" and _is_running(environment.job_id, attempt):
            if attempt >= self.max_requeues:
                log.error(
                    "not queued again: max_requeues=%d attempts have been made; "
                    "launch it anew to go on",
                    self.max_requeues,
                )
            else:
                _requeue(environment, self.max_requeues - attempt)
        faulthandler.dump_traceback_later(LINGER, exit=True)
        raise SystemExit(signals.STOPPED)


def _forget_earlier_attempt(environment: submitit.JobEnvironment) -> None:
    """Remove the outcome that an earlier attempt of this job left: it was not the last, and
    half-written it would stop submitit from writing a new one."""
    result = environment.paths.result_pickle
    for left_over in (result, result.with_suffix(".pkl.save_tmp")):
        left_over.unlink(missing_ok=True)


def _is_running(job: str, attempt: int) -> bool:
    """Whether Slurm counts this attempt as running: neither cancelled, nor lost and started again.

    True where Slurm does not answer: without a requeue the job would lose its place.
    """
    try:
        answer = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("scontrol does not tell how the job stands: %s", error)
        return True
    facts = dict(re.findall(r"(JobState|Restarts)=(\w+)", answer))
    log.info("Slurm says: %s", facts)
    return facts.get("JobState") == "RUNNING" and int(facts.get("Restarts", attempt)) == attempt


def _requeue(environment: submitit.JobEnvironment, left: int) -> None:
    """Ask for the job to be queued again, several times where the controller does not answer."""
    for pause in (1, 3, 9, 0):
        try:
            environment._requeue(left)  # scontrol requeue
            return
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("scontrol requeue failed: %s", error)
            time.sleep(pause)
    log.error("the job could not be queued again; all is saved: launch it anew to go on")
