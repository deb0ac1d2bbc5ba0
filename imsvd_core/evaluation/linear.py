"""The linear probe: one linear classifier on frozen representations."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imsvd_core.data import Images
from imsvd_core.data.batch import Batch, OrderLike
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.trainer import Trainer
from imsvd_core.evaluation.base import Color, Setup
from imsvd_core.evaluation.features import (
    batches,
    embed,
    fingerprint,
    share,
    subset,
    sum_over_ranks,
)
from imsvd_core.methods.base import Method
from imsvd_core.networks import represent
from imsvd_core.system import checks, signals
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
    """See the training images through `view`, anew in every epoch; else embed them once and train
    on those features."""
    view: ViewConfig = field(default_factory=lambda: ViewConfig(size=32, scale=(0.8, 1.0)))
    normalize: bool = False
    """Scale every feature to unit variance over the training set first (only without `augment`)."""
    train_images: int | None = None
    """Training images to use, class-balanced; all of them by default."""
    test_images: int | None = None
    """Test images to use, class-balanced; all of them by default."""

    evaluation: ClassVar[str] = "linear"
    layout: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.normalize and self.augment:
            raise ValueError(
                "normalize=True needs features that are computed once: set augment=False"
            )
        checks.at_least(self, train_images=1, test_images=1)

    def choose(self, train: Images, test: Images) -> tuple[Images, Images]:
        """The images that are used. Raises ValueError, naming the setting, where there are not as
        many."""
        return (
            subset(train, self.train_images, "linear.train_images"),
            subset(test, self.test_images, "linear.test_images"),
        )

    def normalised(self, mean: Color, std: Color) -> "LinearConfig":
        return replace(self, view=replace(self.view, mean=mean, std=std))

    def run(
        self, backbone: nn.Module, data: tuple[Images, Images], setup: Setup
    ) -> dict[str, float]:
        """See `evaluate`."""
        return evaluate(
            backbone, data, self, view=setup.view, run_dir=setup.folder, progress=setup.progress
        )


def evaluate(
    backbone: nn.Module,
    data: tuple[Images, Images],
    config: LinearConfig,
    *,
    view: EvalView,
    run_dir: Path | str,
    progress: bool = True,
) -> dict[str, float]:
    """Top-1 accuracy in percent of the classifier as it is after the **last** epoch, on train
    features and test.

    The backbone is frozen, batch-norm statistics too. Each combination of backbone, data and
    settings trains in a folder of its own under `run_dir`, and is resumed there. Streamed images
    are known by their names, and decoded anew in every epoch if `config.augment`; else every rank
    holds the whole table of training features (ImageNet's at 2048: 10.5 GB). In a process group the
    ranks share every batch, and the test images.

    Returns {"linear": …, "linear_top5": … (of more than five classes), "seconds": of training, …}.
    Raises ValueError for subsets that the data cannot give, and what `Trainer` raises; Stopped
    after a notice, with what is trained saved.
    """
    train, test = config.choose(*data)
    device, precision = pick_device(config.loop.device), PRECISIONS[config.loop.precision]
    backbone = backbone.to(device).eval().requires_grad_(False)
    source = _source(backbone, train, view, config, device, progress)
    blank = view.finish(torch.zeros(1, 3, view.size, view.size, dtype=torch.uint8))
    width = represent(backbone, [blank], device).shape[1]
    settings = _training_settings(backbone, train, view, config)
    head = _new_head(width, len(train.classes), config.loop.seed)
    trainer = Trainer(
        Probe(head),
        len(train),
        config.loop,
        config.optim,
        Path(run_dir) / config_hash(settings),
        settings=settings,
        progress=progress,
    )
    for _ in trainer.train(source.batches(trainer.order.since(trainer.step))):
        pass
    trainer.refuse_unfinished()
    with signals.interruptible():
        correct = _test(
            head.eval(), source.scale, backbone, test, view, device, precision, progress
        )
    return {name: round(100 * count / len(test), 2) for name, count in correct.items()} | {
        "epochs": config.loop.epochs,
        "train_images": len(train),
        "test_images": len(test),
        "seconds": round(trainer.seconds, 1),
    }


class Features:
    """Training images that were embedded once: features (N, F) and labels (N,) on the device of the
    training."""

    def __init__(self, features: Tensor, labels: Tensor, normalize: bool):
        self.features, self.labels = features, labels
        #: what the test's features are divided by
        self.scale = torch.ones((), device=features.device)
        if normalize:
            self.scale = features.std(0).clamp_min(1e-6)
            self.features /= self.scale

    def batches(self, order: OrderLike) -> Iterator[Batch]:
        """The features of every piece of the order."""
        for _, indices in order:
            rows = indices.to(self.features.device)
            yield Batch((self.features[rows],), self.labels[rows], rows)


class AugmentedImages:
    """Training images that are seen anew, through a random view, whenever they are wanted."""

    def __init__(
        self,
        backbone: nn.Module,
        images: Images,
        view: View,
        device: torch.device,
        precision: torch.dtype | None,
    ):
        self.backbone, self.images, self.view = backbone, images, view
        self.device, self.precision = device, precision
        self.scale = torch.ones((), device=device)

    def batches(self, order: OrderLike) -> Iterator[Batch]:
        """The features of every piece of the order."""
        for batch in self.images.views(order, self.view, device=self.device):
            features = represent(self.backbone, batch.views, self.device, self.precision)
            yield batch._replace(views=(features,))


def _source(
    backbone: nn.Module,
    train: Images,
    view: EvalView,
    config: LinearConfig,
    device: torch.device,
    progress: bool,
) -> Features | AugmentedImages:
    precision = PRECISIONS[config.loop.precision]
    if config.augment:
        return AugmentedImages(backbone, train, View(config.view), device, precision)
    with signals.interruptible():
        features = embed(
            backbone,
            train,
            view,
            device=device,
            precision=precision,
            ranks=True,
            progress=progress,
            title="embedding training images",
        )
    return Features(features, train.labels.to(device), config.normalize)


def _training_settings(
    backbone: nn.Module, train: Images, view: EvalView, config: LinearConfig
) -> dict[str, Any]:
    """What fixes the classifier. Subsets are known by their images; the test's do not matter."""
    settings = plain(config)
    del settings["train_images"], settings["test_images"]
    settings |= {
        "evaluation": config.evaluation,
        "data": [train.title, list(train.classes)],
        "images": fingerprint(*train.identity()),
        "eval_view": plain(vars(view)),
        "backbone": fingerprint(*backbone.state_dict().values()),
    }
    return essential(settings)


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


def _new_head(width: int, classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


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
    """How many test images have their class first, and among the first five; each rank looks at its
    share of them."""
    names = ("linear", "linear_top5") if head.out_features > 5 else ("linear",)
    rows, labels = share(len(test)), test.labels.to(device)
    done, correct = rows.start, torch.zeros(len(names), dtype=torch.int64, device=device)
    with bar("testing", len(rows), progress) as advance:
        for features in batches(backbone, test, view, rows, device=device, precision=precision):
            logits, label = head(features / scale), labels[done : done + len(features), None]
            correct[0] += (logits.argmax(1, keepdim=True) == label).sum()
            if len(names) > 1:
                correct[1] += (logits.topk(5).indices == label).sum()
            done += len(features)
            advance(len(features))
    return dict(zip(names, sum_over_ranks(correct).tolist(), strict=True))
