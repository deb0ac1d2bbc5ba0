"""Processes that read and decode ahead of the trainer, and what they heed and outlive."""

import multiprocessing
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imsvd_core.data.batch import Device
from imsvd_core.system.faults import Fault
from imsvd_core.system.looks import SHM_REMEDY, shared_memory_look
from imsvd_core.system.progress import bar

S = TypeVar("S")
T = TypeVar("T")

AHEAD = 2  # parts that wait for each worker
GROUP = 64  # files that a thread reads at a time


def stream(
    read: Callable[[Any], tuple],
    parts: Iterable,
    workers: int | None = None,
    device: Device = "cpu",
    part_bytes: int = 0,
) -> Generator[list[Any]]:
    """What `read` makes of each part, in order, made by worker processes some parts ahead.

    Args:
        read: picklable; gives a tuple of tensors and of what else can be pickled.
        parts: its arguments, one after the other; consumed ahead of the yields.
        workers: processes; 0 reads here; by default this rank's share of the cores.
        device: where the tensors are sent.
        part_bytes: of one part's tensors, where that is known: what waits must fit /dev/shm.

    Closing the iterator ends the workers. Raises here the ValueError that `read` raises there, and
    Fault with the reason if a worker dies.
    """
    workers = share_of_cores() if workers is None else workers
    here = workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shared = shared_memory_look(here * (AHEAD + 1) * part_bytes)
    if here and part_bytes and shared.remedy:
        raise ValueError(str(shared))
    loader = DataLoader(
        _Reader(read),
        batch_size=None,
        collate_fn=_unchanged,  # the default makes a tensor, which keeps a file open, of any array
        sampler=parts,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_heed_the_trainer_alone,
        pin_memory=torch.device(device).type == "cuda",
        # Its own, so that the trainer's global generator is left alone.
        generator=torch.Generator(),
    )
    with _sigterm_held_back():
        iterator = iter(loader)
    try:
        for result in iterator:
            if isinstance(result, ValueError):
                raise result
            yield [
                item.to(device, non_blocking=True) if isinstance(item, Tensor) else item
                for item in result
            ]
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        shared = shared_memory_look()
        raise Fault(
            f"a process that reads images has died ({str(error).splitlines()[0].strip()}): it may "
            f"lack memory ({shared.at}: {shared.seen}): {SHM_REMEDY}"
        ) from error
    finally:
        del iterator  # with it go the workers


def in_threads(
    read: Callable[[S], T],
    files: Sequence[S],
    description: str,
    workers: int | None = None,
    progress: bool = False,
) -> Iterator[T]:
    """`read` of every file, in order, by threads; small ones cost more to hand over than to read.

    Args:
        description: of the bar, which is shown if `progress`.
        workers: threads; by default this rank's share of the cores.
    """
    from joblib import Parallel, delayed  # slow to import

    pool = Parallel(
        workers or share_of_cores() or 1,
        backend="threading",
        batch_size=GROUP,
        return_as="generator",
    )
    with bar(description, len(files), progress) as advance:
        for content in pool(delayed(read)(file) for file in files):
            advance(1)
            yield content


def share_of_cores() -> int:
    """The cores that this process may use, divided by the ranks on this host; 1 or more.

    A task of Slurm has its own, unless torchrun shares it among several ranks.
    """
    if "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    from joblib import cpu_count  # slow to import

    return max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@dataclass
class _Reader(Dataset):
    """A function as a DataLoader calls it.

    Its ValueError is a result, so that it is raised without a worker's trace.
    """

    read: Callable

    def __getitem__(self, part: object) -> object:
        try:
            return self.read(part)
        except ValueError as error:
            return error


def _unchanged(result: object) -> object:
    return result


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Start processes inside with SIGTERM blocked.

    It is blocked also in threads that a library starts there before any code of ours runs.
    """
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _heed_the_trainer_alone(worker: int) -> None:
    """Let a worker outlive signals to the whole job, such as Ctrl-C: the trainer answers those.

    The trainer's own SIGTERM still ends it; and a worker whose trainer is gone ends by itself,
    within seconds.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # else a part that cannot be handed over is lost, and the trainer waits for it
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_die)  # type: ignore
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _die(error: Exception, part: object) -> None:
    os.write(2, f"a worker cannot hand over what it has read: {error}\n".encode())
    os._exit(1)


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    while trainer and signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)
