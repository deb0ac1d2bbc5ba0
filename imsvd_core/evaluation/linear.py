"""The linear probe: one linear classifier on frozen representations."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imsvd_core.data.batch import Batch
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.order import Order
from imsvd_core.engine.trainer import Trainer
from imsvd_core.evaluation.features import (
    Images,
    batches,
    chosen,
    embed,
    fingerprint,
    fingerprint_of,
    share,
    sum_over_ranks,
)
from imsvd_core.methods.base import Method
from imsvd_core.networks import represent
from imsvd_core.system import signals
from imsvd_core.system.config import config_hash, essential, plain
from imsvd_core.system.devices import PRECISIONS, pick_device
from imsvd_core.system.progress import bar
from imsvd_core.views import EvalView, View, ViewConfig


@dataclass(frozen=True)
class LinearConfig:
    """How the classifier is trained."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", lr=0.02, weight_decay=1e-6)
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100, batch_size=256))
    augment: bool = False
    """See the training images through `view`, anew in every epoch; else embed them once and train on those features."""
    view: ViewConfig = field(default_factory=lambda: ViewConfig(size=32, scale=(0.8, 1.0)))
    normalize: bool = False
    """Scale every feature to unit variance over the training set first (only without `augment`)."""
    train_images: int | None = None
    """Training images to use, class-balanced; all of them by default."""
    test_images: int | None = None
    """Test images to use, class-balanced; all of them by default."""

    def __post_init__(self) -> None:
        if self.normalize and self.augment:
            raise ValueError(
                "normalize=True needs features that are computed once: set augment=False"
            )
        for name in ("train_images", "test_images"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1, or None for all"
                )

    def choose(self, train: Images, test: Images, name: str = "linear") -> tuple[Images, Images]:
        """The images that are used. Raises ValueError, naming the setting, where there are not as many."""
        return chosen(self, train, test, name)


class Probe(Method):
    """A linear classifier on features."""

    whole_batch = False

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits (n, classes) and labels (n,)."""
        (features,) = batch.views
        return self.head(features), batch.labels

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        logits, labels = embeddings
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": cross_entropy(logits.float(), labels), "accuracy": accuracy}


def evaluate(
    backbone: nn.Module,
    data: tuple[Images, Images],
    config: LinearConfig,
    *,
    view: EvalView,
    run_dir: Path | str,
    progress: bool = True,
) -> dict[str, float]:
    """Top-1 accuracy in percent of the classifier as it is after the **last** epoch, on train features and test.

    The backbone is frozen, batch-norm statistics too. Each combination of backbone, data and settings trains in a
    folder of its own under `run_dir`, and is resumed there. Streamed images are known by their names, and decoded anew
    in every epoch if `config.augment`; else every rank holds the whole table of training features (ImageNet's at 2048:
    10.5 GB). In a process group the ranks share every batch, and the test images.

    Returns {"linear": …, "linear_top5": … (of more than five classes), "seconds": of training, …}. Raises ValueError
    for subsets that the data cannot give, and what `Loop` raises; Stopped after a notice, with what is trained saved.
    """
    train, test = config.choose(*data)
    device, precision = pick_device(config.loop.device), PRECISIONS[config.loop.precision]
    backbone = backbone.to(device).eval().requires_grad_(False)
    labels, scale = train.labels.to(device), torch.ones((), device=device)
    if not config.augment:
        with signals.interruptible():
            features = embed(
                backbone,
                train,
                view,
                device=device,
                precision=precision,
                ranks=True,
                progress=progress,
                what="embedding training images",
            )
        if config.normalize:
            scale = features.std(0).clamp_min(1e-6)
            features /= scale

    def load(order: Order) -> Iterator[Batch]:
        if not config.augment:
            for _, indices in order:
                rows = indices.to(device)
                yield Batch((features[rows],), labels[rows], rows)
            return
        for batch in train.views(order, View(config.view), device=device):
            yield batch._replace(views=(represent(backbone, batch.views, device, precision),))

    width = represent(
        backbone, [view.finish(torch.zeros(1, 3, view.size, view.size, dtype=torch.uint8))], device
    ).shape[1]
    head = nn.Linear(width, len(train.classes))
    nn.init.normal_(
        head.weight, std=0.01, generator=torch.Generator().manual_seed(config.loop.seed)
    )
    nn.init.zeros_(head.bias)

    # Subsets are told by their images; those for the test do not touch the training.
    kept = {
        name: value
        for name, value in plain(config).items()
        if name not in ("train_images", "test_images")
    }
    settings = essential(
        {
            "evaluation": "linear",
            **kept,
            "data": [train.title, list(train.classes)],
            "images": fingerprint_of(train),
            "eval_view": plain(vars(view)),
            "backbone": fingerprint(*backbone.state_dict().values()),
        }
    )
    trainer = Trainer(
        Probe(head),
        len(train),
        config.loop,
        config.optim,
        Path(run_dir) / config_hash(settings),
        settings=settings,
        progress=progress,
    )
    for _ in trainer.train(load(trainer.order.since(trainer.step))):
        pass
    trainer.refuse_unfinished()
    with signals.interruptible():
        right = _test(head.eval(), scale, backbone, test, view, device, precision, progress)
    return {name: round(100 * count / len(test), 2) for name, count in right.items()} | {
        "epochs": config.loop.epochs,
        "train_images": len(train),
        "test_images": len(test),
        "seconds": round(trainer.seconds, 1),
    }


@torch.no_grad()
def _test(
    head: nn.Linear,
    scale: Tensor,
    backbone: nn.Module,
    test: Images,
    view: EvalView,
    device: torch.device,
    precision: torch.dtype | None,
    progress: bool,
) -> dict[str, int]:
    """How many test images have their class first, and among the first five; each rank looks at its share of them."""
    names, rows = (
        ("linear", "linear_top5") if head.out_features > 5 else ("linear",),
        share(len(test)),
    )
    labels, done, right = (
        test.labels.to(device),
        rows.start,
        torch.zeros(len(names), dtype=torch.int64, device=device),
    )
    with bar("testing", len(rows), progress) as advance:
        for features in batches(backbone, test, view, rows, device=device, precision=precision):
            logits, truth = head(features / scale), labels[done : done + len(features), None]
            right[0] += (logits.argmax(1, keepdim=True) == truth).sum()
            if len(names) > 1:
                right[1] += (logits.topk(5).indices == truth).sum()
            done += len(features)
            advance(len(features))
    return dict(zip(names, sum_over_ranks(right).tolist(), strict=True))
