"""What a recipe is: one pretraining and the evaluations that belong to it, at three scales."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.methods import IMSVD, MethodConfig
from imsvd_core.networks import NetworkConfig
from imsvd_core.system.config import plain
from imsvd_core.system.devices import fast_precision
from imsvd_core.system.scale import Scale
from imsvd_core.views import CIFAR_MEAN, CIFAR_STD, TwoViewConfig, cifar_views
from imsvd_core.views.config import Interpolation


def watching(gallery: int, queries: int) -> KNNConfig:
    """A kNN that is small enough to accompany a training."""
    return KNNConfig(neighbors=(20,), gallery=gallery, queries=queries)


@dataclass(frozen=True)
class EvalViewConfig:
    """The view that evaluations see: shorter side to `resize`, then the middle `size` of it."""

    resize: int = 32
    size: int = 32
    mean: tuple[float, float, float] = CIFAR_MEAN
    std: tuple[float, float, float] = CIFAR_STD
    interpolation: Interpolation = "bilinear"


@dataclass(frozen=True)
class Recipe:
    """One pretraining and the evaluations that belong to it."""

    method: MethodConfig = field(default_factory=IMSVD)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    views: TwoViewConfig = field(default_factory=cifar_views)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    eval_view: EvalViewConfig = field(default_factory=EvalViewConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    watch: KNNConfig = field(default_factory=lambda: watching(10_000, 2_000))
    """The smaller kNN that accompanies training, before it and after every epoch."""
    look: int = 2048
    """Test images whose codes and joint matrix accompany training."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    data: str = "auto"
    """Data set: auto, cifar10, cifar100, fashion-mnist, attributes, folder:PATH (in memory) or
    tree:PATH (streamed). Without class folders or a test split kNN is left out."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An unreadable image file ends the run, or is passed over: left out in memory, replaced by the
    next of its class if streamed; evaluations leave it out."""
    samples: int | None = None
    """Training images to use, class-balanced; all of them by default."""
    init: Path | None = None
    """Anybody's file of weights, or the folder of a finished run, whose backbone this training
    starts from, on a schedule of its own; by default from random weights."""
    weights_key: str | None = None
    """Which network of `init`, where that holds several: its name there, or a part of it."""

    def __post_init__(self) -> None:
        self.method.check(self.network)
        if self.weights_key and not self.init:
            raise ValueError(f"weights_key={self.weights_key!r} chooses in a file: give its init")

    def training_settings(self) -> dict[str, Any]:
        """What fixes the training: all but what judges it, and may change after it, and how spoilt
        files are met."""
        settings = plain(self)
        for name in ("knn", "watch", "look", "linear", "eval_view", "on_corrupt"):
            del settings[name]
        return settings


def fast_here(settings: Any, scale: Scale) -> Any:
    """The settings, of small scales with fp32 for bf16 on a machine that would emulate bf16."""
    if scale == "full" or fast_precision() == "bf16":
        return settings
    if isinstance(settings, type) or not is_dataclass(settings):
        return settings
    parts = {
        field.name: fast_here(getattr(settings, field.name), scale) for field in fields(settings)
    }
    if isinstance(settings, LoopConfig) and settings.precision == "bf16":
        parts["precision"] = "fp32"
    return replace(settings, **parts)
