"""Recipes: every run of the book as a frozen dataclass. No hyper-parameter is named anywhere else.

A recipe exists at three scales: `smoke` (seconds: does it run?), `laptop` (minutes on two CPU cores) and `full`
(the authors' setting, hours on GPUs). `IMSVD_SCALE` chooses, `laptop` by default.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial, update_wrapper
from typing import Any, Literal, get_args

from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation.detection.detector import DetectorConfig
from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.evaluation.svm import SVMConfig
from imsvd_core.methods import BYOL, IMSVD, BarlowTwins, MethodConfig, SwAV, VICReg
from imsvd_core.networks import NetworkConfig
from imsvd_core.system.config import plain
from imsvd_core.system.devices import fast_precision
from imsvd_core.views import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TwoViewConfig,
    ViewConfig,
    cifar_multicrop_views,
    cifar_views,
    imagenet_views,
)

Scale = Literal["smoke", "laptop", "full"]
EvaluationConfig = KNNConfig | LinearConfig | SVMConfig | DetectionConfig


@dataclass(frozen=True)
class EvalViewConfig:
    """The view that evaluations see: shorter side to `resize`, then the middle `size` of it."""

    resize: int = 32
    size: int = 32
    mean: tuple[float, float, float] = CIFAR_MEAN
    std: tuple[float, float, float] = CIFAR_STD


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
    watch: KNNConfig = field(
        default_factory=lambda: KNNConfig(neighbors=(20,), gallery=10_000, queries=2_000)
    )
    """The smaller kNN that accompanies training, before it and after every epoch."""
    look: int = 2048
    """Test images whose codes and joint matrix accompany training."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    data: str = "auto"
    """Data set: auto, cifar10, cifar100, fashion-mnist, attributes, folder:PATH (in memory) or tree:PATH (streamed)."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An unreadable image file ends the run, or is passed over: left out in memory, replaced by the next if streamed."""
    samples: int | None = None
    """Training images to use, class-balanced; all of them by default."""

    def __post_init__(self) -> None:
        self.method.check(self.network)

    def training_settings(self) -> dict[str, Any]:
        """What fixes the training: all but what judges it, and may change after it, and how spoilt files are met."""
        settings = plain(self)
        for name in ("knn", "watch", "look", "linear", "eval_view", "on_corrupt"):
            del settings[name]
        return settings


def current_scale() -> Scale:
    """IMSVD_SCALE, or `laptop`. Raises ValueError for any other word."""
    scale = os.environ.get("IMSVD_SCALE", "laptop")
    if scale not in get_args(Scale):
        raise ValueError(f"IMSVD_SCALE={scale!r} must be one of {', '.join(get_args(Scale))}")
    return scale


