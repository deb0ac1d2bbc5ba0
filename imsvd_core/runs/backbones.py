"""Trained backbones as files: written by a run, read from a run's folder or from anybody's file of
weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torchvision.models.resnet import ResNet

from imsvd_core.export import read_state_dict
from imsvd_core.networks import NetworkConfig, build_backbone
from imsvd_core.recipes import Recipe, Scale, recipe
from imsvd_core.system.config import from_plain
from imsvd_core.system.files import atomic_write


@dataclass(frozen=True)
class TrainedBackbone:
    """A backbone to evaluate, and what is known of its training."""

    recipe: Recipe
    """The recipe of its training; for a file of weights, the recipe from which its evaluations take
    their settings."""
    backbone: ResNet
    folder: Path
    """The folder that receives its results."""
    is_ours: bool
    """Whether `recipe` really trained it."""


def open_backbone(path: Path | str, scale: Scale | None = None) -> TrainedBackbone:
    """The backbone of a finished run's folder, or of a file of weights under torchvision's names
    (.pth, .pt, .safetensors).

    The evaluations of a file start from ImageNet's recipe, or from CIFAR-10's if its first
    convolution is of that kind; their results go to runs/FILE. Raises FileNotFoundError or
    ValueError for a path that is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"run={str(path)!r} is not there: give the folder of a finished `imsvd pretrain`, or a "
            "file of weights (.pth, .pt, .safetensors)"
        )
    if path.is_dir():
        trained = TrainedBackbone(*load_run(path), path, is_ours=True)
    else:
        name, cifar_stem, state = read_state_dict(path)
        backbone = build_backbone(name, cifar_stem)
        backbone.load_state_dict(state)
        template = recipe("cifar10" if cifar_stem else "imagenet-100", scale)
        network = replace(template.network, backbone=name, cifar_stem=cifar_stem)
        template = replace(template, network=network)
        trained = TrainedBackbone(template, backbone, Path("runs") / path.stem, is_ours=False)
    state = trained.backbone.state_dict()
    if names := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(
            f"run={str(path)!r} contains {len(names)} tensors with NaN or infinite values, the "
            f"first is {names[0]}: give another checkpoint; these weights cannot be evaluated"
        )
    return trained


def load_run(run_dir: Path | str) -> tuple[Recipe, ResNet]:
    """Recipe and trained backbone of a finished run. Raises FileNotFoundError naming what the
    folder lacks."""
    run_dir = Path(run_dir)
    for name in ("config.json", "backbone.safetensors"):
        if not (run_dir / name).exists():
            raise FileNotFoundError(
                f"{run_dir} has no {name}: give the folder of a finished `imsvd pretrain`"
            )
    trained_by = from_plain(Recipe, json.loads((run_dir / "config.json").read_text()))
    return trained_by, load_backbone(run_dir / "backbone.safetensors")


def save_backbone(
    path: Path | str,
    backbone: ResNet,
    config: NetworkConfig,
    dtype: torch.dtype | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the weights and what is needed to build the network again; floating-point ones in
    `dtype`, if given. The file takes its place unless `check` raises."""
    weights = {
        name: value.to(dtype if value.is_floating_point() else None).contiguous().cpu()
        for name, value in backbone.state_dict().items()
    }
    metadata = {"backbone": config.backbone, "cifar_stem": str(config.cifar_stem)}
    with atomic_write(path, check) as file:
        file.write(safetensors.torch.save(weights, metadata))


def load_backbone(path: Path | str) -> ResNet:
    """The backbone that `save_backbone` wrote. Raises ValueError for a file that does not say which
    network it holds."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if not {"backbone", "cifar_stem"} <= metadata.keys():
        raise ValueError(
            f"{path} does not say which backbone it holds: give a file that `imsvd pretrain` wrote"
        )
    backbone = build_backbone(metadata["backbone"], metadata["cifar_stem"] == "True")
    backbone.load_state_dict(safetensors.torch.load_file(path))
    return backbone
