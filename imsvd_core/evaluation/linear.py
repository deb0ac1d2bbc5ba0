"""The linear probe: one linear classifier on frozen representations."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imsvd_core.data import Images
from imsvd_core.data.batch import Batch, OrderLike
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.trainer import Trainer
from imsvd_core.evaluation.base import Color, Evaluation, Setup
from imsvd_core.evaluation.features import (
    batches,
    embed,
    fingerprint,
    share,
    sum_over_ranks,
)
from imsvd_core.methods.base import Method
from imsvd_core.networks import represent
from imsvd_core.system import checks, signals
from imsvd_core.system.config import config_hash, plain
from imsvd_core.system.devices import PRECISIONS, pick_device
from imsvd_core.system.progress import bar
from imsvd_core.views import View, ViewConfig


@dataclass(frozen=True)
class LinearConfig(Evaluation):
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

    evaluation = "linear"

    def __post_init__(self) -> None:
        if self.normalize and self.augment:
            raise ValueError(
                "normalize=True needs features that are computed once: set augment=False"
            )
        checks.at_least(self, train_images=1, test_images=1)

    def normalised(self, mean: Color, std: Color) -> "LinearConfig":
        return replace(self, view=replace(self.view, mean=mean, std=std))

    def judge(
        self, backbone: nn.Module, data: tuple[Images, Images], setup: Setup
    ) -> dict[str, float]:
        """Top-1 accuracy in percent of the classifier as it is after the **last** epoch, on train
        features and test.

        The backbone is frozen, batch-norm statistics too. Each combination of backbone, data and
        settings trains in a folder of its own under `setup.folder`, and is resumed there. Streamed
        images are known by their names, and decoded anew in every epoch if `augment`; else every
        rank holds the whole table of training features (ImageNet's at 2048: 10.5 GB). In a process
        group the ranks share every batch, and the test images.

        Returns {"linear": …, "linear_top5": … (of more than five classes), "seconds": of training,
        …}. Raises what `Trainer` raises; Stopped after a notice, with what is trained saved.
        """
        train, test = data
        device, precision = pick_device(self.loop.device), PRECISIONS[self.loop.precision]
        setup = replace(setup, device=device, precision=precision)
        backbone = backbone.to(device).eval().requires_grad_(False)
        blank = torch.zeros(1, 3, setup.view.size, setup.view.size, dtype=torch.uint8)
        width = represent(backbone, [setup.view.finish(blank)], device).shape[1]
        probe = Probe(width, len(train.classes), self.loop.seed)
        # Subsets are known by their images; the test's do not matter.
        settings = self.identity(backbone) | {
            "data": [train.title, list(train.classes)],
            "images": fingerprint(*train.identity()),
            "eval_view": plain(vars(setup.view)),
        }
        del settings["train_images"], settings["test_images"]
        trainer = Trainer(
            probe,
            len(train),
            self.loop,
            self.optim,
            setup.folder / config_hash(settings),
            settings=settings,
            progress=setup.progress,
        )
        order = trainer.order.since(trainer.step)
        pieces, scale = _training_batches(backbone, train, self, setup, order)
        for _ in trainer.train(pieces):
            pass
        trainer.refuse_unfinished()
        with signals.interruptible():
            correct = _test(probe.head.eval(), scale, backbone, test, setup)
        return {name: round(100 * count / len(test), 2) for name, count in correct.items()} | {
            "epochs": self.loop.epochs,
            "train_images": len(train),
            "test_images": len(test),
            "seconds": round(trainer.seconds, 1),
        }


def _training_batches(
    backbone: nn.Module, train: Images, config: LinearConfig, setup: Setup, order: OrderLike
) -> tuple[Iterator[Batch], Tensor]:
    """The features of every piece of the order, and what those of the test are divided by."""
    scale = torch.ones((), device=setup.device)
    if config.augment:
        return _augmented(backbone, train, View(config.view), setup, order), scale
    with signals.interruptible():
        features = embed(
            backbone,
            train,
            **setup.sight,
            ranks=True,
            progress=setup.progress,
            title="embedding training images",
        )
    if config.normalize:
        scale = features.std(0).clamp_min(1e-6)
        features /= scale
    return _embedded(features, train.labels.to(setup.device), order), scale


def _embedded(features: Tensor, labels: Tensor, order: OrderLike) -> Iterator[Batch]:
    """Features (N, F) and labels (N,) of images that were embedded once, piece by piece."""
    for _, indices in order:
        rows = indices.to(features.device)
        yield Batch((features[rows],), labels[rows], rows)


def _augmented(
    backbone: nn.Module, train: Images, view: View, setup: Setup, order: OrderLike
) -> Iterator[Batch]:
    """Features of images that are seen anew, through a random view, whenever they are wanted."""
    for batch in train.views(order, view, device=setup.device):
        (images,) = batch.views
        features = represent(backbone, [images], setup.device, setup.precision)
        yield batch._replace(views=(features,))


class Probe(Method):
    """A linear classifier on features."""

    whole_batch = False

    def __init__(self, width: int, classes: int, seed: int):
        super().__init__()
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits (n, classes) and labels (n,)."""
        (features,) = batch.views
        return self.head(features), batch.labels

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        logits, labels = embeddings
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": cross_entropy(logits.float(), labels), "accuracy": accuracy}


@torch.no_grad()
def _test(
    head: nn.Linear, scale: Tensor, backbone: nn.Module, test: Images, setup: Setup
) -> dict[str, int]:
    """How many test images have their class first, and among the first five; each rank looks at its
    share of them."""
    names = ("linear", "linear_top5") if head.out_features > 5 else ("linear",)
    rows, labels = share(len(test)), test.labels.to(setup.device)
    done, correct = rows.start, torch.zeros(len(names), dtype=torch.int64, device=setup.device)
    with bar("testing", len(rows), setup.progress) as advance:
        for features in batches(backbone, test, rows=rows, **setup.sight):
            logits, label = head(features / scale), labels[done : done + len(features), None]
            correct[0] += (logits.argmax(1, keepdim=True) == label).sum()
            if len(names) > 1:
                correct[1] += (logits.topk(5).indices == label).sum()
            done += len(features)
            advance(len(features))
    return dict(zip(names, sum_over_ranks(correct).tolist(), strict=True))