def recipe(name: str, scale: Scale | None = None) -> Recipe:
    """The recipe `name` at a scale (IMSVD_SCALE's by default). Raises ValueError naming the recipes there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is unknown; there are: {', '.join(RECIPES)}")
    scale = scale or current_scale()
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r} must be one of {', '.join(get_args(Scale))}")
    built = RECIPES[name](scale)
    return built if scale == "full" else _fast_here(built)


def _fast_here(settings: Any) -> Any:
    """The same settings with fp32 for bf16, wherever they train, on a machine that would emulate bf16."""
    if isinstance(settings, LoopConfig):
        return (
            replace(settings, precision=fast_precision())
            if settings.precision == "bf16"
            else settings
        )
    if not is_dataclass(settings):
        return settings
    inner = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return replace(
        settings,
        **{name: _fast_here(value) for name, value in inner.items() if is_dataclass(value)},
    )


def _cifar10(scale: Scale) -> Recipe:
    """IMSVD on CIFAR-10."""
    if (
        scale == "full"
    ):  # ResNet-18 and SGD as in the authors' CIFAR code; bf16 where they used fp16
        probe = ViewConfig(size=32, scale=(0.8, 1.0), mean=CIFAR_MEAN, std=CIFAR_STD)
        return Recipe(
            method=IMSVD(units=32),
            network=NetworkConfig(backbone="resnet18", hidden=(1024, 1024), dim=1024),
            optim=OptimConfig(name="sgd", lr=0.2, weight_decay=5e-4, warmup_epochs=10),
            loop=LoopConfig(epochs=800, batch_size=512),
            eval_view=EvalViewConfig(resize=36, size=32),
            linear=LinearConfig(
                OptimConfig(
                    name="sgd", lr=30.0, weight_decay=0.0, warmup_epochs=0, milestones=(60, 80)
                ),
                LoopConfig(epochs=100, batch_size=256),
                view=probe,
                augment=True,
            ),
        )
    laptop = Recipe(
        method=IMSVD(units=32, temperature=0.25),
        network=NetworkConfig(backbone="narrow", hidden=(1024, 1024), dim=1024),
        optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=1e-4, warmup_epochs=0.5),
        loop=LoopConfig(epochs=2, batch_size=512),
        linear=LinearConfig(
            OptimConfig(name="sgd", lr=0.1, weight_decay=1e-6, warmup_epochs=0),
            LoopConfig(epochs=20, batch_size=256),
            normalize=True,
        ),
    )
    if scale == "laptop":
        return laptop
    return replace(
        laptop,
        method=replace(laptop.method, units=8),
        network=NetworkConfig(backbone="narrow", hidden=(64,), dim=64),
        loop=LoopConfig(epochs=2, batch_size=64, log_every=1),
        samples=256,
        knn=KNNConfig(gallery=400, queries=200),
        watch=KNNConfig(neighbors=(20,), gallery=200, queries=100),
        linear=replace(laptop.linear, loop=LoopConfig(epochs=2, batch_size=64)),
    )


def _vicreg(scale: Scale) -> Recipe:
    """VICReg on CIFAR-10, all else equal."""
    return replace(_cifar10(scale), method=VICReg())


def _barlow_twins(scale: Scale) -> Recipe:
    """Barlow Twins on CIFAR-10, all else equal."""
    return replace(_cifar10(scale), method=BarlowTwins())


def _byol(scale: Scale) -> Recipe:
    """BYOL on CIFAR-10.

    full: by lightly's CIFAR-10 benchmark (200-NN 91.0 after 800 epochs), with the momentum rising
    from 0.99.
    """
    base = _cifar10(scale)
    if scale != "full":
        hidden = 1024 if scale == "laptop" else 64
        return replace(base, method=BYOL(momentum=0.99, predictor_hidden=hidden))
    return replace(
        base,
        method=BYOL(momentum=0.99, predictor_hidden=1024),
        network=NetworkConfig(backbone="resnet18", hidden=(1024,), dim=256),
        optim=OptimConfig(name="sgd", lr=0.24, weight_decay=5e-4, warmup_epochs=0),
    )


def _swav(scale: Scale) -> Recipe:
    """SwAV on CIFAR-10, with four small crops.

    full: the heads, prototypes and rate of lightly's CIFAR-10 benchmark, which has no small crops.
    """
    base = replace(_cifar10(scale), views=cifar_multicrop_views())
    if scale != "full":
        return replace(base, method=SwAV(prototypes=512 if scale == "laptop" else 16))
    return replace(
        base,
        method=SwAV(prototypes=512),
        network=NetworkConfig(backbone="resnet18", hidden=(512,), dim=128),
        optim=OptimConfig(name="adamw", lr=4e-3, weight_decay=1e-6, warmup_epochs=0),
    )


def _units(scale: Scale) -> Recipe:
    """The short run that `book/studies/units.py` repeats for several numbers of units and batch sizes."""
    base = _cifar10(scale)
    shorter = replace(base, loop=replace(base.loop, epochs=100 if scale == "full" else 1))
    if scale == "laptop":
        return replace(
            shorter, samples=25_600, knn=KNNConfig(neighbors=(20,), gallery=10_000, queries=5_000)
        )
    return shorter


def _two_views(scale: Scale) -> Recipe:
    """The short runs that show collapse and what prevents it; an embedding of fewer dimensions than the batch has samples."""
    base = replace(_cifar10(scale), method=VICReg())
    if scale == "full":
        return replace(
            base, network=replace(base.network, dim=256), loop=replace(base.loop, epochs=100)
        )
    laptop = replace(
        base,
        network=NetworkConfig(backbone="narrow", cifar_stem=False, hidden=(512,), dim=128),
        optim=replace(base.optim, warmup_epochs=1),
        loop=LoopConfig(epochs=6, batch_size=256),
        samples=4_096,
        watch=KNNConfig(neighbors=(20,), gallery=4_000, queries=1_000),
    )
    if scale == "laptop":
        return laptop
    return replace(
        laptop,
        network=replace(laptop.network, hidden=(128,), dim=32),
        loop=LoopConfig(epochs=6, batch_size=64, log_every=1),
        samples=256,
        watch=base.watch,
    )


def _imagenet(scale: Scale, epochs: int = 100) -> Recipe:
    """IMSVD on ImageNet, as in the paper (Table I): ResNet-50, 8192-8160, LARS, batches of 2048.

    The rate ends at 0.002, as the text says (the authors' code: at 0.0048); bf16 where they used fp16.
    smoke: a few steps at these widths, of 8 images; laptop: a narrow network on 40 classes of 64-pixel images.
    """
    full = Recipe(
        method=IMSVD(units=80),
        network=NetworkConfig(backbone="resnet50", cifar_stem=False, hidden=(8192,), dim=8160),
        views=imagenet_views(),
        data="tree:imagenet",
        optim=OptimConfig(
            name="lars",
            lr=0.6 * 2048 / 256,
            weight_decay=1e-6,
            warmup_epochs=10,
            final_lr_fraction=0.002 / 4.8,
        ),
        loop=LoopConfig(epochs=epochs, batch_size=2048),
        eval_view=EvalViewConfig(256, 224, IMAGENET_MEAN, IMAGENET_STD),
        watch=KNNConfig(neighbors=(20,), gallery=20_000, queries=5_000),
        linear=LinearConfig(
            OptimConfig(
                name="sgd", lr=0.02, weight_decay=1e-6, warmup_epochs=0, final_lr_fraction=0.0
            ),
            LoopConfig(epochs=100, batch_size=256),
            view=ViewConfig(size=224, scale=(0.2, 1.0)),
            augment=True,
        ),
    )
    if scale == "full":
        return full
    if scale == "smoke":
        few = KNNConfig(neighbors=(5,), gallery=16, queries=8)
        step = LoopConfig(epochs=1, batch_size=8, keep=1, log_every=1)
        return replace(
            full,
            loop=step,
            samples=16,
            knn=few,
            watch=few,
            look=16,
            linear=replace(full.linear, loop=step, train_images=16, test_images=8),
        )
    return replace(
        full,
        method=IMSVD(units=16),
        views=imagenet_views(64),
        data="tree:tiny-imagenet-40",
        network=NetworkConfig(backbone="narrow", cifar_stem=False, hidden=(1024,), dim=1024),
        optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=1e-4, warmup_epochs=0.5),
        loop=LoopConfig(epochs=epochs // 50, batch_size=256),
        eval_view=EvalViewConfig(64, 64, IMAGENET_MEAN, IMAGENET_STD),
        watch=KNNConfig(neighbors=(20,), gallery=4_000, queries=1_000),
        linear=LinearConfig(
            OptimConfig(name="sgd", lr=0.3, weight_decay=1e-6, warmup_epochs=0),
            LoopConfig(epochs=5, batch_size=256),
            view=ViewConfig(size=64, scale=(0.2, 1.0)),
            augment=True,
        ),
    )


@dataclass(frozen=True)
class EvaluationRecipe:
    """One evaluation, of whatever backbone."""

    config: EvaluationConfig
    data: str
    """Data set, as a pretraining's; voc:PATH and coco:PATH for the layouts of VOC and COCO."""
    eval_view: EvalViewConfig = field(default_factory=EvalViewConfig)
    """What kNN and the linear probe see of a test image."""


def evaluation(
    name: str, scale: Scale | None = None, trained: Recipe | None = None
) -> EvaluationRecipe:
    """The evaluation `name` at a scale, of a backbone that was `trained` so: knn and linear as its recipe has them (by default
    ImageNet's), the others as the paper does, all with the normalisation that the backbone knows.

    Raises ValueError naming the evaluations there are.
    """
    if name not in EVALUATIONS and name not in OWN:
        raise ValueError(f"evaluation={name!r} must be one of {', '.join((*OWN, *EVALUATIONS))}")
    trained = trained or recipe("imagenet-100", scale)
    if name in OWN:
        return EvaluationRecipe(getattr(trained, name), trained.data, trained.eval_view)
    scale = scale or current_scale()
    asked = EVALUATIONS[name](scale)
    asked = asked if scale == "full" else _fast_here(asked)
    known = {"mean": trained.eval_view.mean, "std": trained.eval_view.std}
    config = asked.config
    if isinstance(config, LinearConfig):
        config = replace(config, view=replace(config.view, **known))
    elif isinstance(config, SVMConfig):
        config = replace(config, **known)
    elif isinstance(config, DetectionConfig):
        config = replace(config, detector=replace(config.detector, **known))
    return replace(asked, config=config, eval_view=replace(asked.eval_view, **known))


def _imagenet_knn(scale: Scale) -> EvaluationRecipe:
    """kNN on ImageNet (Table II)."""
    own = _imagenet(scale)
    return EvaluationRecipe(
        own.knn, own.data if scale == "full" else "tree:tiny-imagenet-40", own.eval_view
    )


def _imagenet_linear(scale: Scale) -> EvaluationRecipe:
    """Linear probe on ImageNet (Tables I and IV to IX)."""
    return replace(_imagenet_knn(scale), config=_imagenet(scale).linear)


def _places205_linear(scale: Scale) -> EvaluationRecipe:
    """Linear probe on Places205 (Table III). The weight decay is VISSL's."""
    like = _imagenet_linear(scale)
    data = "tree:places205" if like.data == "tree:imagenet" else like.data
    optim = OptimConfig(
        name="sgd", lr=0.01, weight_decay=5e-4, momentum=0.9, warmup_epochs=0, milestones=(5, 10)
    )
    loop = replace(like.config.loop, epochs=1 if scale == "smoke" else 14)
    view = replace(like.config.view, scale=(0.08, 1.0))
    return replace(like, config=replace(like.config, optim=optim, view=view, loop=loop), data=data)


def _voc07_svm(scale: Scale) -> EvaluationRecipe:
    """Support vector machines on VOC07 (Table III)."""
    if scale == "full":
        return EvaluationRecipe(SVMConfig(), "voc:voc07")
    small = SVMConfig(
        pool="mean", resize=128, size=128, jobs=1
    )  # the last map has 7×7 places at 224 pixels only
    if scale == "smoke":
        small = replace(small, costs=(0.1, 1.0), train_images=48, test_images=16)
    return EvaluationRecipe(small, "voc:voc-mini")


def _coco_detection(scale: Scale) -> EvaluationRecipe:
    """Mask R-CNN R50-C4 on COCO, 1× (Table III)."""
    full = DetectionConfig()
    if scale == "full":
        return EvaluationRecipe(full, "coco:coco")
    small = DetectorConfig(
        min_sizes=(192, 224, 256),
        test_size=224,
        max_size=384,
        anchors=(16, 32, 64, 128, 256),
        train_proposals=(1000, 200),
        test_proposals=(500, 100),
        rois=32,
        roi_size=8,
        mask_channels=64,
    )
    laptop = replace(
        full,
        detector=small,
        iterations=300,
        lr=0.02,
        drops=(200, 270),
        precise_bn=20,
        loop=replace(full.loop, batch_size=4, precision="bf16"),
    )
    if scale == "laptop":
        return EvaluationRecipe(laptop, "coco:coco-mini")
    small = replace(small, min_sizes=(96,), test_size=96, max_size=160, rois=8)
    smoke = replace(
        laptop,
        detector=small,
        iterations=2,
        warmup=1,
        drops=(),
        precise_bn=1,
        train_images=4,
        test_images=2,
        loop=replace(full.loop, batch_size=2, log_every=1),
    )
    return EvaluationRecipe(smoke, "coco:coco-mini")


IMAGENET_EPOCHS = (100, 200, 400, 800, 1000)  #: of Table I

RECIPES: dict[str, Callable[[Scale], Recipe]] = {
    "cifar10": _cifar10,
    "cifar10-vicreg": _vicreg,
    "cifar10-barlow-twins": _barlow_twins,
    "cifar10-byol": _byol,
    "cifar10-swav": _swav,
    "cifar10-units": _units,
    "two-views": _two_views,
    **{
        f"imagenet-{epochs}": update_wrapper(partial(_imagenet, epochs=epochs), _imagenet)
        for epochs in IMAGENET_EPOCHS
    },
}

OWN = ("knn", "linear")  #: evaluations that a run brings its own settings for
EVALUATIONS: dict[str, Callable[[Scale], EvaluationRecipe]] = {
    "imagenet-knn": _imagenet_knn,
    "imagenet-linear": _imagenet_linear,
    "places205-linear": _places205_linear,
    "voc07-svm": _voc07_svm,
    "coco-detection": _coco_detection,
}
