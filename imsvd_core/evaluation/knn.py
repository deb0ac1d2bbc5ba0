"""Weighted k-nearest-neighbour classification: no training, so the representation alone counts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
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
    sum_over_ranks,
    write_tensors,
)
from imsvd_core.evaluation.neighbors import Neighbors, merge_over_ranks
from imsvd_core.system import checks, signals
from imsvd_core.system.config import config_hash, plain
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

    def judge(
        self, backbone: nn.Module, data: tuple[Images, Images], setup: Setup
    ) -> dict[str, float]:
        """See `evaluate`; every rank has its share of gallery and queries.

        The queries' features, once there, and the neighbours so far are kept in a folder beside
        `setup.folder` (for ImageNet 0.5 GB, and 0.1 GB on every further rank), which is removed
        when the result is complete. Raises ValueError, too, where another process holds it.
        """
        train, test = data
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
    train, test = config.choose(*data, ranks=False)
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
    _refuse_large_k(config.neighbors, len(train), "knn.neighbors")
    path = setup.folder / "queries.safetensors"
    if ranks and path.exists():
        queries = safetensors.torch.load_file(path, device=str(setup.device))["features"]
    else:
        queries = embed(
            backbone,
            test,
            **setup.sight,
            ranks=ranks,
            progress=setup.progress,
            title="embedding queries",
        )
        if ranks:
            on_rank_0(write_tensors)(path, {"features": queries})
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
