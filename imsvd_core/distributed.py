"""Ranks of one training: which samples each holds, and how tables change hands.

Without a process group everything here is the identity, so that the code that uses it is the same
on one process.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


P = ParamSpec("P")
T = TypeVar("T")


def on_rank_0(work: Callable[P, T]) -> Callable[P, T]:
    """Let rank 0 do `work` while the others wait. Its result or exception is that of every rank."""

    @functools.wraps(work)
    def shared(*args: P.args, **kwargs: P.kwargs) -> T:
        rank, size = world()
        if size == 1:
            return work(*args, **kwargs)
        value: T | None = None
        error: Exception | None = None
        if rank == 0:
            try:
                value = work(*args, **kwargs)
            except Exception as raised:
                error = raised
        outcome: list[Any] = [value, error]
        dist.broadcast_object_list(outcome)
        # On rank 0 the exception itself, with its traceback, and not a copy
        if error := error or outcome[1]:
            raise error
        result: T = outcome[0]
        return result

    return shared


def rank_0_first(work: Callable[[], T]) -> T:
    """Let rank 0 do `work`, then every other rank: what the first fetches, the others find."""
    results: list[T] = []
    on_rank_0(lambda: results.append(work()))()
    return results[0] if results else work()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's `value`, on all of them."""
    size = world()[1]
    if size > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= size
    return value


def of_first_rank(value: Tensor) -> Tensor:
    """What rank 0 gave, on every rank; in place."""
    if world()[1] > 1:
        dist.broadcast(value, 0)
    return value


def refuse_unlike(device: torch.device, facts: dict[str, int]) -> None:
    """Raise ValueError, on every rank, unless all bring the same `facts`: one small exchange."""
    size = world()[1]
    if size == 1:
        return
    row = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
    rows = row.new_empty(size * len(facts))
    dist.all_gather_into_tensor(rows, row)
    for name, values in zip(facts, rows.view(size, -1).T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks differ in {name}, {values}: all need the same "
                "(so drop an incomplete last batch)"
            )


class Exchange:
    """Tables (N, D) whose samples are spread over ranks, n to each, and whose columns may be too.

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
        # entries that this rank exchanges with every other: of its rows, and of its columns
        self._sent = [self.rows * width for width in self.widths]
        self._received = [self.rows * len(self.own)] * self.size

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
        parts = torch.split_with_sizes(table, self.widths, dim=1)
        sent = torch.cat([part.flatten() for part in parts])
        received = table.new_empty(self.samples, len(self.own))
        dist.all_to_all_single(received.view(-1), sent, self._received, self._sent)
        return received

    def to_samples(self, columns: Tensor) -> Tensor:
        """(N, own) → (n, D): the inverse of `to_columns`."""
        if self.size == 1:
            return columns
        received = columns.new_empty(sum(self._sent))
        dist.all_to_all_single(received, columns.flatten(), self._sent, self._received)
        parts = zip(received.split_with_sizes(self._sent), self.widths, strict=True)
        return torch.cat([part.view(self.rows, width) for part, width in parts], dim=1)
