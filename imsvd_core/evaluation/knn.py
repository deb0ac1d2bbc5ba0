"""Weighted k-nearest-neighbour classification: no training, so the representation alone counts."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from imsvd_core.data import Images
from imsvd_core.distributed import on_rank_0, world
from imsvd_core.evaluation.base import Evaluation, Setup
from imsvd_core.evaluation.features import (
    batches,
    check_size,
    embed,
    fingerprint,
    share,
    shares,
    sum_over_ranks,
)
from imsvd_core.system import checks, signals
from imsvd_core.system.config import config_hash, plain
from imsvd_core.system.files import atomic_write
from imsvd_core.system.progress import bar
from imsvd_core.system.run_folder import RunFolder
from imsvd_core.views import EvalView


@dataclass(frozen=True)
class KNNConfig(Evaluation):
    """The protocol of Table II; temperature and votes as in the authors' code (Wu et al., 2018)."""

    neighbors: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    chunk: int = 2048
    """Sets the memory of the comparison, 16·chunk² bytes and some: chunk / 2 queries meet 8·chunk
    rows at a time."""
    gallery: int | None = None
    """Training images to use, class-balanced; all of them by default."""
    queries: int | None = None
    """Test images to use, class-balanced; all of them by default."""

    evaluation = "knn"
    sizes = ("gallery", "queries")

    def __post_init__(self) -> None:
        if not self.neighbors or len(set(self.neighbors)) < len(self.neighbors):
            raise ValueError(
                f"neighbors={self.neighbors} must be different counts (the paper's: 20, 200)"
            )
        checks.positive(self, "temperature")
        checks.at_least(self, neighbors=1, chunk=1)

    def check(self, train: Images, test: Images, name: str = "knn") -> None:
        """Raise ValueError, naming the setting, if the data cannot serve this protocol."""
        check_size(self.gallery, train, f"{name}.gallery")
        check_size(self.queries, test, f"{name}.queries")
        _refuse_large_k(self.neighbors, self.gallery or len(train), f"{name}.neighbors")

    def run(
        self, backbone: nn.Module, data: tuple[Images, Images], setup: Setup
    ) -> dict[str, float]:
        """See `evaluate`; every rank has its share of gallery and queries.

        The queries' features, once there, and the neighbours so far are kept in a folder beside
        `setup.folder` (for ImageNet 0.5 GB, and 0.1 GB on every further rank), which is removed
        when the result is complete. Raises ValueError, too, where another process holds it.
        """
        self.check(*data)
        train, test = self.choose(*data)
        settings = self.identity(backbone) | {
            "gallery": [train.title, fingerprint(*train.identity())],
            "queries": fingerprint(*test.identity()),
            "view": plain(vars(setup.view)),
            "precision": str(setup.precision),
            "ranks": world()[1],
        }
        run = RunFolder(setup.folder.parent / f"knn-{config_hash(settings)}")
        with signals.interruptible(), run.on_rank_0():
            figures = _evaluate(backbone, train, test, self, replace(setup, folder=run.path), True)
            on_rank_0(shutil.rmtree)(run.path)
        return figures


SAVE_SECONDS = 60.0  # between savings of what is compared so far
VOTERS = 2048  # queries that vote at a time


def evaluate(
    backbone: nn.Module,
    data: tuple[Images, Images],
    config: KNNConfig,
    *,
    view: EvalView,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
) -> dict[str, float]:
    """Top-1 accuracy in percent for every k: {"knn_20": …, "knn_200": …}, with the sizes that gave
    it. This process does all by itself, keeps nothing and shows nothing: `KNNConfig.run` does.

    The gallery is embedded and compared block by block, and never held: memory, on every rank, is
    that of the queries' features twice, of `Neighbors`, and of the images under way.

    Args:
        precision: of the backbone, by autocast; features are compared in float32.

    Raises ValueError where the data cannot serve the protocol or features are not finite;
    FileNotFoundError and ValueError for images that cannot be read.
    """
    config.check(*data)
    train, test = config.choose(*data)
    return _evaluate(backbone, train, test, config, Setup(Path(), view, device, precision), False)


