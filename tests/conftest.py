"""What tests of several modules share: groups of processes, lanes, an option to keep figures."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        metavar="FILE",
        type=Path,
        help="with -m slurm: write what was observed as a result, for the book",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by what a test asks for: groups of processes start slowly, pages are built first."""
    lanes = {"ranks": pytest.mark.slow, "rendering": pytest.mark.book}
    for item in items:
        for fixture in lanes.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(lanes[fixture])


@pytest.fixture(autouse=True)
def _no_log_outlives_its_test() -> Iterator[None]:
    """A command that ran in a test's process leaves a handler that writes to the test's stderr."""
    yield
    root = logging.getLogger()
    root.handlers = [
        handler for handler in root.handlers if type(handler) is not logging.StreamHandler
    ]


def _run(rank: int, size: int, port: int, work: Callable, folder: str, backend: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        torch.save(work(rank, size), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def ranks(tmp_path: Path, free_port: Callable[[], int]) -> Callable:
    """Call work(rank, size) on `size` processes; its results, in their order."""

    def call(work: Callable, size: int, backend: str = "gloo") -> list:
        mp.spawn(_run, (size, free_port(), work, str(tmp_path), backend), nprocs=size)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]

    return call


@pytest.fixture
def free_port() -> Callable[[], int]:
    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return port
