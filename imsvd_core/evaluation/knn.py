"""Weighted k-nearest-neighbour classification: no training, so it judges the representation alone."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import one_hot

from imsvd_core.distributed import on_rank_0, world
from imsvd_core.evaluation.features import (
    Images,
    batches,
    embed,
    fingerprint,
    fingerprint_of,
    share,
    shares,
    sum_over_ranks,
)
from imsvd_core.system.config import config_hash, plain
from imsvd_core.system.files import atomic_write
from imsvd_core.system.progress import bar
from imsvd_core.system.run_folder import RunFolder
from imsvd_core.views import EvalView


@dataclass(frozen=True)
class KNNConfig:
    """The protocol of Table II; temperature and votes as in the authors' code (Wu et al., 2018)."""

    neighbors: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    chunk: int = 2048
    """Sets the memory of the comparison, 16·chunk² bytes and some: chunk / 2 queries meet 8·chunk rows at a time."""
    gallery: int | None = None
    """Training images to use, class-balanced; all of them by default."""
    queries: int | None = None
    """Test images to use, class-balanced; all of them by default."""

    def __post_init__(self) -> None:
        if (
            not self.neighbors
            or min(self.neighbors) < 1
            or len(set(self.neighbors)) < len(self.neighbors)
        ):
            raise ValueError(
                f"neighbors={self.neighbors} must be different counts ≥ 1 (the paper's: 20, 200)"
            )
        if not self.temperature > 0 or self.chunk < 1:
            raise ValueError(
                f"temperature={self.temperature} and chunk={self.chunk} must be positive"
            )

    def check(self, train: Images, test: Images, name: str = "knn") -> None:
        """Raise ValueError, naming the setting, if the data cannot serve this protocol."""
        gallery = len(train) if self.gallery is None else self.gallery
        if not 1 <= gallery <= len(train):
            raise ValueError(
                f"{name}.gallery={self.gallery} must lie between 1 and the {len(train)} training images"
            )
        if self.queries is not None and not 1 <= self.queries <= len(test):
            raise ValueError(
                f"{name}.queries={self.queries} must lie between 1 and the {len(test)} test images"
            )
        if max(self.neighbors) > gallery:
            raise ValueError(
                f"{name}.neighbors={self.neighbors}: k = {max(self.neighbors)} exceeds the gallery of {gallery}; "
                "take smaller k or a larger gallery"
            )


SAVE_SECONDS = 60.0  # between savings of what is compared so far


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    data: tuple[Images, Images],
    config: KNNConfig,
    *,
    view: EvalView,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    run_dir: Path | str | None = None,
    progress: bool = False,
    ranks: bool = False,
) -> dict[str, float]:
    """Top-1 accuracy in percent for every k: {"knn_20": …, "knn_200": …}, with the sizes that gave it.

    The gallery is embedded and compared block by block, and never held: memory, on every rank, is that of the queries'
    features twice, of `Neighbors`, and of the images under way. With ImageNet's 50,000 queries of 2048 features and 200
    neighbours a whole process peaked at 1.8 GB, beside its backbone (`benchmarks/knn.py`), after 65,536 rows of gallery. With
    `run_dir`, what is done so far is kept in a folder there (the queries' features and 12 bytes
    for each of a query's neighbours: 0.5 GB, and 0.1 GB on every further rank), from which a call after a kill goes on;
    it goes when the result is there.

    Args:
        precision: of the backbone, by autocast; features are compared in float32.
        progress: show bars on rank 0.
        ranks: every rank of the process group calls this, and has its share of gallery and queries. Else this process
            does all by itself, whatever the others do.

    Raises ValueError where the data cannot serve the protocol, features are not finite, or another process holds the
    folder; FileNotFoundError and ValueError for images that cannot be read.
    """
    train, test = data
    config.check(train, test)
    gallery = train if config.gallery is None else train.subset(config.gallery)
    queries = test if config.queries is None else test.subset(config.queries)
    rank, size = world() if ranks else (0, 1)
    whose = " on this rank" if size > 1 else ""
    with _kept(
        run_dir,
        ranks,
        lambda: {
            "evaluation": "knn",
            **plain(config),
            "gallery": [gallery.title, fingerprint_of(gallery)],
            "queries": fingerprint_of(queries),
            "view": plain(vars(view)),
            "precision": str(precision),
            "ranks": size,
            "backbone": fingerprint(*backbone.state_dict().values()),
        },
    ) as keep:
        how = {"device": device, "precision": precision}
        asked = embed(
            backbone,
            queries,
            view,
            **how,
            ranks=ranks,
            keep=keep,
            progress=progress,
            what=f"embedding queries{whose}",
        )
        rows = share(len(gallery)) if ranks else range(len(gallery))
        there = keep and keep / f"neighbors-{rank}.safetensors"
        found = Neighbors(
            asked.cpu() if asked.device.type == "mps" else asked,
            max(config.neighbors),
            config.chunk,
            first=rows.start,
        )  # an Apple GPU selects few at a time
        del asked
        if there and there.exists():
            found.restore(safetensors.torch.load_file(there))
        saved = time.monotonic(), found.seen
        with bar(
            f"comparing gallery{whose}", len(rows), progress, done=found.seen - rows.start
        ) as advance:
            for some in batches(backbone, gallery, view, range(found.seen, rows.stop), **how):
                found.add(some)
                advance(len(some))
                if there and found.seen > saved[1] and time.monotonic() - saved[0] >= SAVE_SECONDS:
                    with atomic_write(there) as file:
                        file.write(safetensors.torch.save(found.state()))
                    saved = time.monotonic(), found.seen
        nearest = found.nearest()
        del found
        mine = share(len(queries)) if ranks else range(len(queries))
        similarity, index = merge_over_ranks(*nearest, max(config.neighbors)) if ranks else nearest
        truth = queries.labels[mine.start : mine.stop].to(index.device)
        predicted = vote(
            similarity,
            gallery.labels.to(index.device)[index],
            len(train.classes),
            neighbors=config.neighbors,
            temperature=config.temperature,
            chunk=config.chunk,
        )
        right = torch.stack([(one == truth).sum() for one in predicted.values()])
        right = (sum_over_ranks(right.to(device)) if ranks else right).tolist()
    accuracy = {
        f"knn_{k}": round(100 * count / len(queries), 2)
        for k, count in zip(predicted, right, strict=True)
    }
    return accuracy | {"gallery": len(gallery), "queries": len(queries)}