@torch.no_grad()
def _evaluate(
    backbone: nn.Module,
    train: Images,
    test: Images,
    config: KNNConfig,
    setup: Setup,
    ranks: bool,
) -> dict[str, float]:
    """`evaluate`; or what the ranks do together, of which `setup.folder` keeps what is done."""
    path = setup.folder / "queries.safetensors"
    if ranks and path.exists():
        queries = safetensors.torch.load_file(path, device=str(setup.device))["features"]
    else:
        title, progress = "embedding queries", setup.progress
        queries = embed(backbone, test, **setup.sight, ranks=ranks, progress=progress, title=title)
        if ranks:
            on_rank_0(_write)(path, {"features": queries})
    # An Apple GPU selects few at a time.
    queries = queries.cpu() if queries.device.type == "mps" else queries
    rows = share(len(train), ranks)
    neighbors = Neighbors(queries, max(config.neighbors), config.chunk, rows.start)
    del queries
    file = setup.folder / f"neighbors-{world()[0]}.safetensors" if ranks else None
    left = range(neighbors.resume(file), rows.stop)
    with bar("comparing gallery", len(rows), setup.progress, left.start - rows.start) as advance:
        for features in batches(backbone, train, rows=left, **setup.sight):
            neighbors.add(features)
            advance(len(features))
            neighbors.save(file)
    similarity, index = neighbors.nearest()
    if ranks:
        similarity, index = merge_over_ranks(similarity, index)
    predictions = vote(
        similarity,
        train.labels.to(index.device)[index],
        len(train.classes),
        neighbors=config.neighbors,
        temperature=config.temperature,
    )
    rows = share(len(test), ranks)
    labels = test.labels[rows.start : rows.stop].to(index.device)
    correct = torch.stack([(classes == labels).sum() for classes in predictions.values()])
    counts = (sum_over_ranks(correct) if ranks else correct).tolist()
    figures = {
        f"knn_{k}": round(100 * count / len(test), 2)
        for k, count in zip(predictions, counts, strict=True)
    }
    return figures | {"gallery": len(train), "queries": len(test)}


def _refuse_large_k(neighbors: Sequence[int], rows: int, name: str) -> None:
    if max(neighbors) > rows:
        raise ValueError(
            f"{name}={tuple(neighbors)}: k = {max(neighbors)} exceeds the gallery of {rows}; take "
            "smaller k or a larger gallery"
        )


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
    """Predicted class (Q,) for every k: the k most cosine-similar gallery rows vote with weight
    exp(similarity / τ).

    gallery (G, F), labels int64 (G,), queries (Q, F). Exact: see `Neighbors`.
    Raises ValueError if a k exceeds the gallery, or if labels and gallery differ in length.
    """
    _refuse_large_k(neighbors, len(gallery), "neighbors")
    if len(labels) != len(gallery):
        raise ValueError(
            f"labels has {len(labels)} entries for a gallery of {len(gallery)}: give one a row"
        )
    nearest = Neighbors(queries, max(neighbors), chunk)
    nearest.add(gallery)
    similarity, index = nearest.nearest()
    return vote(similarity, labels[index], classes, neighbors=neighbors, temperature=temperature)


