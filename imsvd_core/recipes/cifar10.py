"""Recipes on CIFAR-10."""

from dataclasses import replace
from typing import Any

from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.methods import (
    BYOL,
    DISSL,
    IIC,
    IMSVD,
    MMCR,
    NPID,
    SEM,
    TWIST,
    WMSE,
    BarlowTwins,
    CorInfoMax,
    FroSSL,
    LeJEPA,
    MethodConfig,
    MoCo,
    SimCLR,
    SimSiam,
    Supervised,
    SwAV,
    VICReg,
)
from imsvd_core.networks import NetworkConfig
from imsvd_core.recipes.base import EvalViewConfig, Recipe, Scale, watching
from imsvd_core.views import CIFAR_MEAN, CIFAR_STD, ViewConfig, cifar_multicrop_views


def cifar10(scale: Scale) -> Recipe:
    """IMSVD on CIFAR-10."""
    # as in the authors' CIFAR code, but for what the book's page on paper and code declares
    if scale == "full":
        probe = ViewConfig(
            size=32,
            scale=(0.8, 1.0),
            interpolation="bicubic",
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
        )
        drops = OptimConfig("sgd", lr=30.0, weight_decay=0.0, warmup_epochs=0, milestones=(60, 80))
        return Recipe(
            method=IMSVD(units=32),
            network=NetworkConfig("resnet18", hidden=(1024, 1024), dim=1024, init="pytorch"),
            optim=OptimConfig("sgd", lr=0.2, weight_decay=5e-4, warmup_epochs=10, decay_all=True),
            loop=LoopConfig(epochs=800, batch_size=512),
            eval_view=EvalViewConfig(resize=36, interpolation="bicubic"),
            linear=LinearConfig(drops, augment=True, view=probe),
        )
    probe_optim = OptimConfig("sgd", lr=0.1, weight_decay=1e-6, warmup_epochs=0)
    if scale == "laptop":
        return Recipe(
            method=IMSVD(units=32, temperature=0.25),
            loop=LoopConfig(epochs=2),
            linear=LinearConfig(probe_optim, LoopConfig(epochs=20, batch_size=256), normalize=True),
        )
    return Recipe(
        method=IMSVD(units=8, temperature=0.25),
        network=NetworkConfig(hidden=(64,), dim=64),
        loop=LoopConfig(epochs=2, batch_size=64, log_every=1),
        samples=256,
        knn=KNNConfig(gallery=400, queries=200),
        watch=watching(200, 100),
        look=256,
        linear=LinearConfig(probe_optim, LoopConfig(epochs=2, batch_size=64), normalize=True),
    )


def vicreg(scale: Scale) -> Recipe:
    """VICReg on CIFAR-10, all else equal."""
    return replace(cifar10(scale), method=VICReg())


def barlow_twins(scale: Scale) -> Recipe:
    """Barlow Twins on CIFAR-10, all else equal."""
    return replace(cifar10(scale), method=BarlowTwins())


def byol(scale: Scale) -> Recipe:
    """BYOL on CIFAR-10.

    full: by lightly's CIFAR-10 benchmark (200-NN 91.0 after 800 epochs), with the momentum rising
    from 0.99. laptop: 780 steps of 128 images (seed 0, fp32: 20-NN 42.64, untrained 38.0), since
    194 of 512 learn little (40.78).
    """
    # Of the laptop's steps the target remembers some thirty; at 0.99 it would follow too late.
    momentum = 0.97 if scale == "laptop" else 0.99
    method = BYOL(momentum, predictor_hidden=64 if scale == "smoke" else 1024)
    base = _by_lightly(scale, method, hidden=(1024,), dim=256)
    if scale != "laptop":
        return base
    return replace(base, loop=replace(base.loop, batch_size=128))


def swav(scale: Scale) -> Recipe:
    """SwAV on CIFAR-10, with four small crops.

    full: the heads, prototypes and rate of lightly's CIFAR-10 benchmark, which has no small crops.
    """
    method = SwAV(prototypes=16 if scale == "smoke" else 512)
    base = replace(cifar10(scale), method=method, views=cifar_multicrop_views())
    if scale != "full":
        return base
    return replace(
        base,
        network=NetworkConfig(backbone="resnet18", hidden=(512,), dim=128),
        optim=OptimConfig("adamw", lr=4e-3, weight_decay=1e-6, warmup_epochs=0),
    )


