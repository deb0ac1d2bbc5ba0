"""Processes that read and decode ahead of the trainer, and what they heed and outlive."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

AHEAD = 2  # parts that wait for each worker

log = logging.getLogger(__name__)


class Unreadable(set[int]):
    """Places of the images that could not be read so far."""

    def note(self, places: Iterable[int], file: Callable[[int], Path], fate: str) -> None:
        """Add places; warn of each new one, whose `file` it names, and say what becomes of it."""
        for place in set(places) - self:
            self.add(place)
            log.warning(
                "%s cannot be read and is %s (%d such so far)", file(place), fate, len(self)
            )


def stream(
    read: Callable[[Any], Any],
    parts: Iterable,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Generator[Any]:
    """What `read` makes of each part, in order, made by worker processes some parts ahead.

    Args:
        read: picklable; gives a tensor, or tuples, lists and dicts of tensors and of what else can
            be pickled.
        parts: its arguments, one after the other; consumed ahead of the yields.
        workers: processes; 0 reads here; by default this rank's share of the cores.
        device: where tensors are sent, also those inside tuples, lists and dicts.

    Closing the iterator ends the workers. Raises here the ValueError that `read` raises there.
    """
    device, workers = torch.device(device), share_of_cores() if workers is None else workers
    loader = DataLoader(
        _Reader(read),
        batch_size=None,
        sampler=parts,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_heed_the_trainer_alone,
        pin_memory=device.type == "cuda",
        # Its own, so that the trainer's global generator is left alone.
        generator=torch.Generator(),
    )
    with _sigterm_held_back():
        iterator = iter(loader)
    try:
        for result in iterator:
            if isinstance(result, ValueError):
                raise result
            yield _sent(result, device)
    finally:
        del iterator  # with it go the workers


def share_of_cores() -> int:
    """The cores that this process may use, divided by the ranks on this host; 1 or more.

    A task of Slurm has its own, unless torchrun shares it among several ranks.
    """
    if "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _sent(value: Any, device: torch.device) -> Any:
    """The value with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(_sent(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _sent(item, device) for key, item in value.items()}
    return value


class _Reader(Dataset):
    """A function as a DataLoader calls it.

    Its ValueError is a result, so that it is raised without a worker's trace.
    """

    def __init__(self, read: Callable) -> None:
        self.read = read

    def __getitem__(self, part: object) -> object:
        try:
            return self.read(part)
        except ValueError as error:
            return error


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
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    while trainer and signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)
