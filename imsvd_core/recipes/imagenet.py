"""Recipes on ImageNet."""

from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.methods import IMSVD
from imsvd_core.networks import NetworkConfig
from imsvd_core.recipes.base import EvalViewConfig, Recipe, Scale
from imsvd_core.views import IMAGENET_MEAN, IMAGENET_STD, ViewConfig, imagenet_views

EPOCHS = (100, 200, 400, 800, 1000)  #: of Table I


PAPER = NetworkConfig(backbone="resnet50", cifar_stem=False, hidden=(8192,), dim=8160)
PAPER_OPTIM = OptimConfig(
    name="lars",
    lr=0.6 * 2048 / 256,
    weight_decay=1e-6,
    warmup_epochs=10,
    final_lr_fraction=0.002 / 4.8,
)
PROBE_OPTIM = OptimConfig(
    name="sgd", lr=0.02, weight_decay=1e-6, warmup_epochs=0, final_lr_fraction=0.0
)
PROBE_VIEW = ViewConfig(size=224, scale=(0.2, 1.0))
EVAL_VIEW = EvalViewConfig(256, 224, IMAGENET_MEAN, IMAGENET_STD)


def imagenet(scale: Scale, epochs: int = 100) -> Recipe:
    """IMSVD on ImageNet, as in the paper (Table I): ResNet-50, 8192-8160, LARS, batches of 2048.

    The rate ends at 0.002, as the text says (the authors' code: at 0.0048); bf16 where they used
    fp16. smoke: a few steps at these widths, of 8 images; laptop: a narrow network on 40 classes of
    64-pixel images.
    """
    if scale == "full":
        return Recipe(
            method=IMSVD(units=80),
            network=PAPER,
            views=imagenet_views(),
            data="tree:imagenet",
            optim=PAPER_OPTIM,
            loop=LoopConfig(epochs=epochs, batch_size=2048),
            eval_view=EVAL_VIEW,
            watch=KNNConfig(neighbors=(20,), gallery=20_000, queries=5_000),
            linear=LinearConfig(
                PROBE_OPTIM, LoopConfig(epochs=100, batch_size=256), augment=True, view=PROBE_VIEW
            ),
        )
    if scale == "laptop":
        return Recipe(
            method=IMSVD(units=16),
            network=NetworkConfig(backbone="narrow", cifar_stem=False, hidden=(1024,), dim=1024),
            views=imagenet_views(64),
            data="tree:tiny-imagenet-40",
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
    few = KNNConfig(neighbors=(5,), gallery=16, queries=8)
    step = LoopConfig(epochs=1, batch_size=8, keep=1, log_every=1)
    return Recipe(
        method=IMSVD(units=80),
        network=PAPER,
        views=imagenet_views(),
        data="tree:imagenet",
        optim=PAPER_OPTIM,
        loop=step,
        eval_view=EVAL_VIEW,
        knn=few,
        watch=few,
        look=16,
        samples=16,
        linear=LinearConfig(
            PROBE_OPTIM, step, augment=True, view=PROBE_VIEW, train_images=16, test_images=8
        ),
    )
