"""The ranks of one job: how they find each other, and end together."""

import hashlib
import logging
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from imsvd_core.distributed import world
from imsvd_core.system.faults import Fault
from imsvd_core.system.run_folder import ATTEMPT
from imsvd_core.system.signals import orphaned

#: How long ranks that have met wait for one of them, which may be evaluating.
GROUP_TIMEOUT = timedelta(hours=2)
#: How long they wait for each other at the start; in a job, whose nodes may start unequally, and
#: that Slurm ends if a rank dies.
MEETING, MEETING_IN_JOB = timedelta(minutes=1), timedelta(minutes=10)

PLACE = "RANK", "MASTER_ADDR", "MASTER_PORT"
log = logging.getLogger(__name__)
T = TypeVar("T")
_launcher: int | None = None  # the process that started this one as a rank


def launcher_is_gone() -> bool:
    """Whether this is a rank whose launcher has died: it is to save and end by itself."""
    return _launcher is not None and orphaned(_launcher)


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the ranks that torchrun, or a Slurm or submitit job, has started; alone, do nothing.

    NCCL where `device` is or may be CUDA, each rank on the GPU that its LOCAL_RANK counts; gloo
    elsewhere. An error leaves the group open, since closing it would wait for the other ranks: the
    error ends this process, and its launcher or the broken connection then ends them.
    Raises ValueError if a node has fewer GPUs than ranks, and Fault, naming the ranks that are
    missing, if they do not meet within a minute.
    """
    tasks = os.environ.get("SUBMITIT_LOCAL_NTASKS") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if "WORLD_SIZE" not in os.environ and int(tasks) > 1:
        _find_ranks_of_job()
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    global _launcher
    _launcher = os.getppid()
    gpu = None
    if torch.cuda.is_available() and device.startswith(("auto", "cuda")):
        number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(
                f"LOCAL_RANK={number} has no GPU of its own among {gpus}: "
                "start as many ranks as GPUs, or use device='cpu'"
            )
        gpu = torch.device("cuda", number)
        torch.cuda.set_device(gpu)
    if lacking := [name for name in PLACE if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, and {', '.join(lacking)} not: "
            "unset it, or start the ranks with torchrun or srun"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=_meet(rank, size),
        rank=rank,
        world_size=size,
        timeout=GROUP_TIMEOUT,
        device_id=gpu,
    )
    yield
    dist.destroy_process_group()
    _launcher = None


def _meet(rank: int, size: int) -> dist.Store:
    """What the ranks agree over, once all are there."""
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's own process keeps it, over all of its restarts
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    keeper = _wait(
        lambda pause: dist.TCPStore(place, port, size, keeps, pause, wait_for_workers=False),
        lambda: f"rank {rank} waits for rank 0 at {place}:{port}",
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"imsvd/{attempt}", keeper)
    names = [f"rank {number}" for number in range(size)]
    store.set(names[rank], socket.gethostname())

    def missing() -> str:
        absent = [name for name in names if not store.check([name])]
        return f"rank {rank} of {size}, at {place}:{port}, waits for {', '.join(absent)}"

    _wait(lambda pause: store.wait(names, pause), missing)
    keeper.set_timeout(GROUP_TIMEOUT)
    return store


def _wait(meet: Callable[[timedelta], T], whom: Callable[[], str]) -> T:
    """What `meet`, given a time to wait, returns; says soon for whom it waits, and at last raises
    Fault."""
    whole = MEETING_IN_JOB if ATTEMPT in os.environ else MEETING
    soon, words = min(whole / 2, timedelta(seconds=5)), ""
    for pause in (soon, whole - soon):
        try:
            return meet(pause)
        except dist.DistError:
            log.warning("%s", words := whom())
    raise Fault(
        f"{words}, after {whole.seconds} s: start all ranks (srun and torchrun do; in a shell of "
        "srun --pty nobody does), or this process alone: SLURM_STEP_NUM_TASKS=1, and no WORLD_SIZE"
    )


def _find_ranks_of_job() -> None:
    """Export what torch wants to know of the ranks that one Slurm or submitit job has started.

    The port where they meet is the job's own, and a requeued job has another one: an attempt whose
    node was thought dead may still listen at the first. It lies below those that Linux assigns.
    Raises ValueError if the first node's name cannot be resolved, where torch would wait long.
    """
    from submitit.helpers import TorchDistributedEnvironment  # slow to import

    if "SLURM_JOB_ID" in os.environ and "SUBMITIT_LOCAL_JOB_ID" not in os.environ:
        os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")  # plain srun does not say so
    environment = TorchDistributedEnvironment()
    jobs = "SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"
    attempt = "/".join(os.environ.get(name, "0") for name in jobs)
    environment.master_port = int(
        os.environ.get("MASTER_PORT", 15_000 + zlib.crc32(attempt.encode()) % 15_000)
    )
    try:
        socket.getaddrinfo(environment.master_addr, environment.master_port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={environment.master_addr!r}, the job's first node, has no address on "
            f"{socket.gethostname()} ({error}): enter the nodes' names in DNS or /etc/hosts"
        ) from None
    environment.export(set_cuda_visible_devices=False, overwrite=True)


def first_to_say(message: str) -> bool:
    """Whether no other rank has asked this before: what all ranks find, one reports."""
    if world()[1] == 1:
        return True
    key = hashlib.sha256(message.encode()).hexdigest()
    try:
        return dist.distributed_c10d._get_default_store().add(f"said/{key}", 1) == 1
    except RuntimeError:  # the rank that keeps the count is gone, and has said why
        return False