@torch.no_grad()
def vote(
    similarity: Tensor,
    labels: Tensor,
    classes: int,
    *,
    neighbors: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:
    """Predicted class (Q,) for every k, of queries whose nearest rows have `similarity` (Q, k),
    falling, and `labels`."""
    predictions: dict[int, list[Tensor]] = {k: [] for k in neighbors}
    for near, label in zip(similarity.split(VOTERS), labels.split(VOTERS), strict=True):
        # The nearest weighs 1: nothing overflows, and not all vanish.
        weight = ((near - near[:, :1]) / temperature).exp()
        for k in neighbors:
            votes = weight.new_zeros(len(near), classes)
            votes.scatter_add_(1, label[:, :k], weight[:, :k])
            predictions[k].append(votes.argmax(1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


class Neighbors:
    """The k nearest rows, by cosine similarity, of a gallery that is handed over in blocks and
    never held.

    Exact: every similarity is computed in float32. Which of equally near rows count, where not all
    can, is not fixed.

    Args:
        queries: (Q, F), on the device where they are to be compared.
        k: how many neighbours to keep of each.
        chunk: sets the memory, 16·chunk² bytes and some: chunk / 2 queries meet 8·chunk rows at a
            time.
        first: index in the whole gallery of the row that comes first here.

    Memory: a copy of the queries, 12 bytes for each of their neighbours, `chunk`'s and two blocks
    of gallery.
    """

    def __init__(self, queries: Tensor, k: int, chunk: int = 2048, first: int = 0):
        self.queries, self.k = _normalized("queries", queries), k
        self.query_chunk, self.gallery_block = max(1, chunk // 2), 8 * chunk
        #: (Q, k), falling; -inf where fewer than k rows have been compared
        self.similarity = torch.full((len(queries), k), -torch.inf, device=queries.device)
        #: int64 (Q, k), places in the gallery
        self.index = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        self.next_row = first  #: the row to be compared next
        self._waiting: list[Tensor] = []  # rows that do not fill a block yet
        self._saved_at = time.monotonic()

    @torch.no_grad()
    def add(self, gallery: Tensor) -> None:
        """Take the gallery's next rows, (n, F). They are compared as soon as they fill a block."""
        for rows in gallery.split(self.gallery_block):
            self._waiting.append(rows)
            if sum(map(len, self._waiting)) >= self.gallery_block:
                self._compare()

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Similarities (Q, k), falling, and places in the gallery, int64 (Q, k)."""
        self._compare()
        return self.similarity, self.index

    @torch.no_grad()
    def _compare(self) -> None:
        """Compare the rows that wait with all queries."""
        if not self._waiting:
            return
        rows = _normalized("gallery", torch.cat(self._waiting).to(self.queries.device))
        self._waiting = []
        for start in range(0, len(self.queries), self.query_chunk):
            part = slice(start, start + self.query_chunk)
            similarity = self.queries[part] @ rows.T
            similarity, index = similarity.topk(min(self.k, len(rows)))
            self._keep_best(part, similarity, index + self.next_row)
        self.next_row += len(rows)

    def _keep_best(self, part: slice, similarity: Tensor, index: Tensor) -> None:
        """Of the neighbours so far and these further ones keep the k nearest."""
        similarity = torch.cat([self.similarity[part], similarity], 1)
        index = torch.cat([self.index[part], index], 1)
        self.similarity[part], place = similarity.topk(self.k)
        self.index[part] = index.gather(1, place)

    def merge(self, other: "Neighbors") -> None:
        """Add what `other` has found for the same queries in other rows of the gallery."""
        similarity, index = other.nearest()
        if len(index) != len(self.index):
            raise ValueError(
                f"other has {len(index)} queries, and this {len(self.index)}: give one that has "
                "the same queries"
            )
        self._compare()
        self._keep_best(slice(None), similarity, index)

    def save(self, file: Path | None) -> None:
        """Keep what the compared rows gave, once a minute at most; rows that wait are left out."""
        if file and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            row = torch.tensor(self.next_row)
            _write(file, {"similarity": self.similarity, "index": self.index, "seen": row})
            self._saved_at = time.monotonic()

    def resume(self, file: Path | None) -> int:
        """Go on from what was saved, if anything was; returns the row to be compared next."""
        if file and file.exists():
            state = safetensors.torch.load_file(file, device=str(self.queries.device))
            self.similarity, self.index = state["similarity"], state["index"]
            self.next_row = int(state["seen"])
        return self.next_row


def merge_over_ranks(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of all ranks' rows to this rank's share of the queries, from those that each
    found in its own.

    similarity and index (Q, k) are for all queries, as `Neighbors.nearest` gives them; every rank
    calls this. Memory: as much again as is given, twice.
    """
    size, k = world()[1], index.shape[1]
    if size == 1:
        return similarity, index
    queries = len(share(len(index)))
    tables = []
    for table in (similarity, index):
        received = table.new_empty(size * queries, k)
        counts = [len(rows) for rows in shares(len(index), size)]
        dist.all_to_all_single(received, table.contiguous(), [queries] * size, counts)
        tables.append(received.view(size, queries, k).transpose(0, 1).flatten(1))
    similarity, place = tables[0].topk(k)
    return similarity, tables[1].gather(1, place)


@torch.no_grad()
def _normalized(name: str, features: Tensor) -> Tensor:
    """Rows of length 1, float32; a row of zeros stays one. Raises ValueError for NaN and infinite
    features."""
    length = torch.linalg.vector_norm(features.float(), dim=1, keepdim=True)
    if not bool(length.isfinite().all()):
        raise ValueError(
            f"{name} holds features that are not finite: look at the backbone's weights, or use "
            "precision fp32"
        )
    return features / length.clamp_min_(1e-12)


def _write(path: Path, tables: dict[str, Tensor]) -> None:
    with atomic_write(path) as file:
        file.write(safetensors.torch.save({name: x.cpu() for name, x in tables.items()}))
