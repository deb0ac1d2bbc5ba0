"""Ranks of one training: how they find each other, who holds which samples, and how tables change hands.

Without a process group everything here is the identity, so that the code that uses it is the same on one process.
"""

import functools
import hashlib
import itertools
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) outside a process group."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


PATIENCE = timedelta(hours=2)  #: how long ranks wait for one of them, which may be evaluating
P, T = ParamSpec("P"), TypeVar("T")


_launcher: int | None = None  # the process that started this one as a rank


def launcher_is_gone() -> bool:
    """Whether this is a rank whose launcher has died: nobody would restart it, or end it with the others."""
    return _launcher is not None and os.getppid() != _launcher


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the ranks that torchrun, or a Slurm or submitit job of several tasks, has started; alone, do nothing.

    NCCL where `device` is or may be CUDA, each rank on the GPU that its LOCAL_RANK counts; gloo elsewhere.
    An error leaves the group standing, since to close it would be to wait for the others: the error is to end
    this process, and its launcher or the broken connection then ends them.
    Raises ValueError if a node has fewer GPUs than ranks.
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
        number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= there:
            raise ValueError(
                f"LOCAL_RANK={number} has no GPU of its own among {there}: "
                "start as many ranks as GPUs, or use device='cpu'"
            )
        gpu = torch.device("cuda", number)
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE, device_id=gpu)
    yield
    dist.destroy_process_group()
    _launcher = None


def _find_ranks_of_job() -> None:
    """Export what torch wants to know of the ranks that one Slurm or submitit job has started.

    The port where they meet is the job's own, and a requeued job's is another one: an attempt whose node was thought
    dead may still listen at the first. It lies below those that Linux hands out. Raises ValueError if the first
    node's name means nothing here, where torch would wait for its time-out.
    """
    from submitit.helpers import TorchDistributedEnvironment  # slow to import

    if "SLURM_JOB_ID" in os.environ and "SUBMITIT_LOCAL_JOB_ID" not in os.environ:
        os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")  # plain srun does not say so
    there = TorchDistributedEnvironment()
    parts = (os.environ.get(name, "0") for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    attempt = "/".join(
        [os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "0"), *parts]
    )
    there.master_port = int(
        os.environ.get("MASTER_PORT", 15_000 + zlib.crc32(attempt.encode()) % 15_000)
    )
    try:
        socket.getaddrinfo(there.master_addr, there.master_port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={there.master_addr!r}, the job's first node, has no address on {socket.gethostname()} "
            f"({error}): let the nodes know each other's names, in DNS or /etc/hosts"
        ) from None
    there.export(set_cuda_visible_devices=False)


def on_rank_0(work: Callable[P, T]) -> Callable[P, T]:
    """Let rank 0 do `work` while the others wait; what it returns or raises there, it returns or raises on all."""

    @functools.wraps(work)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        rank, size = world()
        if size == 1:
            return work(*args, **kwargs)
        result, error = None, None
        if rank == 0:
            try:
                result = work(*args, **kwargs)
            except Exception as raised:
                error = raised
        heard = [result, error]
        dist.broadcast_object_list(heard)
        if error or heard[1]:
            raise error or heard[1]
        return heard[0]

    return told


def rank_0_first(work: Callable[[], T]) -> T:
    """Let rank 0 do `work`, then every other rank: what the first fetches, the others find."""
    mine: list[T] = []
    on_rank_0(lambda: mine.append(work()))()
    return mine[0] if mine else work()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's `value`, on all of them."""
    size = world()[1]
    if size > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= size
    return value


def first_to_say(message: str) -> bool:
    """Whether no other rank has asked this before: what all ranks find, one reports."""
    if world()[1] == 1:
        return True
    key = hashlib.sha256(message.encode()).hexdigest()
    try:
        return dist.distributed_c10d._get_default_store().add(f"said/{key}", 1) == 1
    except RuntimeError:  # the rank that keeps the count is gone, and has said why
        return False


def of_first_rank(value: Tensor) -> Tensor:
    """What rank 0 gave, on every rank; in place."""
    if world()[1] > 1:
        dist.broadcast(value, 0)
    return value


def refuse_unlike(device: torch.device, facts: dict[str, int]) -> None:
    """Raise ValueError, on every rank, unless all ranks bring the same `facts`. Costs one small exchange."""
    size = world()[1]
    if size == 1:
        return
    mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
    everyones = mine.new_empty(size * len(facts))
    dist.all_gather_into_tensor(everyones, mine)
    for name, values in zip(facts, everyones.view(size, -1).T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks differ in {name}, {values}: all need the same "
                "(so drop an incomplete last batch)"
            )


class Exchange:
    """Tables (N, D) whose samples are spread over ranks, n to each, and whose columns each rank may own a share of.

    Args:
        table: this rank's rows of such a table, (n, D).
        columns: how many columns the ranks share out, D by default.
        active: whether to look beyond this process at all.
    """

    def __init__(self, table: Tensor, columns: int | None = None, active: bool = True):
        self.rank, self.size = world() if active else (0, 1)
        self.rows, dim = len(table), table.shape[1] if columns is None else columns
        edges = [round(dim * rank / self.size) for rank in range(self.size + 1)]
        self.widths = [right - left for left, right in itertools.pairwise(edges)]
        self.own = range(edges[self.rank], edges[self.rank + 1])  #: the columns that this rank owns
        self.samples = self.rows * self.size  #: N, over all ranks

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, on all of them; in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, table: Tensor) -> Tensor:
        """(n, D) → (N, D): the rows of all ranks, in their order."""
        if self.size == 1:
            return table
        everything = table.new_empty(self.samples, table.shape[1])
        dist.all_gather_into_tensor(everything, table.contiguous())
        return everything

    def scatter_sum(self, table: Tensor) -> Tensor:
        """(N, D), one on each rank → (n, D): this rank's rows of their sum."""
        if self.size == 1:
            return table
        parts = table.new_empty(self.size, self.rows, table.shape[1])
        # gloo's reduce-scatter would send a third more
        dist.all_to_all_single(parts.view_as(table), table.contiguous())
        return parts.sum(0)

    def to_columns(self, table: Tensor) -> Tensor:
        """(n, D) → (N, own): all samples, the columns that this rank owns."""
        if self.size == 1:
            return table
        sent = torch.cat([part.flatten() for part in table.split(self.widths, dim=1)])
        mine = table.new_empty(self.samples, len(self.own))
        dist.all_to_all_single(
            mine.view(-1),
            sent,
            [self.rows * len(self.own)] * self.size,
            [self.rows * width for width in self.widths],
        )
        return mine

    def to_samples(self, columns: Tensor) -> Tensor:
        """(N, own) → (n, D): the inverse of `to_columns`."""
        if self.size == 1:
            return columns
        received = columns.new_empty(self.rows * sum(self.widths))
        sizes = [self.rows * width for width in self.widths]
        dist.all_to_all_single(
            received, columns.contiguous().view(-1), sizes, [self.rows * len(self.own)] * self.size
        )
        return torch.cat(
            [
                part.view(self.rows, width)
                for part, width in zip(received.split(sizes), self.widths, strict=True)
            ],
            dim=1,
        )
