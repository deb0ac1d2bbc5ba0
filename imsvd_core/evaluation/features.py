"""Representations of a data set, computed once and shared by the evaluations; by every rank its share of them."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from imsvd_core.datasets import ImageData
from imsvd_core.distributed import world
from imsvd_core.folders import FolderImages
from imsvd_core.networks import represent
from imsvd_core.views import EvalView

Images = ImageData | FolderImages


def embed(backbone: nn.Module, data: Images, view: EvalView, *, device: torch.device | str = "cpu", batch_size: int = 500,
          precision: torch.dtype | None = None, shared: bool = False, progress: bool = False, what: str = "embedding") -> Tensor:
    """Representations (N, features), float32, of `data` in its order, batch-norm frozen, seen through `view`.

    `batch_size` is of images in memory; streamed ones come as they are handed over. `shared`: each rank of a process
    group computes its share, and all end with the whole table. `progress` shows a bar, named `what`, on rank 0.
    """
    rows = share(len(data)) if shared else range(len(data))
    table = None
    with bar(what, len(rows), progress) as advance:
        done = rows.start
        for some in batches(backbone, data, view, rows, device=device, batch_size=batch_size, precision=precision):
            table = some.new_empty(len(data), some.shape[1]) if table is None else table
            table[done:done + len(some)] = some
            done += len(some)
            advance(len(some))
    return _filled(table, len(data), device) if shared else table


def batches(backbone: nn.Module, data: Images, view: EvalView, rows: range, *, device: torch.device | str = "cpu",
            batch_size: int = 500, precision: torch.dtype | None = None) -> Iterator[Tensor]:
    """Representations (some, features) of the images `rows`, successive ones, as they are made; else as `embed`."""
    backbone.to(device)
    if isinstance(data, FolderImages):
        images, see = data.center_crops(view, indices=rows, device=device), view.finish
    else:
        images, see = (some.to(device) for some in data.images[rows.start:rows.stop].split(batch_size)), view
    with closing(images):
        for some in images:
            if len(some):  # what an empty range is split into
                yield represent(backbone, [see(some)], device, precision)


def share(n: int) -> range:
    """The rows of `n` that are this rank's: successive ones, in the order of ranks, equally many to within one."""
    rank, size = world()
    return range(n * rank // size, n * (rank + 1) // size)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum of every rank's `counts`, on all of them; in place."""
    if world()[1] > 1:
        dist.all_reduce(counts)
    return counts


@contextmanager
def bar(what: str, total: int, progress: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar on rank 0, named `what`: what the block is given moves it on."""
    shown = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                     disable=not (progress and world()[0] == 0))
    with shown:
        task = shown.add_task(what, total=total, completed=done)
        yield lambda count: shown.advance(task, count)


def _filled(table: Tensor | None, n: int, device: torch.device | str) -> Tensor:
    """The table whose shares the ranks have computed, whole on each; a rank without a share has no table yet."""
    size = world()[1]
    if size == 1:
        return table
    width = torch.tensor(0 if table is None else table.shape[1], device=device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    table = torch.empty(n, int(width), device=device) if table is None else table
    for rank in range(size):
        part = table[n * rank // size:n * (rank + 1) // size]
        if len(part):
            dist.broadcast(part, rank)
    return table
