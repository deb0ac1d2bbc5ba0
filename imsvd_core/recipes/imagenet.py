"""Recipes on ImageNet."""

from dataclasses import replace

from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.methods import IMSVD
from imsvd_core.networks import NetworkConfig
from imsvd_core.recipes.base import EvalViewConfig, Recipe, Scale, watching
from imsvd_core.views import IMAGENET_MEAN, IMAGENET_STD, ViewConfig, imagenet_views

EPOCHS = (100, 200, 400, 800, 1000)  #: of Table I


def imagenet(scale: Scale, epochs: int = 100) -> Recipe:
    """IMSVD on ImageNet, as in the paper (Table I): ResNet-50, 8192-8160, LARS, batches of 2048.

    The rate ends at 0.002, as the text says (the authors' code: at 0.0048); bf16 where they used
    fp16; what else differs from the code is declared on the book's page on paper and code. smoke: a
    few steps at these widths, of 8 images; laptop: a narrow network on 40 classes of 64-pixel
    images.
    """
    full = Recipe(
        method=IMSVD(units=80),
        network=NetworkConfig("resnet50", False, (8192,), 8160, zero_init_residual=True),
        views=imagenet_views(),
        data="tree:imagenet",
        optim=OptimConfig(
            "lars",
            lr=0.6 * 2048 / 256,
            weight_decay=1e-6,
            warmup_epochs=10,
            final_lr_fraction=0.002 / 4.8,
        ),
        loop=LoopConfig(epochs=epochs, batch_size=2048),
        eval_view=EvalViewConfig(256, 224, IMAGENET_MEAN, IMAGENET_STD),
        watch=watching(20_000, 5_000),
        linear=LinearConfig(
            OptimConfig("sgd", lr=0.02, weight_decay=1e-6, warmup_epochs=0, final_lr_fraction=0.0),
            augment=True,
            view=ViewConfig(size=224, scale=(0.2, 1.0)),
        ),
    )
    if scale == "full":
        return full
    if scale == "laptop":
        return Recipe(
            method=IMSVD(units=16),
            network=NetworkConfig(cifar_stem=False, hidden=(1024,)),
            views=imagenet_views(64),
            data="tree:tiny-imagenet-40",
            loop=LoopConfig(epochs=epochs // 50, batch_size=256),
            eval_view=EvalViewConfig(64, 64, IMAGENET_MEAN, IMAGENET_STD),
            watch=watching(4_000, 1_000),
            linear=LinearConfig(
                OptimConfig("sgd", lr=0.3, weight_decay=1e-6, warmup_epochs=0),
                LoopConfig(epochs=5, batch_size=256),
                view=ViewConfig(size=64, scale=(0.2, 1.0)),
                augment=True,
            ),
        )
    few = KNNConfig(neighbors=(5,), gallery=16, queries=8)
    step = LoopConfig(epochs=1, batch_size=8, keep=1, log_every=1)
    probe = replace(full.linear, loop=step, train_images=16, test_images=8)
    network = replace(full.network, zero_init_residual=False)
    return replace(
        full, network=network, loop=step, knn=few, watch=few, look=16, samples=16, linear=probe
    )
