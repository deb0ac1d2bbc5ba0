"""Trained backbones as files: written by a run, read from a run's folder or from anybody's file of
weights."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torchvision.models.resnet import ResNet

from imsvd_core.networks import NetworkConfig, build_backbone, stem
from imsvd_core.recipes import EvalViewConfig, Recipe, Scale, recipe
from imsvd_core.system.config import from_plain
from imsvd_core.system.files import atomic_write
from imsvd_core.system.foreign import ForeignConfig
from imsvd_core.views import IMAGENET_MEAN, IMAGENET_STD
from imsvd_core.weights import read

log = logging.getLogger(__name__)


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
    view: EvalViewConfig | None = None
    """What it needs to see of an image, at whatever scale; None for what the scale shows."""


def open_backbone(
    path: Path | str, scale: Scale | None = None, foreign: ForeignConfig | None = None
) -> TrainedBackbone:
    """The backbone of a finished run's folder, or of anybody's file of weights (`weights.read`).

    The evaluations of a file start from ImageNet's recipe, or from CIFAR-10's if its first
    convolution is of that kind; torchvision's networks with ImageNet's see 224 pixels at every
    scale. Their results go to runs/FILE. A line in the log says what was recognised, and what was
    taken for granted. Raises FileNotFoundError or ValueError for a path that is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"run={str(path)!r} is not there: give the folder of a finished `imsvd pretrain`, or a "
            "file of weights (.pth, .pt, .safetensors)"
        )
    if path.is_dir():
        if foreign not in (None, ForeignConfig()):
            raise ValueError(
                "weights_key, stem_padding and max_pool are for files of weights: leave them out, "
                f"run={str(path)!r} is the folder of a run"
            )
        trained = TrainedBackbone(*load_run(path), path, is_ours=True)
    else:
        trained = _open_file(path, scale, foreign or ForeignConfig())
    state = trained.backbone.state_dict()
    if names := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(
            f"run={str(path)!r} contains {len(names)} tensors with NaN or infinite values, the "
            f"first is {names[0]}: give another checkpoint; these weights cannot be evaluated"
        )
    return trained


def _open_file(path: Path, scale: Scale | None, foreign: ForeignConfig) -> TrainedBackbone:
    found = read(path, foreign.weights_key)
    template = recipe("cifar10" if found.cifar_stem else "imagenet-100", scale)
    asked = {"stem_padding": foreign.stem_padding, "max_pool": foreign.max_pool}
    layers = _first_layers(found.metadata)
    layers |= {name: value for name, value in asked.items() if value is not None}
    backbone = build_backbone(found.name, found.cifar_stem, **layers)
    network = replace(
        template.network,
        backbone=found.name,
        cifar_stem=found.cifar_stem,
        stem_padding=layers.get("stem_padding"),
        max_pool=layers.get("max_pool"),
    )
    backbone.load_state_dict(found.state)
    view = None
    if not found.cifar_stem and found.name != "narrow":
        view = EvalViewConfig(256, 224, IMAGENET_MEAN, IMAGENET_STD)
    seen = view or template.eval_view
    template = replace(template, network=network, eval_view=seen)
    log.info(
        "%s: %s%s; taken for granted: its first convolution is padded by %d and %sfollowed by "
        "max-pooling (--stem-padding, --max-pool), wider strides are in 3×3 convolutions, images "
        "are RGB, normalised by %s and %s, and %d pixels wide (--eval-view)",
        path,
        found,
        "" if layers.get("stem_relu", True) else "; no ReLU among its first layers",
        backbone.conv1.padding[0],
        "" if isinstance(backbone.maxpool, torch.nn.MaxPool2d) else "not ",
        seen.mean,
        seen.std,
        seen.size,
    )
    key = f"-{foreign.weights_key.replace('/', '_')}" if foreign.weights_key else ""
    folder = Path("runs") / f"{path.stem}{key}"
    return TrainedBackbone(template, backbone, folder, is_ours=False, view=view)


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
    metadata = {"backbone": config.backbone, **stem(backbone)}
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
    backbone = build_backbone(
        metadata["backbone"], metadata["cifar_stem"] == "True", **_first_layers(metadata)
    )
    backbone.load_state_dict(safetensors.torch.load_file(path))
    return backbone


def _first_layers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `networks.stem` writes of the first layers, for `build_backbone`."""
    layers: dict[str, Any] = {
        name: metadata[name] == "True" for name in ("max_pool", "stem_relu") if name in metadata
    }
    if "stem_padding" in metadata:
        layers["stem_padding"] = int(metadata["stem_padding"])
    return layers
