"""Weighted k-nearest-neighbour classification: no training, so it judges the representation alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from imsvd_core.datasets import ImageData
from imsvd_core.evaluation.features import embed
from imsvd_core.views import EvalView


@dataclass(frozen=True)
class KNNConfig:
    """The protocol of Table II; temperature and votes as in the authors' code (Wu et al., 2018)."""

    neighbors: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    chunk: int = 2048
    """Rows of queries, and of the gallery, that are compared at once: memory is chunk², not gallery × queries."""
    gallery: int | None = None
    """Training images to use, class-balanced; all of them by default."""
    queries: int | None = None
    """Test images to use, class-balanced; all of them by default."""

    def __post_init__(self) -> None:
        if not self.neighbors or min(self.neighbors) < 1 or len(set(self.neighbors)) < len(self.neighbors):
            raise ValueError(f"neighbors={self.neighbors} must be different counts ≥ 1 (the paper's: 20, 200)")
        if not self.temperature > 0 or self.chunk < 1:
            raise ValueError(f"temperature={self.temperature} and chunk={self.chunk} must be positive")

    def check(self, train: ImageData, test: ImageData, name: str = "knn") -> None:
        """Raise ValueError, naming the setting, if the data cannot serve this protocol."""
        gallery = len(train) if self.gallery is None else self.gallery
        if not 1 <= gallery <= len(train):
            raise ValueError(f"{name}.gallery={self.gallery} must lie between 1 and the {len(train)} training images")
        if self.queries is not None and not 1 <= self.queries <= len(test):
            raise ValueError(f"{name}.queries={self.queries} must lie between 1 and the {len(test)} test images")
        if max(self.neighbors) > gallery:
            raise ValueError(f"{name}.neighbors={self.neighbors}: k = {max(self.neighbors)} exceeds the gallery of {gallery}; "
                             "take smaller k or a larger gallery")


def evaluate(backbone: nn.Module, data: tuple[ImageData, ImageData], config: KNNConfig, *, view: EvalView,
             device: torch.device | str = "cpu", precision: torch.dtype | None = None) -> dict[str, float]:
    """Top-1 accuracy in percent for every k: {"knn_20": …, "knn_200": …}, with the sizes that gave it."""
    train, test = data
    config.check(train, test)
    gallery = train if config.gallery is None else train.subset(config.gallery)
    queries = test if config.queries is None else test.subset(config.queries)
    features = [embed(backbone, part, view, device=device, precision=precision) for part in (gallery, queries)]
    found = weighted_knn(features[0], gallery.labels.to(device), features[1], len(train.classes),
                         neighbors=config.neighbors, temperature=config.temperature, chunk=config.chunk)
    truth = queries.labels.to(device)
    accuracy = {f"knn_{k}": round(100 * (predicted == truth).float().mean().item(), 2) for k, predicted in found.items()}
    return accuracy | {"gallery": len(gallery), "queries": len(queries)}


@torch.no_grad()
def weighted_knn(gallery: Tensor, labels: Tensor, queries: Tensor, classes: int, *, neighbors: Sequence[int] = (20, 200),
                 temperature: float = 0.07, chunk: int = 2048) -> dict[int, Tensor]:
    """Predicted class (Q,) for every k: the k most cosine-similar gallery rows vote with weight exp(similarity / τ).

    gallery (G, F), labels int64 (G,), queries (Q, F). Exact: the best k are carried over gallery chunks.
    Raises ValueError if a k exceeds the gallery, or if labels and gallery differ in length.
    """
    most = max(neighbors)
    if most > len(gallery):
        raise ValueError(f"neighbors={tuple(neighbors)}: k = {most} exceeds the gallery of {len(gallery)}; "
                         "take smaller k or a larger gallery")
    if len(labels) != len(gallery):
        raise ValueError(f"labels has {len(labels)} entries for a gallery of {len(gallery)}: need one for each row")
    gallery = normalize(gallery, dim=1)
    predictions: dict[int, list[Tensor]] = {k: [] for k in neighbors}
    for some in queries.split(chunk):
        some = normalize(some, dim=1)
        best, which = some.new_empty(len(some), 0), labels.new_empty(len(some), 0)
        for start in range(0, len(gallery), chunk):
            similarity = some @ gallery[start:start + chunk].T
            near, place = similarity.topk(min(most, similarity.shape[1]), dim=1)
            best, keep = torch.cat([best, near], 1).topk(min(most, best.shape[1] + near.shape[1]), dim=1)
            which = torch.cat([which, labels[start + place]], 1).gather(1, keep)
        weight = ((best - best[:, :1]) / temperature).exp()  # the nearest weighs 1: nothing overflows or all vanishes
        for k in neighbors:
            votes = weight.new_zeros(len(some), classes).scatter_add_(1, which[:, :k], weight[:, :k])
            predictions[k].append(votes.argmax(1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}
