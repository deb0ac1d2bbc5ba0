"""A trained backbone for other toolkits."""

import logging
import pickle
import re
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torchvision.models.resnet import ResNet

from imsvd_core.networks import BackboneName, stem
from imsvd_core.system.files import atomic_write
from imsvd_core.weights import describe, read_state_dict, shapes_of, shapes_wanted

__all__ = ["SUFFIXES", "Format", "detectron2_name", "export", "read_state_dict"]

log = logging.getLogger(__name__)

Format = Literal["torchvision", "timm", "detectron2", "safetensors"]
SUFFIXES = {
    "torchvision": (".pth", ".pt"),
    "timm": (".pth", ".pt", ".safetensors"),
    "detectron2": (".pkl",),
    "safetensors": (".safetensors",),
}


def export(
    backbone: ResNet, name: BackboneName, cifar_stem: bool, to: Format, path: Path | str
) -> Path:
    """Write the backbone `name` as another toolkit reads it; it gives identical features there.

    * torchvision (.pth): a state dict.
      `torchvision.models.resnet50().load_state_dict(torch.load(path), strict=False)` lacks `fc`
      alone. With the CIFAR stem that model's `conv1` must be `nn.Conv2d(3, 64, 3, padding=1,
      bias=False)` and its `maxpool` `nn.Identity()` first. `narrow` fits
      `imsvd_core.networks.build_backbone("narrow", ...)` alone.
    * timm (.pth or .safetensors): `timm.create_model("resnet50", num_classes=0,
      checkpoint_path=path)`.
    * detectron2 (.pkl): for MODEL.WEIGHTS, with MODEL.RESNETS.DEPTH 50 (or another; 18 and 34 with
      RES2_OUT_CHANNELS 64, wide ones with WIDTH_PER_GROUP 128), STRIDE_IN_1X1 False, INPUT.FORMAT
      "RGB", MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375], and a
      norm that is trained, since these statistics are no supervised network's. Its arrays are numpy
      2's, which numpy reads from 1.26 on.
    * safetensors (.safetensors): torchvision's names, with what the network is as metadata.

    Returns the path. Raises ValueError for a format that cannot hold this network, for another
    suffix, and for a backbone that is not what `name` and `cifar_stem` say.
    """
    path = Path(path)
    if to not in SUFFIXES:
        raise ValueError(f"to={to!r} must be one of {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES[to]:
        raise ValueError(
            f"path={str(path)!r} must end in {' or '.join(SUFFIXES[to])}, by which readers know "
            f"{to}'s files"
        )
    unusual = stem(backbone)
    if to in ("timm", "detectron2") and (cifar_stem or name == "narrow" or len(unusual) > 1):
        raise ValueError(
            f"to={to!r} cannot hold backbone={name!r} with cifar_stem={cifar_stem}: its ResNets do "
            "not come with a 3×3 first convolution without max-pooling, nor with a first "
            "convolution of 32 channels or of other padding; export to safetensors or torchvision"
        )
    state = {
        key: value.cpu().contiguous().clone()
        for key, value in backbone.state_dict().items()
        if not key.startswith("fc.")
    }
    if shapes_of(state) != shapes_wanted(name, cifar_stem):
        raise ValueError(
            f"backbone={describe(state)} is not what name={name!r} and cifar_stem={cifar_stem} say"
        )
    if to == "torchvision" and len(unusual) > 1:
        log.info("%s: %s must be set where it is loaded; the file cannot say so", path, unusual)
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            about = {"format": "pt", "names": "torchvision", "backbone": name, **unusual}
            file.write(safetensors.torch.save(state, about))
        elif to == "detectron2":
            renamed = {detectron2_name(key): value.numpy() for key, value in state.items()}
            origin = {"__author__": "imsvd_core", "matching_heuristics": True}
            pickle.dump({"model": renamed, **origin}, file)
        else:
            torch.save(state, file)
    return path


def detectron2_name(name: str) -> str:
    """What detectron2 calls a tensor of torchvision's ResNets: layer1.0.bn2.weight →
    res2.0.conv2.norm.weight."""
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = (
        re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        .replace("downsample.0", "shortcut")
        .replace("downsample.1", "shortcut.norm")
    )
    return name if name.startswith("res") else f"stem.{name}"
