"""Representations of a data set, computed once and shared by the evaluations; by every rank its
share of them."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from imsvd_core.data import Images
from imsvd_core.distributed import world
from imsvd_core.networks import represent
from imsvd_core.system.files import atomic_write
from imsvd_core.system.progress import bar
from imsvd_core.views import EvalView

Data = TypeVar("Data", bound=Any)

BATCH_SIZE = 500  # of images in memory; streamed ones come as they are read
KEPT_ROWS = 4096  # that a file of `embed` holds


def embed(
    backbone: nn.Module,
    data: Images,
    view: EvalView,
    *,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    ranks: bool = False,
    folder: Path | None = None,
    progress: bool = False,
    title: str = "embedding",
) -> Tensor:
    """Representations (N, features), float32, of `data` in its order, batch-norm frozen, seen
    through `view`.

    Args:
        ranks: all ranks of the process group call this; each computes its share, and all end with
            the whole table.
        folder: keeps what is done so far, from which a call after a kill goes on. The caller
            ensures that it belongs to these images and this backbone, and removes it. It grows as
            large as the table.
        progress: show a bar, named `title`, on rank 0.
    """
    rows = share(len(data), ranks)
    compute = partial(batches, backbone, data, view, device=device, precision=precision)
    table, done = torch.empty(0, 0, device=device), rows.start
    with bar(title, len(rows), progress) as advance:
        for features in _kept(folder, rows, compute) if folder else compute(rows):
            if not len(table):
                table = table.new_empty(len(data), features.shape[1])
            table[done : done + len(features)] = features
            done += len(features)
            advance(len(features))
    return _gathered(table, len(data)) if ranks else table


def _kept(
    folder: Path, rows: range, compute: Callable[[range], Iterator[Tensor]]
) -> Iterator[Tensor]:
    """The representations of `rows`: those that the folder holds, then those that are left to
    compute, which it receives."""
    done = rows.start
    while (path := folder / f"rows-{done}.safetensors").exists():
        features = safetensors.torch.load_file(path)["rows"]
        done += len(features)
        yield features
    block: list[Tensor] = []
    for features in compute(range(done, rows.stop)):
        yield features
        block.append(features)
        size = sum(map(len, block))
        if size >= KEPT_ROWS or done + size == rows.stop:
            with atomic_write(folder / f"rows-{done}.safetensors") as file:
                file.write(safetensors.torch.save({"rows": torch.cat(block).cpu()}))
            done += size
            block = []


def batches(
    backbone: nn.Module,
    data: Images,
    view: EvalView,
    rows: range,
    *,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Representations (n, features) of the images `rows`, successive ones, as they are made; else
    as `embed`."""
    backbone.to(device)
    with closing(data.in_order(view, rows, device=device, batch_size=BATCH_SIZE)) as stream:
        for images in stream:
            yield represent(backbone, [images], device, precision)


def share(n: int, ranks: bool = True) -> range:
    """The rows of `n` that are this rank's; all of them if the `ranks` do not share."""
    rank, size = world()
    return shares(n, size)[rank] if ranks else range(n)


def shares(n: int, size: int) -> list[range]:
    """The rows of `n` that are each rank's: successive ones, in the order of ranks, equally many to
    within one."""
    return [range(n * rank // size, n * (rank + 1) // size) for rank in range(size)]


def check_size(n: int | None, data: Any, setting: str) -> None:
    """Raise ValueError, naming the setting, unless `data` have `n` images; None means all."""
    if n is not None and not 1 <= n <= len(data):
        raise ValueError(
            f"{setting}={n} must lie between 1 and the {len(data)} images of {data.title} "
            f"({data.split})"
        )


def subset(data: Data, n: int | None, setting: str) -> Data:
    """`n` images of `data`, or all for None. Raises ValueError as `check_size`."""
    check_size(n, data, setting)
    return data if n is None else data.subset(n)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum of every rank's `counts`, on all of them; in place."""
    if world()[1] > 1:
        dist.all_reduce(counts)
    return counts


def fingerprint(*tensors: Tensor) -> str:
    """A few digits that change with any of the numbers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gathered(table: Tensor, n: int) -> Tensor:
    """The table whose shares the ranks have computed, whole on each; that of a rank without a share
    is empty yet."""
    size = world()[1]
    if size == 1:
        return table
    width = torch.tensor(table.shape[1], device=table.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    if not len(table):
        table = table.new_empty(n, int(width))
    for rank, rows in enumerate(shares(n, size)):
        if rows:
            dist.broadcast(table[rows.start : rows.stop], rank)
    return table
