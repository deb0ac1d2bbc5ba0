"""Representations of a data set, computed once and shared by the evaluations; by every rank its
share of them."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
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


def embed(
    backbone: nn.Module,
    data: Images,
    view: EvalView,
    *,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    ranks: bool = False,
    progress: bool = False,
    title: str = "embedding",
) -> Tensor:
    """Representations (N, features), float32, of `data` in its order, batch-norm frozen, seen
    through `view`.

    Args:
        ranks: all ranks of the process group call this; each computes its share, and all end with
            the whole table.
        progress: show a bar, named `title`, on rank 0.
    """
    rows = share(len(data), ranks)
    table, done = torch.empty(0, 0, device=device), rows.start
    with bar(title, len(rows), progress) as advance:
        for features in batches(backbone, data, view, rows, device=device, precision=precision):
            if not len(table):
                table = table.new_empty(len(data), features.shape[1])
            table[done : done + len(features)] = features
            done += len(features)
            advance(len(features))
    return _gathered(table, len(data)) if ranks else table


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
    return data if n in (None, len(data)) else data.subset(n)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum of every rank's `counts`, on all of them; in place."""
    if world()[1] > 1:
        dist.all_reduce(counts)
    return counts


def fingerprint(*tensors: Tensor) -> str:
    """A few digits that change with any of the numbers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
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


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, all or none."""
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(content))
