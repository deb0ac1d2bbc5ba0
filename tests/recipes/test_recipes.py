"""Recipes: every one builds at every scale, and survives the way through JSON."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch

from imsvd_core.engine.optim import learning_rate
from imsvd_core.methods import IMSVD
from imsvd_core.networks import TwinNetwork
from imsvd_core.recipes import RECIPES, EvalViewConfig, Recipe, Scale, current_scale, recipe
from imsvd_core.system.config import config_hash, from_plain, plain
from imsvd_core.views import imagenet_views

EVERY = [(name, scale) for name in RECIPES for scale in get_args(Scale)]


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_recipe_builds_and_comes_back_from_json(name, scale):
    one = recipe(name, scale)
    with torch.device("meta"):
        network = TwinNetwork.build(one.network)
    assert network.projector[-1].out_features == one.network.dim
    assert from_plain(Recipe, json.loads(json.dumps(plain(one)))) == one


def test_recipes_differ():
    """But for ImageNet's at smoke: a step is a step, however many epochs it stands for."""
    different = [
        one
        for one in EVERY
        if one[1] != "smoke" or one[0] in ("imagenet-100", "cifar10") or "imagenet" not in one[0]
    ]
    assert len({config_hash(recipe(*one)) for one in different}) == len(different) == len(EVERY) - 4


@pytest.mark.parametrize("epochs", [100, 200, 400, 800, 1000])
def test_the_imagenet_recipes_are_the_papers(epochs):
    """ResNet-50, 8192-8160, V = 102, B = 80, LARS 0.6·bs/256 to 0.002 after 10 epochs of warm-up,
    wd 1e-6, batch 2048."""
    full = recipe(f"imagenet-{epochs}", "full")
    assert (
        full.network.backbone,
        full.network.cifar_stem,
        full.network.hidden,
        full.network.dim,
    ) == ("resnet50", False, (8192,), 8160)
    assert full.method == IMSVD(units=80)
    assert full.method.temperature == 1
    assert (full.optim.name, full.optim.lr, full.optim.weight_decay, full.optim.warmup_epochs) == (
        "lars",
        4.8,
        1e-6,
        10,
    )
    assert learning_rate(full.optim, 10 * 625 - 1, 625 * epochs, 625) == 4.8
    assert learning_rate(full.optim, 625 * epochs - 1, 625 * epochs, 625) == pytest.approx(0.002)
    assert (full.loop.epochs, full.loop.batch_size, full.views) == (
        epochs,
        2048,
        imagenet_views(224),
    )
    assert full.linear.view.scale == (0.2, 1.0)
    assert (
        full.eval_view.resize,
        full.eval_view.size,
    ) == (256, 224)
    assert full.network.zero_init_residual
    smoke = recipe(f"imagenet-{epochs}", "smoke")  # at the same widths
    assert (
        replace(smoke.network, zero_init_residual=True),
        smoke.optim,
        smoke.views,
        smoke.method,
    ) == (
        full.network,
        full.optim,
        full.views,
        full.method,
    )


def test_the_full_recipe_is_the_authors():
    """ResNet-18, PyTorch's first weights, projector 512-1024-1024-1024, B = 32, SGD 0.1·bs/256, wd
    5e-4 on norms too, batch 512, 800 epochs, temperature 1; test images bicubic, 36 to 32."""
    full = recipe("cifar10", "full")
    assert (full.network.backbone, full.network.hidden, full.network.dim) == (
        "resnet18",
        (1024, 1024),
        1024,
    )
    assert full.method == IMSVD(units=32)
    assert full.method.temperature == 1
    assert (full.optim.name, full.optim.lr, full.optim.weight_decay) == (
        "sgd",
        0.1 * 512 / 256,
        5e-4,
    )
    assert (
        full.loop.epochs,
        full.loop.batch_size,
        full.linear.optim.lr,
        full.linear.optim.milestones,
    ) == (800, 512, 30.0, (60, 80))
    assert (full.network.init, full.optim.decay_all) == ("pytorch", True)
    assert full.linear.view.interpolation == "bicubic"
    assert full.eval_view == EvalViewConfig(36, 32, interpolation="bicubic")


def test_what_only_the_full_recipes_follow_changes_no_smaller_one():
    """Their trainings are the same bit by bit as before."""
    for name in RECIPES:
        for scale in ("smoke", "laptop"):
            small = recipe(name, scale)
            network = small.network
            assert (network.init, network.zero_init_residual) == ("kaiming", False)
            assert not small.optim.decay_all
            assert small.eval_view.interpolation == small.linear.view.interpolation == "bilinear"


def test_unequal_units_come_back_from_json():
    one = replace(recipe("cifar10", "smoke"), method=IMSVD(units=(32, 16, 16)))
    assert from_plain(Recipe, plain(one)) == one


def test_the_environment_sets_the_scale(monkeypatch):
    monkeypatch.delenv("IMSVD_SCALE", raising=False)
    assert current_scale() == "laptop"
    assert recipe("cifar10") == recipe("cifar10", "laptop")
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    assert recipe("cifar10") == recipe("cifar10", "smoke")
    monkeypatch.setenv("IMSVD_SCALE", "huge")
    with pytest.raises(ValueError, match="IMSVD_SCALE='huge' must be one of smoke, laptop, full"):
        recipe("cifar10")


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="recipe='cifar11' is unknown; there are: cifar10"):
        recipe("cifar11")
    with pytest.raises(ValueError, match="name='simclear' is none of"):
        from_plain(Recipe, {"method": {"name": "simclear"}})
    with pytest.raises(ValueError, match="scale='huge'"):
        recipe("cifar10", "huge")
    with pytest.raises(ValueError, match="Recipe has no field lr"):
        from_plain(Recipe, {"lr": 1})
    with pytest.raises(ValueError, match="units=7 does not divide"):
        replace(recipe("cifar10", "smoke"), method=IMSVD(units=7))