def simclr(scale: Scale) -> Recipe:
    """SimCLR on CIFAR-10.

    full: by lightly's CIFAR-10 benchmark (200-NN 87.9 after 800 epochs).
    """
    return _by_lightly(scale, SimCLR(), hidden=(512,), dim=128)


def moco(scale: Scale) -> Recipe:
    """MoCo v2 on CIFAR-10.

    full: by lightly's CIFAR-10 benchmark (200-NN 89.9 after 800 epochs), whose queue is of 8192
    keys.
    """
    queue = {"smoke": 256, "laptop": 4096, "full": 8192}[scale]
    # Of the laptop's 194 steps the keys' network remembers ten; at 0.99 it would follow too late.
    method = MoCo(queue, temperature=0.1, momentum=0.9 if scale == "laptop" else 0.99)
    return _by_lightly(scale, method, hidden=(512,), dim=128)


def simsiam(scale: Scale) -> Recipe:
    """SimSiam on CIFAR-10.

    full: by lightly's CIFAR-10 benchmark (200-NN 90.4 after 800 epochs), which does not raise the
    rate with the batch.
    """
    method = SimSiam(predictor_hidden=16 if scale == "smoke" else 512)
    return _by_lightly(scale, method, hidden=(2048,), dim=2048, lr=0.06)


def iic(scale: Scale) -> Recipe:
    """IIC of many variables on CIFAR-10, all else equal to IMSVD's: no other setting is
    published."""
    base = cifar10(scale)
    units, temperature = _codes(base)
    return replace(base, method=IIC(units, temperature))


def sem(scale: Scale) -> Recipe:
    """SEM in BYOL on CIFAR-10, at small scales with IMSVD's variables.

    full: the authors' codes and heads (`bash_files/pretrain/cifar/sdbyol.sh`), at BYOL's rate here.
    """
    momentum = 0.9 if scale == "laptop" else 0.99  # of 194 steps it remembers ten
    units, temperature = (12, 1.1) if scale == "full" else _codes(cifar10(scale))
    hidden = 64 if scale == "smoke" else 2048
    method = SEM(units, temperature, (hidden, 256), momentum, predictor_hidden=hidden)
    return _by_lightly(scale, method, hidden=(), dim=12 * 195)


def frossl(scale: Scale) -> Recipe:
    """FroSSL on CIFAR-10.

    full: head and weight of solo-learn's `cifar/frossl.yaml`; its LARS is another than ours, so the
    optimizer is IMSVD's.
    """
    network = NetworkConfig("resnet18", hidden=(2048, 2048), dim=1024)
    return _at(scale, FroSSL(), network=network)


def mmcr(scale: Scale) -> Recipe:
    """MMCR of two views on CIFAR-10.

    full: rate, epochs and λ of the authors' `pretrain_cifar_stl.py`, which takes forty views of
    batches of 32.
    """
    network = NetworkConfig("resnet18", hidden=(512,), dim=128)
    optim = OptimConfig("adamw", lr=1e-3, weight_decay=1e-6)
    loop = LoopConfig(epochs=500, batch_size=512)
    return _at(scale, MMCR(), network=network, optim=optim, loop=loop)


def lejepa(scale: Scale) -> Recipe:
    """LeJEPA on CIFAR-10.

    full: head, epochs and batch of EB-JEPA's best (91.02 % by its own probe); its weight has other
    units, so λ is the authors' and the optimizer IMSVD's.
    """
    network = NetworkConfig("resnet18", hidden=(2048, 2048), dim=128)
    loop = LoopConfig(epochs=300, batch_size=256)
    optim = OptimConfig("sgd", lr=0.1, weight_decay=1e-4, warmup_epochs=10)
    return _at(scale, LeJEPA(), network=network, loop=loop, optim=optim)


def twist(scale: Scale) -> Recipe:
    """TWIST on CIFAR-10, all else equal to IMSVD's: no other setting is published."""
    return _at(scale, TWIST())


def corinfomax(scale: Scale) -> Recipe:
    """CorInfoMax on CIFAR-10.

    full: by the authors' command (93.18 % linear after 1000 epochs).
    """
    return _at(
        scale,
        CorInfoMax(),
        NetworkConfig(hidden=(64,) if scale == "smoke" else (1024, 1024), dim=64),
        network=NetworkConfig("resnet18", hidden=(2048, 2048), dim=64),
        optim=OptimConfig("sgd", 0.5, 1e-4, warmup_epochs=10, final_lr_fraction=2e-6),
        loop=LoopConfig(epochs=1000, batch_size=512),
    )