def weighted_knn(
    gallery: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    *,
    neighbors: Sequence[int] = (20, 200),
    temperature: float = 0.07,
    chunk: int = 2048,
) -> dict[int, Tensor]:
    """Predicted class (Q,) for every k: the k most cosine-similar gallery rows vote with weight exp(similarity / τ).

    gallery (G, F), labels int64 (G,), queries (Q, F). Exact: see `Neighbors`.
    Raises ValueError if a k exceeds the gallery, or if labels and gallery differ in length.
    """
    most = max(neighbors)
    if most > len(gallery):
        raise ValueError(
            f"neighbors={tuple(neighbors)}: k = {most} exceeds the gallery of {len(gallery)}; "
            "take smaller k or a larger gallery"
        )
    if len(labels) != len(gallery):
        raise ValueError(
            f"labels has {len(labels)} entries for a gallery of {len(gallery)}: need one for each row"
        )
    found = Neighbors(queries, most, chunk)
    found.add(gallery)
    similarity, index = found.nearest()
    return vote(
        similarity,
        labels[index],
        classes,
        neighbors=neighbors,
        temperature=temperature,
        chunk=chunk,
    )


@torch.no_grad()
def vote(
    similarity: Tensor,
    labels: Tensor,
    classes: int,
    *,
    neighbors: Sequence[int],
    temperature: float,
    chunk: int = 2048,
) -> dict[int, Tensor]:
    """Predicted class (Q,) for every k, of queries whose nearest rows have `similarity` (Q, most), falling, and `labels`."""
    predictions: dict[int, list[Tensor]] = {k: [] for k in neighbors}
    for near, label in zip(similarity.split(chunk), labels.split(chunk), strict=True):
        weight = (
            (near - near[:, :1]) / temperature
        ).exp()  # the nearest weighs 1: nothing overflows or all vanishes
        for k in neighbors:
            votes = weight.new_zeros(len(near), classes).scatter_add_(
                1, label[:, :k], weight[:, :k]
            )
            predictions[k].append(votes.argmax(1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


class Neighbors:
    """The `most` nearest rows, by cosine similarity, of a gallery that is handed over in blocks and never held.

    Exact: every similarity is computed in float32, and of equal ones the row that comes first in the gallery is nearer.
    How the gallery is cut changes nothing but the rounding of the products.

    Args:
        queries: (Q, F), on the device where they are to be compared.
        most: how many to keep of each.
        chunk: sets the memory, 16·chunk² bytes and some: chunk / 2 queries meet 8·chunk rows at a time.
        first: index of the gallery row that comes first here.

    Memory: a copy of the queries, 12 bytes for each of their neighbours, `chunk`'s and two blocks of gallery.
    """

    def __init__(self, queries: Tensor, most: int, chunk: int = 2048, first: int = 0):
        self.queries, self.most = _normalized("queries", queries), most
        self.some, self.block = max(1, chunk // 2), 8 * chunk
        self.similarity = queries.new_empty(
            len(queries), 0, dtype=torch.float32
        )  #: so far, (Q, up to most)
        self.index = queries.new_empty(
            len(queries), 0, dtype=torch.int64
        )  #: of those rows in the gallery
        self.seen = first  #: index of the row that is to be compared next
        self._waiting: list[Tensor] = []  # rows that do not fill a block yet
        self._space: Tensor | None = (
            None  # for similarities: a new piece of memory each time would cost
        )

    @torch.no_grad()
    def add(self, gallery: Tensor) -> None:
        """Take the gallery's next rows, (any, F). They may wait to be compared, until they fill a block."""
        waiting = sum(map(len, self._waiting))
        for part in gallery.tensor_split(
            list(range(self.block - waiting, len(gallery), self.block))
        ):
            self._waiting.append(part)
            waiting += len(part)
            if waiting >= self.block:
                self._compare()
                waiting = 0

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Similarities (Q, most), falling, and indices in the gallery, int64; fewer columns where there are fewer rows."""
        self._compare()
        for rows in _tied(self.similarity).split(self.some):
            self.similarity[rows], self.index[rows] = _in_order(
                self.similarity[rows], self.index[rows], self.most
            )
        return self.similarity, self.index

    def merge(self, other: "Neighbors") -> None:
        """Add what `other` has found for the same queries in other rows of the gallery."""
        for here, there in zip(self.nearest(), other.nearest(), strict=True):
            if len(here) != len(there):
                raise ValueError(
                    f"other has {len(there)} queries, and this {len(here)}: give one that has the same queries"
                )
        both = [(self.similarity, self.index), (other.similarity, other.index)]
        self.similarity, self.index = _merged(both, self.most, self.some)

    def state(self) -> dict[str, Tensor]:
        """What is found in the rows before `seen`, to be stored; rows that wait are left out."""
        return {
            "similarity": self.similarity.cpu(),
            "index": self.index.cpu(),
            "seen": torch.tensor(self.seen),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.similarity, self.index = (
            state[name].to(self.queries.device) for name in ("similarity", "index")
        )
        self.seen, self._waiting = int(state["seen"]), []

    @torch.no_grad()
    def _compare(self) -> None:
        """Compare the rows that wait with all queries."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        rows = torch.cat(waiting) if len(waiting) > 1 else waiting[0]  # which would be copied
        del waiting
        rows = _normalized("gallery", rows.to(self.queries.device))
        width = min(self.most, self.similarity.shape[1] + len(rows))
        similarity = self.similarity.new_empty(len(self.queries), width)
        index = self.index.new_empty(len(self.queries), width)
        space = min(self.some, len(self.queries)) * len(rows)
        if self._space is None or len(self._space) < space:
            self._space = rows.new_empty(space)
        for start in range(0, len(self.queries), self.some):
            part = slice(start, start + self.some)
            queries = self.queries[part]
            out = self._space[: len(queries) * len(rows)].view(len(queries), -1)
            found = torch.mm(queries, rows.T, out=out)
            similarity[part], index[part] = _best(
                found, self.seen, self.similarity[part], self.index[part], self.most
            )
        self.similarity, self.index = similarity, index
        self.seen += len(rows)


def merge_over_ranks(similarity: Tensor, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the queries, with the nearest of all ranks' rows, from those that each has found in its own.

    similarity (Q, up to most), falling, and index (Q, …) are for all queries, as `Neighbors.nearest` gives them; every
    rank calls this. Memory: as much again as is given, twice.
    """
    size = world()[1]
    if size == 1:
        return similarity, index
    widths = one_hot(torch.tensor(world()[0]), size).to(index.device) * index.shape[1]
    widths = sum_over_ranks(widths).tolist()
    queries, mine = len(index), share(len(index))
    lengths = [len(rows) for rows in shares(queries, size)]
    parts = []
    for table in (similarity, index):
        received = table.new_empty(len(mine) * sum(widths))
        dist.all_to_all_single(
            received,
            table.contiguous().view(-1),
            [len(mine) * width for width in widths],
            [length * table.shape[1] for length in lengths],
        )
        parts.append(
            [
                part.view(len(mine), width)
                for part, width in zip(
                    received.split([len(mine) * width for width in widths]), widths, strict=True
                )
            ]
        )
    return _merged(list(zip(*parts, strict=True)), most, 1024)


def _merged(parts: Sequence[tuple[Tensor, Tensor]], most: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The nearest `most`, in order, of what was found in several parts of the gallery: (Q, …) each."""
    rows = [
        _in_order(torch.cat(similarity, 1), torch.cat(index, 1), most)
        for similarity, index in zip(
            *(
                zip(*(table.split(chunk) for table in tables), strict=True)
                for tables in zip(*parts, strict=True)
            ),
            strict=True,
        )
    ]
    similarity, index = zip(*rows, strict=True)
    return torch.cat(similarity), torch.cat(index)


def _best(
    found: Tensor, first: int, before: Tensor, index: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The nearest `most` of a block's similarities (q, rows), whose first row is `first`, and of those `before` it.

    A row that is among the nearest stands in one of the most + 1 groups whose nearest row is nearest: to look at the
    groups' maxima, and then into those groups, is less than to look at all. The one that is too many tells ties.
    """
    groups = max(1, isqrt(found.shape[1] // (most + 1)))
    apart = found.shape[1] // groups  # so far stand the members of a group
    inside, rest = found[:, : groups * apart], found[:, groups * apart :]
    if groups > 1:
        grouped = inside.unflatten(1, (groups, apart))
        chosen = grouped.amax(1).topk(most + 1, sorted=False).indices
        inside = grouped.gather(2, chosen[:, None].expand(-1, groups, -1)).flatten(1)
    similarity = torch.cat([before, inside, rest], 1)
    if similarity.shape[1] <= most:
        return similarity, torch.cat([index, _indices(found, first)], 1)
    best, place = similarity.topk(most + 1)
    place = place[:, :most] - before.shape[1]  # below 0: what was there before
    column = place
    if groups > 1:
        member = place.clamp(0, inside.shape[1] - 1)
        column = chosen.gather(1, member % (most + 1)).add_(member // (most + 1), alpha=apart)
        column = torch.where(
            place < inside.shape[1], column, place + (groups * apart - inside.shape[1])
        )
    known = torch.where(place < 0, place + before.shape[1], 0)
    place = (
        torch.where(place < 0, index.gather(1, known), column + first)
        if len(index.T)
        else column + first
    )
    tied = (
        (best[:, most - 1] == best[:, most]).nonzero().squeeze(1)
    )  # which of them is in, their indices say
    best = best[:, :most]
    for rows in tied.split(64) if len(tied) else ():
        some = found[rows]
        best[rows], place[rows] = _in_order(
            torch.cat([before[rows], some], 1),
            torch.cat([index[rows], _indices(some, first)], 1),
            most,
        )
    return best, place


def _indices(found: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + found.shape[1], device=found.device).expand(len(found), -1)


def _in_order(similarity: Tensor, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first `most` by falling similarity and, where that is equal, by rising index."""
    index, order = index.sort(1)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, :most], index.gather(1, order[:, :most])


def _tied(similarity: Tensor) -> Tensor:
    """Which rows of falling similarities hold equal ones, or are not in order."""
    return (similarity[:, :-1] <= similarity[:, 1:]).any(1).nonzero().squeeze(1)


@torch.no_grad()
def _normalized(name: str, features: Tensor) -> Tensor:
    """Rows of length 1, float32; a row of zeros stays one. Raises ValueError for what is no number."""
    length = torch.linalg.vector_norm(features.float(), dim=1, keepdim=True)
    if not bool(length.isfinite().all()):
        raise ValueError(
            f"{name} holds features that are not finite: look at the backbone's weights, or use precision fp32"
        )
    return features / length.clamp_min_(1e-12)


@contextmanager
def _kept(
    run_dir: Path | str | None, ranks: bool, settings: Callable[[], dict]
) -> Iterator[Path | None]:
    """The folder for what is done of an evaluation with these settings; removed at the end, unless by an error."""
    if run_dir is None:
        yield None
        return
    run = RunFolder(Path(run_dir) / f"knn-{config_hash(settings())}")
    with run.on_rank_0() if ranks else run:
        yield run.path
        (on_rank_0(shutil.rmtree) if ranks else shutil.rmtree)(run.path)
