"""The linear probe: one linear classifier on frozen representations."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imsvd_core.datasets import ImageData
from imsvd_core.evaluation.features import embed
from imsvd_core.loop import PRECISIONS, Loop, LoopConfig, essential, pick_device
from imsvd_core.optim import OptimConfig
from imsvd_core.results import config_hash, plain
from imsvd_core.views import EvalView, View, ViewConfig


@dataclass(frozen=True)
class LinearConfig:
    """How the classifier is trained."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="sgd", lr=0.02, weight_decay=1e-6))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100, batch_size=256))
    augment: bool = False
    """See the training images through `view`, anew in every epoch; else embed them once and train on those features."""
    view: ViewConfig = field(default_factory=lambda: ViewConfig(size=32, scale=(0.8, 1.0)))
    normalize: bool = False
    """Scale every feature to unit variance over the training set first (only without `augment`)."""

    def __post_init__(self) -> None:
        if self.normalize and self.augment:
            raise ValueError("normalize=True needs features that are computed once: set augment=False")


def evaluate(backbone: nn.Module, data: tuple[ImageData, ImageData], config: LinearConfig, *, view: EvalView,
             run_dir: Path | str, progress: bool = True) -> dict[str, float]:
    """Top-1 accuracy in percent of the classifier as it is after the **last** epoch, on train features and test.

    The backbone is frozen, batch-norm statistics too. Each combination of backbone, data and settings trains in a
    folder of its own under `run_dir`, and is resumed there. Returns {"linear": …, "seconds": of training, …}.
    """
    train, test = data
    if not isinstance(train, ImageData):
        raise ValueError(f"data={train.name!r} is streamed, and the probe needs its training images in memory: give folder:PATH")
    device = pick_device(config.loop.device)
    precision = PRECISIONS[config.loop.precision]
    backbone = backbone.to(device).eval().requires_grad_(False)
    test_features = embed(backbone, test, view, device=device, precision=precision)
    labels = train.labels.to(device)
    if not config.augment:
        features = embed(backbone, train, view, device=device, precision=precision)
        if config.normalize:
            scale = features.std(0).clamp_min(1e-6)
            features, test_features = features / scale, test_features / scale

        def inputs(indices: Tensor, generator: torch.Generator) -> Tensor:
            return features[indices]
    else:
        images, augment = train.images.to(device), View(config.view)

        @torch.no_grad()
        def inputs(indices: Tensor, generator: torch.Generator) -> Tensor:
            return backbone(augment(images[indices], generator).contiguous(memory_format=torch.channels_last)).float()

    head = nn.Linear(test_features.shape[1], len(train.classes))
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(config.loop.seed))
    nn.init.zeros_(head.bias)

    def step(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        logits, truth = head(inputs(indices, generator)), labels[indices]
        return {"loss": cross_entropy(logits.float(), truth), "accuracy": (logits.argmax(1) == truth).float().mean()}

    settings = essential({"evaluation": "linear", **plain(config), "data": [train.title, list(train.classes)],
                          "images": _fingerprint(train.images, train.labels), "eval_view": plain(vars(view)),
                          "backbone": _fingerprint(*backbone.state_dict().values())})
    loop = Loop(step, {"head": head}, len(train), config.loop, config.optim, Path(run_dir) / config_hash(settings),
                settings=settings, progress=progress)
    for _ in loop:
        pass
    loop.refuse_unfinished()
    head.eval()
    with torch.no_grad():
        right = head(test_features).argmax(1) == test.labels.to(device)
    return {"linear": round(100 * right.float().mean().item(), 2), "epochs": config.loop.epochs,
            "train_images": len(train), "test_images": len(test), "seconds": round(loop.seconds, 1)}


def _fingerprint(*tensors: Tensor) -> str:
    """A few digits that change with any of the numbers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