def wmse(scale: Scale) -> Recipe:
    """W-MSE on CIFAR-10.

    full: by solo-learn's `cifar/wmse.yaml` (88.67 % linear after 1000 epochs).
    """
    smoke = scale == "smoke"
    return _at(
        scale,
        WMSE(32 if smoke else 128),
        NetworkConfig(hidden=(64,), dim=16) if smoke else NetworkConfig(hidden=(1024,), dim=64),
        network=NetworkConfig("resnet18", hidden=(1024,), dim=64),
        optim=OptimConfig("adamw", lr=2e-3, weight_decay=1e-6, warmup_epochs=10),
        loop=LoopConfig(epochs=1000, batch_size=256),
    )


def supervised(scale: Scale) -> Recipe:
    """Classification of CIFAR-10 by its labels, on the others' views.

    full: by kuangliu/pytorch-cifar (93.02 % after 350 epochs, on views that are cropped and
    flipped).
    """
    return _at(
        scale,
        Supervised(),
        NetworkConfig(hidden=(), dim=10),
        network=NetworkConfig("resnet18", hidden=(), dim=10, init="pytorch"),
        optim=OptimConfig("sgd", 0.1, 5e-4, warmup_epochs=0, milestones=(150, 250), decay_all=True),
        loop=LoopConfig(epochs=350, batch_size=128),
    )


def npid(scale: Scale) -> Recipe:
    """NPID on CIFAR-10, one view of an image.

    full: rate, head and batch of the authors' `cifar.py` and README (200-NN 80.8 after 200 epochs).
    """
    return _at(
        scale,
        NPID(256 if scale == "smoke" else 50_000),
        NetworkConfig(hidden=(), dim=64 if scale == "smoke" else 128),
        network=NetworkConfig("resnet18", hidden=(), dim=128),
        optim=OptimConfig("sgd", lr=0.03, weight_decay=5e-4, warmup_epochs=0, decay_all=True),
        loop=LoopConfig(epochs=200, batch_size=128),
    )


def dissl(scale: Scale) -> Recipe:
    """DISSL on CIFAR-10, all else equal to IMSVD's: no other setting is published."""
    return _at(scale, DISSL())


def _codes(base: Recipe) -> tuple[int, float]:
    """Units and temperature of IMSVD's recipe."""
    assert isinstance(base.method, IMSVD)
    assert isinstance(base.method.units, int)
    return base.method.units, base.method.temperature


def _at(
    scale: Scale, method: MethodConfig, small: NetworkConfig | None = None, **full: Any
) -> Recipe:
    """IMSVD's recipe with another method; at full scale with settings of its own, else on a `small`
    network if it needs one."""
    settings = full if scale == "full" else {"network": small} if small else {}
    return replace(cifar10(scale), method=method, **settings)


def _by_lightly(
    scale: Scale, method: MethodConfig, hidden: tuple[int, ...], dim: int, lr: float = 0.24
) -> Recipe:
    """Heads and rate of lightly's CIFAR-10 benchmark at full scale; else all equal."""
    return _at(
        scale,
        method,
        network=NetworkConfig("resnet18", hidden=hidden, dim=dim, init="pytorch"),
        optim=OptimConfig("sgd", lr=lr, weight_decay=5e-4, warmup_epochs=0, decay_all=True),
        eval_view=EvalViewConfig(),
    )


def units(scale: Scale) -> Recipe:
    """The short run that `book/studies/units.py` repeats for several numbers of units and batch
    sizes."""
    base = cifar10(scale)
    shorter = replace(base, loop=replace(base.loop, epochs=100 if scale == "full" else 1))
    if scale == "laptop":
        return replace(shorter, samples=25_600, knn=watching(10_000, 5_000))
    return shorter


def two_views(scale: Scale) -> Recipe:
    """The short runs that show collapse and what prevents it; an embedding of fewer dimensions than
    the batch has samples."""
    base = replace(cifar10(scale), method=VICReg())
    if scale == "full":
        network, loop = replace(base.network, dim=256), replace(base.loop, epochs=100)
        return replace(base, network=network, loop=loop)
    base = replace(base, optim=OptimConfig(warmup_epochs=1))
    if scale == "laptop":
        return replace(
            base,
            network=NetworkConfig(cifar_stem=False, hidden=(512,), dim=128),
            loop=LoopConfig(epochs=6, batch_size=256),
            samples=4_096,
            watch=watching(4_000, 1_000),
        )
    network = NetworkConfig(cifar_stem=False, hidden=(128,), dim=32)
    return replace(base, network=network, loop=replace(base.loop, epochs=6))
