"""The loss shared by ranks beside one process alone: time, memory, bytes, one rank's share of work.

    python benchmarks/ranks.py [--samples 2048] [--dim 8160] [--units 80] [--rounds 5] [--json PATH]

Two gloo ranks on this host and one process take turns on the same batch, one thread each; the
slower rank counts. Memory is the peak resident set beyond what a process holds before the call,
with an allocator that gives back at once what is freed. Bytes are those that the loopback device
sent. The share is what one rank of W computes (codes of its samples, its rows of the matrix, its
part of both gradients), its tables handed to it instead of sent; the ideal is 1/W of one process.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import time
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from imsvd_core.distributed import Exchange
from imsvd_core.loss import CrossJointEntropyLoss
from imsvd_core.results import provenance, write_result

WORLDS = (1, 2, 4, 8, 16, 32)


def logits(samples: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, dim, generator=generator).mul_(2) for _ in range(2)]


def step(z: list[Tensor], units: int, gather: bool) -> None:
    z = [part.requires_grad_() for part in z]
    CrossJointEntropyLoss(units, gather_distributed=gather)(*z).total.backward()
    z[0].grad = z[1].grad = None


def own_rows(z: list[Tensor]) -> list[Tensor]:
    return [part.chunk(dist.get_world_size())[dist.get_rank()].clone() for part in z]


def timings(args: argparse.Namespace) -> dict[str, float | list[float]]:
    """On both ranks: seconds of a call, alone on rank 0 and shared, in turn."""
    whole = logits(args.samples, args.dim)
    rows = own_rows(whole)
    alone, shared, sent = [], [], []
    for _ in range(args.rounds + 1):
        dist.barrier()
        if dist.get_rank() == 0:
            start = time.perf_counter()
            step(whole, args.units, gather=False)
            alone.append(time.perf_counter() - start)
        dist.barrier()
        bytes_at_start = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        start = time.perf_counter()
        step(rows, args.units, gather=True)
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        sent.append(psutil.net_io_counters(pernic=True)["lo"].bytes_sent - bytes_at_start)
        shared.append(seconds.item())
    if dist.get_rank():
        return {}
    ratios = [b / a for a, b in zip(alone[1:], shared[1:], strict=True)]  # the first turn warms up
    return {
        "slower_rank_over_one_process": round(statistics.median(ratios), 3),
        "in_one_round": [round(min(ratios), 3), round(max(ratios), 3)],
        "bytes_sent_per_rank": round(statistics.median(sent[1:]) / 2),
    }


def memory(args: argparse.Namespace) -> dict[str, int]:
    """On both ranks: peak bytes beyond those held before the call, of the rank that needs more."""
    z = logits(args.samples, args.dim)
    z = own_rows(z) if dist.get_world_size() > 1 else z
    # Loads what is loaded once.
    step([part[:8, : 2 * args.units].clone() for part in z], args.units, gather=True)
    hold = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        - psutil.Process().memory_info().rss
    )
    # A peak of the past must not hide this one.
    padding = torch.ones(max(hold, 0) // 4 + 1)
    resident = psutil.Process().memory_info().rss
    step(z, args.units, gather=True)
    extra = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
    dist.all_reduce(extra, dist.ReduceOp.MAX)
    del padding
    return {"extra_peak_bytes": int(extra)}


def run(rank: int, size: int, port: int, work, args: argparse.Namespace, answer) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    figures = work(args)
    if rank == 0:
        answer.put(figures)
    dist.destroy_process_group()


def on_ranks(size: int, work, args: argparse.Namespace) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answer = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run, (size, port, work, args, answer), nprocs=size)
    return answer.get()


class Handed(Exchange):
    """Rank 0 of `size`, whose tables are handed over instead of exchanged: its own work is left."""

    size_: int = 1
    p1: Tensor
    p2: Tensor

    def __init__(self, table: Tensor, columns: int | None = None, active: bool = True):
        with mock.patch("imsvd_core.distributed.world", return_value=(0, self.size_)):
            super().__init__(table, columns)

    def sum(self, value: Tensor) -> Tensor:
        return value

    def to_columns(self, table: Tensor) -> Tensor:
        torch.cat([part.flatten() for part in table.split(self.widths, dim=1)])  # as for sending
        return self.p1

    def gather(self, table: Tensor) -> Tensor:
        return self.p2

    def scatter_sum(self, table: Tensor) -> Tensor:
        return table.view(self.size, self.rows, -1).sum(0)  # as many numbers as would have arrived

    def to_samples(self, columns: Tensor) -> Tensor:
        sizes = [self.rows * width for width in self.widths]
        received = torch.zeros(sum(sizes)).split(sizes)
        parts = zip(received, self.widths, strict=True)
        return torch.cat([part.view(self.rows, width) for part, width in parts], dim=1)


def shares(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """W times the seconds of one rank's share over those of one process: 1 is the ideal."""
    torch.set_num_threads(1)
    z = logits(args.samples, args.dim)
    p1, p2 = (part.unflatten(1, (-1, args.units)).softmax(-1).flatten(1) for part in z)
    seconds: dict[int, list[float]] = {size: [] for size in WORLDS}
    for _ in range(args.rounds + 1):
        for size in WORLDS:
            Handed.size_, Handed.p1, Handed.p2 = size, p1[:, : round(args.dim / size)].clone(), p2
            rows = [part[: args.samples // size].clone() for part in z]
            with mock.patch("imsvd_core.streaming.Exchange", Handed):
                start = time.perf_counter()
                step(rows, args.units, gather=True)
                seconds[size].append(time.perf_counter() - start)
    figures: dict[str, dict[str, float]] = {}
    for size in WORLDS:
        rounds = zip(seconds[1][1:], seconds[size][1:], strict=True)
        figures[str(size)] = {
            "work_times_ranks": round(statistics.median(b * size / a for a, b in rounds), 3),
            "bytes_sent": bytes_sent(args.samples, args.dim, size),
        }
    return figures


def bytes_sent(samples: int, dim: int, ranks: int, entry: int = 4) -> int:
    """What one rank sends in a call.

    The second view's codes to all, their gradient's sum back, the first view's codes and their
    gradient for the columns that others own; occupancy and scalars are left out.
    """
    table = samples * dim * entry
    return round(2 * table * (ranks - 1) / ranks + 2 * table * (ranks - 1) / ranks**2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (("samples", 2048), ("dim", 8160), ("units", 80), ("rounds", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    start = time.perf_counter()
    two = on_ranks(2, timings, args)
    # glibc would keep pieces of up to 32 MB
    with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="1000000"):
        two |= on_ranks(2, memory, args)
        one = on_ranks(1, memory, args)
    figures = {
        "two_ranks": two
        | {
            "peak_over_one_process": round(two["extra_peak_bytes"] / one["extra_peak_bytes"], 3),
            "bytes_by_formula": bytes_sent(args.samples, args.dim, 2),
        },
        "one_process": one,
        "share": shares(args),
    }
    setting = {
        "samples": args.samples,
        "dim": args.dim,
        "units": args.units,
        "threads": 1,
        "rounds": args.rounds,
    }
    print(json.dumps({"setting": setting, "figures": figures}, indent=1))
    if args.json:
        origin = provenance(
            config=setting,
            seed=0,
            device="cpu",
            dataset="random logits",
            seconds=time.perf_counter() - start,
        )
        write_result(
            args.json, "benchmark-ranks", {"setting": setting, **figures}, origin, overwrite=True
        )


if __name__ == "__main__":
    main()
