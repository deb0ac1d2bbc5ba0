"""Recipes: every run of the book as a frozen dataclass. No hyper-parameter is named anywhere else.

A recipe exists at three scales: `smoke` (seconds: does it run?), `laptop` (minutes on two CPU
cores) and `full` (the authors' setting, hours on GPUs). `IMSVD_SCALE` chooses, `laptop` by default.
"""

from collections.abc import Callable
from functools import partial, update_wrapper

from imsvd_core.recipes import cifar10
from imsvd_core.recipes.base import EvalViewConfig, Recipe, fast_here
from imsvd_core.recipes.evaluations import EVALUATIONS, OWN, EvaluationRecipe, evaluation
from imsvd_core.recipes.imagenet import EPOCHS, imagenet
from imsvd_core.system.scale import Scale, current_scale

__all__ = [
    "EVALUATIONS",
    "OWN",
    "RECIPES",
    "EvalViewConfig",
    "EvaluationRecipe",
    "Recipe",
    "Scale",
    "current_scale",
    "evaluation",
    "recipe",
]

RECIPES: dict[str, Callable[[Scale], Recipe]] = {
    "cifar10": cifar10.cifar10,
    "cifar10-vicreg": cifar10.vicreg,
    "cifar10-barlow-twins": cifar10.barlow_twins,
    "cifar10-byol": cifar10.byol,
    "cifar10-swav": cifar10.swav,
    "cifar10-simclr": cifar10.simclr,
    "cifar10-moco": cifar10.moco,
    "cifar10-simsiam": cifar10.simsiam,
    "cifar10-iic": cifar10.iic,
    "cifar10-sem": cifar10.sem,
    "cifar10-frossl": cifar10.frossl,
    "cifar10-mmcr": cifar10.mmcr,
    "cifar10-lejepa": cifar10.lejepa,
    "cifar10-twist": cifar10.twist,
    "cifar10-corinfomax": cifar10.corinfomax,
    "cifar10-wmse": cifar10.wmse,
    "cifar10-supervised": cifar10.supervised,
    "cifar10-npid": cifar10.npid,
    "cifar10-dissl": cifar10.dissl,
    "cifar10-units": cifar10.units,
    "two-views": cifar10.two_views,
    **{
        f"imagenet-{epochs}": update_wrapper(partial(imagenet, epochs=epochs), imagenet)
        for epochs in EPOCHS
    },
}


def recipe(name: str, scale: str | None = None) -> Recipe:
    """The recipe `name` at a scale (IMSVD_SCALE's by default). Raises ValueError naming the recipes
    there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is unknown; there are: {', '.join(RECIPES)}")
    size = current_scale(scale)
    return fast_here(RECIPES[name](size), size)
