"""Representations of a data set, computed once and shared by the evaluations; by every rank its share of them."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from imsvd_core.data.memory import ImageData
from imsvd_core.data.tree import FolderImages
from imsvd_core.distributed import world
from imsvd_core.networks import represent
from imsvd_core.system.files import atomic_write
from imsvd_core.system.progress import bar
from imsvd_core.views import EvalView

Images = ImageData | FolderImages
Data = TypeVar("Data")

KEPT_ROWS = 4096  # that a file of `embed` holds


def embed(
    backbone: nn.Module,
    data: Images,
    view: EvalView,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 500,
    precision: torch.dtype | None = None,
    ranks: bool = False,
    keep: Path | None = None,
    progress: bool = False,
    what: str = "embedding",
) -> Tensor:
    """Representations (N, features), float32, of `data` in its order, batch-norm frozen, seen through `view`.

    Args:
        batch_size: of images in memory; streamed ones come as they are handed over.
        ranks: all ranks of the process group call this; each computes its share, and all end with the whole table.
        keep: a folder for what is done so far, from which a call after a kill goes on. Whoever gives it sees to it that
            it belongs to these images and this backbone, and removes it. It grows as large as the table.
        progress: show a bar, named `what`, on rank 0.
    """
    rows, table = share(len(data)) if ranks else range(len(data)), None
    done = saved = rows.start
    with bar(what, len(rows), progress) as advance:
        for some in _kept_and_new(
            keep,
            rows,
            lambda left: batches(
                backbone,
                data,
                view,
                left,
                device=device,
                batch_size=batch_size,
                precision=precision,
            ),
        ):
            table = torch.empty(len(data), some.shape[1], device=device) if table is None else table
            table[done : done + len(some)] = some
            done += len(some)
            advance(len(some))
            if keep and (done - saved >= KEPT_ROWS or done == rows.stop):
                saved = _keep(keep, table, saved, done)
    return _filled(table, len(data), device) if ranks else table


def _kept_and_new(
    keep: Path | None, rows: range, compute: Callable[[range], Iterator[Tensor]]
) -> Iterator[Tensor]:
    """The representations of `rows` that are kept, then those that are left to compute."""
    done = rows.start
    while keep and (path := keep / f"rows-{done}.safetensors").exists():
        some = safetensors.torch.load_file(path)["rows"]
        done += len(some)
        yield some
    yield from compute(range(done, rows.stop))


def _keep(keep: Path, table: Tensor, start: int, stop: int) -> int:
    path = keep / f"rows-{start}.safetensors"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(safetensors.torch.save({"rows": table[start:stop].cpu().contiguous()}))
    return stop


def batches(
    backbone: nn.Module,
    data: Images,
    view: EvalView,
    rows: range,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 500,
    precision: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Representations (some, features) of the images `rows`, successive ones, as they are made; else as `embed`."""
    backbone.to(device)
    if isinstance(data, FolderImages):
        images, see = data.center_crops(view, indices=rows, device=device), view.finish
    else:
        images, see = (
            (some.to(device) for some in data.images[rows.start : rows.stop].split(batch_size)),
            view,
        )
    with closing(images):
        for some in images:
            if len(some):  # what an empty range is split into
                yield represent(backbone, [see(some)], device, precision)


def share(n: int) -> range:
    """The rows of `n` that are this rank's."""
    rank, size = world()
    return shares(n, size)[rank]


def shares(n: int, size: int) -> list[range]:
    """The rows of `n` that are each rank's: successive ones, in the order of ranks, equally many to within one."""
    return [range(n * rank // size, n * (rank + 1) // size) for rank in range(size)]


def chosen(config: Any, train: Data, test: Data, name: str) -> tuple[Data, Data]:
    """The images that `config.train_images` and `config.test_images` ask for; all where they are None. Raises ValueError,
    naming the setting of `name`, where there are not as many."""
    parts = []
    for data, setting in ((train, "train_images"), (test, "test_images")):
        wanted = getattr(config, setting)
        if wanted is not None and wanted > len(data):
            raise ValueError(
                f"{name}.{setting}={wanted} exceeds the {len(data)} images of {data.title} ({data.split})"
            )
        parts.append(data if wanted is None else data.subset(wanted))
    return parts[0], parts[1]


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


def fingerprint_of(data: Images) -> str:
    """A few digits that change with the images: their bytes, or the names of streamed ones; and with their labels."""
    if isinstance(data, FolderImages):
        return fingerprint(
            torch.frombuffer(bytearray(data.names.tobytes()), dtype=torch.uint8), data.labels
        )
    return fingerprint(data.images, data.labels)


def _filled(table: Tensor | None, n: int, device: torch.device | str) -> Tensor:
    """The table whose shares the ranks have computed, whole on each; a rank without a share has no table yet."""
    size = world()[1]
    if size == 1:
        return table
    width = torch.tensor(0 if table is None else table.shape[1], device=device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    table = torch.empty(n, int(width), device=device) if table is None else table
    for rank, rows in enumerate(shares(n, size)):
        if rows:
            dist.broadcast(table[rows.start : rows.stop], rank)
    return table
